"""Quantized checkpoints are kept exactly; tests/export/gptqmodel was recorded from GPTQModel itself."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, MakeCheckpoint
from gptq_files import bundle_weight
from safetensors.torch import load_file, save_file
from torch import Tensor

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.modules import load_layer
from owl2.export.config import ExportConfig
from owl2.export.gptq_checkpoint import export_gptq
from owl2.export.pipeline import export_bundle
from owl2.quant.layer import LINEARS
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import CheckpointError, ConfigError

RECORDED = ROOT / "tests" / "export" / "gptqmodel"
VARIANTS = ("int4_g16_sym_v1", "int4_g16_sym_v1_act", "int4_g16_asym_v1_act", "int4_g16_asym_v2")
Q_PROJ = "model.layers.0.self_attn.q_proj"
IMAGE_K = "model.layers.0.self_attn.k_proj.multiway.1"


def with_quantized(official: Path, folder: Path, tensors: Mapping[str, Tensor], settings: dict[str, object]) -> Path:
    """The official checkpoint with some of its linear layers replaced by quantized ones."""
    replaced = {name.rsplit(".", 1)[0] for name in tensors}
    stored = {name: value for file in official.glob("*.bin") for name, value in torch.load(file).items()}
    kept = {name: value for name, value in stored.items() if name.removesuffix(".weight") not in replaced}
    folder.mkdir()
    for path in official.iterdir():
        if path.suffix in (".json", ".model") and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((official / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    save_file({name: value.contiguous() for name, value in {**kept, **tensors}.items()}, folder / "model.safetensors")
    return folder


def recorded(variant: str) -> tuple[dict[str, Tensor], Tensor, dict[str, object]]:
    tensors = load_file(RECORDED / variant / "layer.safetensors")
    dequantized = tensors.pop(f"{Q_PROJ}.dequantized")
    return tensors, dequantized, json.loads((RECORDED / variant / "quantize_config.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_equal_those_of_gptqmodel(a1: Path, tmp_path: Path, variant: str) -> None:
    tensors, dequantized, settings = recorded(variant)
    with Checkpoint(with_quantized(a1, tmp_path / "mixed", tensors, settings)) as checkpoint:
        assert checkpoint.quantized == {Q_PROJ, IMAGE_K}
        weight = checkpoint.quantized_weight(Q_PROJ)
        assert torch.equal(weight.dequantize().half(), dequantized)
        layer, integers = load_layer(checkpoint, 0, "cpu")
        assert {f"model.layers.0.{name}" for name in integers} == checkpoint.quantized
        assert torch.equal(layer.self_attn.q_proj.weight, weight.dequantize())
        assert (weight.columns is not None) == variant.endswith("_act")
        assert (weight.zero_points is None) == ("asym" not in variant)
        scales = tensors[f"{Q_PROJ}.scales"].float().T
        assert torch.equal(weight.scales, scales)


@pytest.mark.slow
def test_a_bundle_keeps_them_and_quantizes_the_rest(a1: Path, tmp_path: Path) -> None:
    tensors, _, settings = recorded("int4_g16_asym_v1_act")
    folder = with_quantized(a1, tmp_path / "mixed", tensors, settings)
    report = export_bundle(ExportConfig(folder, tmp_path / "bundle", group_size=16, samples=24))
    with Checkpoint(folder) as checkpoint:
        for name in (Q_PROJ, IMAGE_K):
            weight = checkpoint.quantized_weight(name)
            assert weight.columns is not None
            assert weight.zero_points is not None
            codes, scales, zeros = bundle_weight(tmp_path / "bundle", name.removeprefix("model."), 64)
            assert zeros is not None
            np.testing.assert_array_equal(codes, weight.codes.numpy())
            np.testing.assert_array_equal(scales, weight.scales.numpy())
            unpacked = reference.unpack_nbits(zeros.reshape(64, -1), 4, 4)
            np.testing.assert_array_equal(unpacked, weight.zero_points.numpy())
    assert report.parity[1].exact < 1e-4
    source = report.recipe["source"]
    assert source["quantizer"] == "gptqmodel:7.7.0"
    assert source["kept"] == 2
    assert len(source["quantized_here"]) == 3 * len(LINEARS) - 2
    assert set(report.modules) == {name.removeprefix("model.") for name in source["quantized_here"]}
    assert Bundle.open(tmp_path / "bundle").manifest.weights.method == "gptq checkpoint"


def test_settings_that_contradict_the_file(a1: Path, tmp_path: Path) -> None:
    tensors, _, settings = recorded("int4_g16_sym_v1")
    folder = with_quantized(a1, tmp_path / "mixed", tensors, settings)
    config = ExportConfig(folder, tmp_path / "bundle", group_size=16)
    with pytest.raises(ConfigError, match=r"weights int8 were asked for, but .* holds int4"):
        export_bundle(replace(config, weights="int8"))
    with pytest.raises(ConfigError, match=r"group size 64 was asked for, but .* has groups of 16"):
        export_bundle(replace(config, group_size=64))
    with pytest.raises(ConfigError, match="GPTQ layout already"):
        export_gptq(replace(config, layout="gptq"))


def test_tensors_and_settings_that_do_not_belong_together(a1: Path, tmp_path: Path) -> None:
    tensors, _, settings = recorded("int4_g16_sym_v1")
    folder = with_quantized(a1, tmp_path / "mixed", tensors, settings)
    config = json.loads((folder / "config.json").read_text())

    def reopen(changed: dict[str, object] | None) -> None:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
        Checkpoint(folder)

    with pytest.raises(CheckpointError, match=r"2 layers are quantized, but neither config.json nor"):
        reopen(None)
    with pytest.raises(CheckpointError, match=r"misshaped .*q_proj.qweight: \[8, 64\], expected \[16, 64\]"):
        reopen(settings | {"bits": 8})
    with pytest.raises(CheckpointError, match=r"misshaped .*q_proj.scales: \[4, 64\], expected \[1, 64\]"):
        reopen(settings | {"group_size": 64})
    whole = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in whole.items() if n != f"{Q_PROJ}.qzeros"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*q_proj.qzeros"):
        reopen(settings)


def test_a_checkpoint_that_only_claims_to_be_quantized(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint({"quantization_config": {"bits": 4, "group_size": 32, "quant_method": "gptq"}})
    with pytest.raises(CheckpointError, match="describe a quantized checkpoint, but no layer"):
        Checkpoint(folder)


def test_the_zero_biases_and_the_file_name_of_old_programs(a1: Path, tmp_path: Path) -> None:
    tensors, dequantized, settings = recorded("int4_g16_sym_v1")
    tensors[f"{Q_PROJ}.bias"] = torch.zeros(64, dtype=torch.float16)
    folder = with_quantized(a1, tmp_path / "mixed", tensors, settings)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-16g.safetensors")
    with Checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.quantized_weight(Q_PROJ).dequantize().half(), dequantized)
    tensors[f"{Q_PROJ}.bias"][3] = 1
    with (
        Checkpoint(with_quantized(a1, tmp_path / "biased", tensors, settings)) as checkpoint,
        pytest.raises(CheckpointError, match=r"q_proj.bias is not zero, but config.json describes a model without"),
    ):
        checkpoint.quantized_weight(Q_PROJ)
