"""The tables of an engine's inputs and outputs, against the parser of the real TensorRT."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from owl2 import BackendError
from owl2.runtime import spec
from owl2.runtime.backends.steps import StepInputs, row_inputs
from owl2.runtime.backends.tensorrt.tensors import check_engine, decoder_tensors, vision_tensors, with_stand_ins
from owl2.runtime.bundle import Bundle


@pytest.mark.parametrize("graph", ["decoder", "vision"])
def test_the_parser_sees_the_inputs_and_outputs_that_an_engine_must_have(bundle: Bundle, graph: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="there is no wheel here")
    logger, model = trt.Logger(trt.Logger.ERROR), bundle.manifest.model
    network = trt.Builder(logger).create_network(0)
    path = bundle.folder / f"{graph}.onnx"
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    by_name = {tensor.name: tensor for tensor in tensors}
    engine = SimpleNamespace(
        num_io_tensors=len(tensors),
        num_optimization_profiles=1,
        get_tensor_name=lambda index: tensors[index].name,
        get_tensor_shape=lambda name: by_name[name].shape,
        get_tensor_dtype=lambda name: by_name[name].dtype,
        get_tensor_location=lambda name: (
            trt.TensorLocation.HOST if by_name[name].is_shape_tensor else trt.TensorLocation.DEVICE
        ),
    )
    expected = decoder_tensors(trt, model, "fp16") if graph == "decoder" else vision_tensors(trt, model)
    check_engine(trt, engine, path, expected, 1)
    with pytest.raises(BackendError, match="1 optimization profiles, 2 are needed"):
        check_engine(trt, engine, path, expected, 2)
    missing = dict(list(expected.items())[1:])
    with pytest.raises(BackendError, match=r"does not fit the manifest: .* None is needed"):
        check_engine(trt, engine, path, missing, 1)


@pytest.mark.parametrize("modality", [[1, 1, 1], [0, 0], [1, 0, 1]])
@pytest.mark.parametrize("wanted", [[], [1, 0]])
def test_stand_ins_change_no_row(modality: list[int], wanted: list[int]) -> None:
    exact = row_inputs(np.array(modality), np.array(wanted, np.int64))
    made = with_stand_ins(exact)

    def order(inputs: StepInputs) -> list[int]:
        both = np.concatenate([inputs[spec.TEXT_ROWS], inputs[spec.IMAGE_ROW_INDEX]])
        rows: list[int] = both[inputs[spec.ROW_ORDER]].tolist()
        return rows

    assert order(made) == order(exact) == list(range(len(modality)))
    assert len(made[spec.TEXT_ROWS]) > 0
    assert made[spec.LOGIT_ROWS].tolist() == (wanted or [0])
