"""The GPTQ layout: packing against a slow reference, and what is refused."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from owl2.export.checkpoint.gptq_format import GptqFormat, read_format
from owl2.export.checkpoint.gptq_layout import GptqTensors, pack, pack_words, unpack, unpack_words
from owl2.quant.config import QuantConfig
from owl2.quant.grid import QuantizedWeight, rtn
from owl2.runtime.errors import CheckpointError, QuantizationError

ROWS, WIDTH = 24, 80  # five groups of 16
GPTQMODEL = "gptqmodel:7.7.0"


def slow_words(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Number by number, with Python's integers."""
    packed = 32 // bits
    words = np.zeros((len(values) // packed, values.shape[1]), dtype=np.int64)
    for row, column in np.ndindex(values.shape):
        words[row // packed, column] |= int(values[row, column]) << (bits * (row % packed))
    return words.astype(np.uint32).view(np.int32)


def slow_weight(
    codes: NDArray[np.uint8], zeros: NDArray[np.uint8], scales: torch.Tensor, g_idx: list[int]
) -> torch.Tensor:
    """[N, K] from unsigned codes [K, N], zero points [G, N] and scales [G, N], number by number."""
    weight = torch.empty(codes.shape[1], codes.shape[0])
    for column, row in np.ndindex(codes.shape):
        group = g_idx[column]
        difference = int(codes[column, row]) - int(zeros[group, row])
        weight[row, column] = difference * float(scales[group, row])
    return weight


def made(
    bits: int, g_idx: list[int], version: Literal[1, 2], *, symmetric: bool = False
) -> tuple[GptqTensors, torch.Tensor]:
    """Random tensors of a layer and the weight they stand for."""
    numbers = np.random.default_rng(bits + version)
    groups = max(g_idx) + 1
    codes = numbers.integers(0, 2**bits, (WIDTH, ROWS), dtype=np.uint8)
    zeros = numbers.integers(1, 2**bits, (groups, ROWS), dtype=np.uint8)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = torch.from_numpy(numbers.uniform(0.01, 0.1, (groups, ROWS))).half()
    stored = zeros - 1 if version == 1 else zeros
    tensors = GptqTensors(
        qweight=torch.from_numpy(slow_words(codes, bits)),
        qzeros=torch.from_numpy(slow_words(stored.T, bits).T.copy()),
        scales=scales,
        g_idx=torch.tensor(g_idx, dtype=torch.int32),
    )
    return tensors, slow_weight(codes, zeros, scales, g_idx)


SEQUENTIAL = [i // 16 for i in range(WIDTH)]
SWAPPED = [(3 - i // 16) % 5 for i in range(WIDTH)]
SCATTERED = np.random.default_rng(5).permutation(SEQUENTIAL).tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_words(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (64, 5), dtype=np.uint8)
    words = pack_words(values, bits)
    np.testing.assert_array_equal(words, slow_words(values, bits))
    np.testing.assert_array_equal(unpack_words(words, bits), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("g_idx", [SEQUENTIAL, SWAPPED, SCATTERED], ids=["sequential", "swapped", "scattered"])
def test_unpacking_equals_the_slow_reference(
    bits: int, version: Literal[1, 2], symmetric: bool, g_idx: list[int]
) -> None:
    tensors, expected = made(bits, g_idx, version, symmetric=symmetric)
    form = GptqFormat(bits, 16, symmetric=symmetric, version=version)
    weight = unpack(tensors, form, "layer")
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)
    assert (weight.columns is not None) == (g_idx is SCATTERED)
    assert (weight.zero_points is None) == symmetric


def test_a_group_of_a_whole_row_and_long_groups_are_cut_into_blocks() -> None:
    tensors, expected = made(4, [0] * WIDTH, 1)
    weight = unpack(tensors, GptqFormat(4, -1, symmetric=False), "layer")
    assert weight.columns is None
    assert weight.group_size == 128
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)

    tensors, expected = made(4, [i // 48 for i in range(WIDTH)], 2)
    weight = unpack(tensors, GptqFormat(4, 48, symmetric=False, version=2), "layer")
    assert weight.columns is None
    assert weight.group_size == 16
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)


def test_no_index_means_sequential() -> None:
    tensors, expected = made(4, SEQUENTIAL, 1)
    without = GptqTensors(tensors.qweight, tensors.qzeros, tensors.scales, None)
    weight = unpack(without, GptqFormat(4, 16, symmetric=False), "layer")
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        ([0] * 17 + SEQUENTIAL[17:], r"got groups with \[17, 15, 16, 16, 16\] columns"),
        ([*SEQUENTIAL[:-1], 5], "got groups 0 to 5"),
        ([-1, *SEQUENTIAL[1:]], "got groups -1 to 4"),
    ],
)
def test_a_malformed_index_is_refused(g_idx: list[int], message: str) -> None:
    tensors, _ = made(4, SEQUENTIAL, 1)
    broken = GptqTensors(tensors.qweight, tensors.qzeros, tensors.scales, torch.tensor(g_idx, dtype=torch.int32))
    with pytest.raises(CheckpointError, match=f"layer: g_idx is malformed.*{message}"):
        unpack(broken, GptqFormat(4, 16, symmetric=False), "layer")


class TestZeroPoints:
    def wrapped(self) -> tuple[GptqTensors, torch.Tensor]:
        """Version 1 with zero points of 0, as GPTQModel writes them: one subtraction from the word."""
        tensors, _ = made(4, SEQUENTIAL, 2)
        zeros = np.random.default_rng(0).integers(0, 4, (5, ROWS), dtype=np.uint8)
        words = slow_words(zeros.T, 4).T.astype(np.int64) - 0x11111111
        packed = torch.from_numpy((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32).copy())
        codes = unpack_words(tensors.qweight.numpy(), 4)
        expected = slow_weight(codes, zeros, tensors.scales, SEQUENTIAL)
        return GptqTensors(tensors.qweight, packed, tensors.scales, None), expected

    def test_a_borrow_is_undone_as_gptqmodel_does_it(self) -> None:
        tensors, expected = self.wrapped()
        weight = unpack(tensors, GptqFormat(4, 16, symmetric=False, producer=GPTQMODEL), "layer")
        torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)

    def test_nobody_knows_what_other_programs_meant(self) -> None:
        tensors, _ = self.wrapped()
        with pytest.raises(CheckpointError, match="programs disagree"):
            unpack(tensors, GptqFormat(4, 16, symmetric=False, producer="auto_gptq:0.7.1"), "layer")

    def test_a_version_that_does_not_fit_is_noticed(self) -> None:
        tensors, _ = made(4, SEQUENTIAL, 1, symmetric=True)
        with pytest.raises(CheckpointError, match="zero points from 7 to 7 in a checkpoint that says sym"):
            unpack(tensors, GptqFormat(4, 16, version=2), "layer")


def test_scales_that_are_not_finite_are_refused() -> None:
    tensors, _ = made(4, SEQUENTIAL, 1)
    tensors.scales[2, 3] = float("nan")
    with pytest.raises(CheckpointError, match="scales are NaN"):
        unpack(tensors, GptqFormat(4, 16, symmetric=False), "layer")


class TestWriting:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("version", [1, 2])
    def test_what_is_written_is_read_back(self, bits: int, version: Literal[1, 2]) -> None:
        torch.manual_seed(bits)
        weight = rtn(torch.randn(ROWS, 200), QuantConfig(bits=bits, group_size=32, method="rtn", scale_dtype="fp16"))
        form = GptqFormat(bits, 32, version=version)
        tensors = pack(weight, form)
        for suffix, (shape, dtypes) in GptqTensors.shapes(ROWS, 200, form).items():
            tensor = getattr(tensors, suffix)
            assert tuple(tensor.shape) == shape
            assert str(tensor.dtype).removeprefix("torch.") in dtypes
        again = unpack(tensors, form, "layer")
        assert again.columns is None
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scales, weight.scales)
        assert again.zero_points is None
        zeros = slow_words(np.full((ROWS, 7), 2 ** (bits - 1) - (version == 1), dtype=np.uint8), bits).T
        np.testing.assert_array_equal(tensors.qzeros.numpy(), zeros)

    @pytest.mark.parametrize(
        "weight",
        [
            rtn(torch.linspace(-1, 1, 8 * 32).view(8, 32), QuantConfig(group_size=32, method="rtn")),
            QuantizedWeight(torch.zeros(8, 32, dtype=torch.int8), -torch.ones(8, 1), 4, 32),
            QuantizedWeight(
                torch.zeros(8, 32, dtype=torch.int8), torch.ones(8, 1), 4, 32, torch.ones(8, 1, dtype=torch.int8)
            ),
            QuantizedWeight(
                torch.zeros(8, 32, dtype=torch.int8), torch.ones(8, 1), 4, 32, columns=torch.arange(32).flip(0)
            ),
        ],
        ids=["float32 scales", "negative scales", "zero points", "columns"],
    )
    def test_what_the_layout_does_not_hold_is_refused(self, weight: QuantizedWeight) -> None:
        with pytest.raises(QuantizationError, match="symmetric weights whose scales are positive and exact in fp16"):
            pack(weight, GptqFormat(4, 32))

    def test_shapes_that_do_not_fill_words_are_refused(self) -> None:
        weight = QuantizedWeight(torch.zeros(12, 32, dtype=torch.int8), torch.ones(12, 1), 4, 32)
        with pytest.raises(QuantizationError, match="12x32 does not fill words of 8"):
            pack(weight, GptqFormat(4, 32))


class TestSettings:
    def read(self, folder: Path, config: dict[str, Any] | None, own: dict[str, Any] | None = None) -> GptqFormat | None:
        if own is not None:
            (folder / "quantize_config.json").write_text(json.dumps(own))
        return read_format(folder, {} if config is None else {"quantization_config": config})

    def test_a_checkpoint_that_is_not_quantized(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, None) is None

    def test_what_auto_gptq_wrote(self, tmp_path: Path) -> None:
        """Before formats had names, in a file of its own."""
        own: dict[str, Any] = {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.01,
            "desc_act": False,
            "sym": True,
            "true_sequential": True,
        }
        own |= {"model_name_or_path": None, "model_file_base_name": None}
        assert self.read(tmp_path, None, own) == GptqFormat(4, 128)

    def test_both_files_and_other_spellings(self, tmp_path: Path) -> None:
        config = {
            "w_bit": 8,
            "q_group_size": -1,
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "desc_act": True,
        }
        own = {"bits": 8, "group_size": -1, "method": "gptq", "format": "gptq_v2", "sym": False}
        own["meta"] = {"quantizer": [GPTQMODEL]}
        expected = GptqFormat(8, -1, desc_act=True, symmetric=False, version=2, producer=GPTQMODEL)
        assert self.read(tmp_path, config, own) == expected

    def test_what_is_written_is_read_back(self, tmp_path: Path) -> None:
        form = GptqFormat(4, 64, producer="owl2:1")
        assert self.read(tmp_path, form.to_json(), form.to_json()) == form

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"bits": 3}, r"bits is 3; only \(4, 8\)"),
            ({"bits": "4"}, "bits must be an integer, got '4'"),
            ({"bits": True}, "bits must be an integer, got True"),
            ({"bits": None}, "bits must be an integer, got None"),
            ({"group_size": None}, "group_size must be an integer"),
            ({"group_size": 24}, "group_size is 24"),
            ({"group_size": 0}, "group_size is 0"),
            ({"quant_method": "awq"}, "quantized as awq, format gptq.*Export the original checkpoint"),
            ({"checkpoint_format": "marlin"}, "quantized as gptq, format marlin"),
            ({"is_marlin_format": True}, "only gptq in the formats gptq and gptq_v2"),
            ({"quant_method": "bitsandbytes"}, "quantized as bitsandbytes"),
            ({"lm_head": True}, "output head is quantized too"),
            ({"pack_dtype": "int16"}, "packed in int16"),
            ({"dynamic": {"-:.*vision.*": {}, "+:.*down.*": {"bits": 8}}}, "settings of their own .*down"),
            ({"adapter": {"name": "lora"}}, "adapter is used"),
            ({"rotation": "hadamard"}, "rotation is used"),
            ({"sym": "yes"}, "sym must be true or false"),
        ],
    )
    def test_what_is_not_supported(self, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
        good = {"bits": 4, "group_size": 128, "dynamic": {"-:.*vision.*": {}}}
        assert self.read(tmp_path, good) is not None
        with pytest.raises(CheckpointError, match=message):
            self.read(tmp_path, good | changed)

    def test_files_that_disagree(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="group_size is 128 in one place and 64 in quantize_config"):
            self.read(tmp_path, {"bits": 4, "group_size": 128}, {"bits": 4, "group_size": 64})
        with pytest.raises(CheckpointError, match="bits is 4 in one place and 8 in config"):
            self.read(tmp_path, {"bits": 4, "w_bit": 8, "group_size": 128})
        good = {"bits": 4, "group_size": 128}
        with pytest.raises(CheckpointError, match="desc_act is True in one place and False in quantize_config"):
            self.read(tmp_path, good | {"desc_act": True}, good | {"desc_act": False})

    def test_damaged_files(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="must be a JSON object"):
            read_format(tmp_path, {"quantization_config": [4]})
        (tmp_path / "quantize_config.json").write_text("{")
        with pytest.raises(CheckpointError, match="it is not JSON"):
            read_format(tmp_path, {})
