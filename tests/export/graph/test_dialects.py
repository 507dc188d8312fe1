"""The two dialects and both types of activations against each other and the original implementation."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from owl2 import ConfigError, Owl2
from owl2.export.checks.parity import with_float_activations
from owl2.export.config import ExportConfig
from owl2.export.gptq_checkpoint import export_gptq
from owl2.export.pipeline import export_bundle
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import open_decoder
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.evaluation.divergence import divergence
from owl2.runtime.preprocess import AS_ORIGINAL

MODELS = {"a1": "a1_base_bin", "a2": "a2_fp16_safetensors"}


def bundle(folder: Path, checkpoint: Path, **settings: Any) -> Path:
    export_bundle(ExportConfig(checkpoint, folder, **settings))
    return folder


@pytest.fixture(scope="module")
def gptq_checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Path:
    target = tmp_path_factory.mktemp("gptq") / "checkpoint"
    export_gptq(ExportConfig(sample_checkpoint, target, method="rtn", layout="gptq"))
    return target


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, gptq_checkpoint: Path) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("int4")
    settings: dict[str, Any] = {"weights": "int4", "activations": "fp32", "vision": "fp16"}
    return {
        dialect: Bundle.open(bundle(folder / dialect, gptq_checkpoint, dialect=dialect, **settings))
        for dialect in ("ort", "onnx")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Path:
    return bundle(tmp_path_factory.mktemp("int4") / "b", sample_checkpoint, method="rtn", dialect="onnx")


def golden_logits(owl: Owl2, case: Path, images: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits of ``owl`` and of the original for all golden prompts, [positions, V] each."""
    prompts = {entry["id"]: entry["prompt"] for entry in json.loads((case / "prompts.json").read_text())}
    recorded, made, expected = np.load(case / "forward.npz"), [], []
    for entry in json.loads((case / "forward_index.json").read_text()):
        chosen = [images / name for name in entry["images"]]
        made.append(owl.logits(prompts[entry["prompt_id"]], images=chosen, preprocess="resize", reading=AS_ORIGINAL))
        expected.append(recorded[f"{entry['name']}/logits"])
    return np.concatenate(made), np.concatenate(expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dialect", ["ort", "onnx"])
def test_float16_puts_the_same_token_first(tmp_path: Path, golden: Path, model: str, dialect: str) -> None:
    case = golden / MODELS[model]
    made, expected = golden_logits(
        Owl2.load(bundle(tmp_path / "fp16", case / "model", weights="fp16", dialect=dialect, activations="fp16")),
        case,
        golden / "images",
    )
    ahead = np.sort(expected, axis=1)[:, -1] - np.sort(expected, axis=1)[:, -2]
    same = made.argmax(1) == expected.argmax(1)
    assert same.mean() >= 0.995, f"{(~same).sum()} of {len(same)} differ, where the original led by {ahead[~same]}"
    assert np.abs(made - expected).max() < 0.02 * expected.std()


@pytest.mark.slow
class TestInt4:
    """The same integers in both dialects, kept from a GPTQ checkpoint: their own grids differ by the sign of scales."""

    def logits(self, bundle: Bundle, *, exact: bool) -> NDArray[Any]:
        """Of 40 rows, 20 in the middle being image rows; the last 8 step by step."""
        config, generator = bundle.manifest.model.decoder, np.random.default_rng(3)
        embeds = generator.standard_normal((40, config.hidden_size), dtype=np.float32)
        modality = np.r_[np.zeros(10, np.int64), np.ones(20, np.int64), np.zeros(10, np.int64)]
        path = bundle.decoder_graph()
        if not exact:
            decoder = open_decoder(path, bundle.manifest, OrtOptions())
        else:
            with with_float_activations(path) as variant:
                decoder = open_decoder(variant, bundle.manifest, OrtOptions(exact=True))
        buffers = decoder.allocate(64, None)
        made = [decoder.prefill(embeds[:32], modality[:32], 0, buffers, np.arange(32))]
        made += [decoder.decode(embeds[i : i + 1], i, buffers)[None] for i in range(32, 40)]
        return np.concatenate(made)

    def test_with_float_activations_both_compute_the_same(self, bundles: dict[str, Bundle]) -> None:
        ort, onnx_ = (self.logits(bundles[dialect], exact=True) for dialect in ("ort", "onnx"))
        # The head differs: int8 in one, float16 in the other.
        assert np.abs(ort - onnx_).max() < 0.05 * ort.std()
        assert divergence(ort, onnx_, np.zeros(40, np.int64)).mean_kl(0) < 1e-4

    def test_as_they_run_they_differ_by_what_int8_activations_cost(self, bundles: dict[str, Bundle]) -> None:
        text = np.zeros(40, np.int64)
        cost = divergence(self.logits(bundles["ort"], exact=True), self.logits(bundles["ort"], exact=False), text)
        difference = divergence(
            self.logits(bundles["ort"], exact=False), self.logits(bundles["onnx"], exact=False), text
        )
        assert difference.mean_kl(0) < 4 * cost.mean_kl(0)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["ort", "onnx"])
def test_kept_scales_of_float32_are_rounded_where_the_graph_computes_in_float16(
    tmp_path: Path, gptq_checkpoint: Path, dialect: str
) -> None:
    shutil.copytree(gptq_checkpoint, tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").glob("*.safetensors"):
        generator = torch.Generator().manual_seed(0)
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(".scales"):
                jitter = 1 + 1e-3 * torch.rand(tensor.shape, generator=generator)
                tensors[name] = tensor.float() * jitter
        save_file(tensors, path, metadata={"format": "pt"})
    made = bundle(tmp_path / "bundle", tmp_path / "checkpoint", dialect=dialect, activations="fp16", vision="fp16")
    assert Bundle.open(made).manifest.activations == "fp16"


class TestGraphs:
    @pytest.mark.parametrize("name", [spec.VISION_GRAPH, spec.DECODER_GRAPH])
    def test_only_standard_operators_of_opset_21(self, folder: Path, name: str) -> None:
        model = onnx.load(folder / name, load_external_data=False)
        onnx.checker.check_model(str(folder / name), full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
        newer = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "NonZero", "If", "Loop"}
        assert not newer & {node.op_type for node in model.graph.node}

    def test_every_int4_weight_is_one_that_tensorrt_takes(self, folder: Path) -> None:
        graph = onnx.load(folder / spec.DECODER_GRAPH, load_external_data=False).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        config = Bundle.open(folder).manifest.model.decoder
        assert len(nodes) == 9 * config.num_hidden_layers
        for node in nodes:
            codes, scales = (tensors[name] for name in node.input)  # so there is no zero point
            assert codes.data_type == onnx.TensorProto.INT4
            assert scales.data_type == onnx.TensorProto.FLOAT16
            assert [-(-codes.dims[0] // 128), codes.dims[1]] == list(scales.dims)
        types = Counter(tensor.data_type for tensor in graph.initializer)
        assert set(types) <= {onnx.TensorProto.INT4, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64, 1}

    def test_the_manifest_says_so(self, folder: Path) -> None:
        manifest = Bundle.open(folder).manifest
        assert (manifest.dialect, manifest.activations, list(manifest.kv_cache)) == ("onnx", "fp16", ["fp16"])
        assert (manifest.weights.vision, manifest.weights.head) == ("fp16", "fp16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dialect": "onnx", "weights": "int8"}, "int4, fp16 or fp32"),
        ({"dialect": "onnx", "vision": "int8"}, "int8"),
        ({"activations": "fp16", "weights": "fp32"}, "fp32 weights need fp32 activations"),
        ({"activations": "fp16", "vision": "int8"}, "--vision fp16"),
        ({"activations": "bf16"}, "fp32, fp16"),
        ({"dialect": "tflite"}, "ort, onnx"),
    ],
)
def test_settings_that_do_not_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig(tmp_path, tmp_path / "b", **settings)


def test_group_sizes_follow_the_weights(tmp_path: Path) -> None:
    settings = ExportConfig(tmp_path, tmp_path / "b", dialect="onnx").quant
    assert settings is not None
    assert replace(settings, signed_scales=True) != settings
    assert settings.scale_dtype == "fp16"
