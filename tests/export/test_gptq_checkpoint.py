"""Checkpoints in the GPTQ layout, both ways; tests/export/gptqmodel was recorded from GPTQModel itself."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import reference
import torch
from click.testing import CliRunner, Result
from conftest import MakeCheckpoint
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from owl2.export import gptq_checkpoint
from owl2.export.__main__ import export
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.gptq_checkpoint import export_gptq
from owl2.export.pipeline import export_bundle
from owl2.export.report import Report
from owl2.quant.config import QuantConfig
from owl2.quant.grid import rtn
from owl2.quant.layer import LINEARS
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import CheckpointError, ConfigError, ExportError, QuantizationError

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).parent / "gptqmodel"
VARIANTS = ("int4_g16_sym_v1", "int4_g16_sym_v1_act", "int4_g16_asym_v1_act", "int4_g16_asym_v2")
Q_PROJ = "model.layers.0.self_attn.q_proj"
IMAGE_K = "model.layers.0.self_attn.k_proj.multiway.1"


@pytest.fixture(scope="module")
def a1(golden: Path) -> Path:
    return golden / "a1_base_bin" / "model"


@pytest.fixture(scope="module")
def written(a1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Golden a1 in the GPTQ layout, in several files."""
    folder = tmp_path_factory.mktemp("gptq") / "written"
    config = ExportConfig(a1, folder, group_size=16, samples=24, layout="gptq")
    return folder, export_gptq(config, shard_bytes=200_000)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def with_quantized(official: Path, folder: Path, tensors: Mapping[str, Tensor], settings: dict[str, object]) -> Path:
    """The official checkpoint with some of its linear layers replaced by quantized ones."""
    replaced = {name.rsplit(".", 1)[0] for name in tensors}
    with Checkpoint(official) as checkpoint:
        kept = {
            name: checkpoint.tensor(name)
            for name in checkpoint._weight_map
            if name.removesuffix(".weight") not in replaced
        }
    folder.mkdir()
    for path in official.iterdir():
        if path.suffix in (".json", ".model") and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((official / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    save_file({name: value.contiguous() for name, value in {**kept, **tensors}.items()}, folder / "model.safetensors")
    return folder


def bundle_weight(bundle: Path, name: str, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes [N, K], scales [N, G] and packed zero points of a linear layer in the decoder graph."""
    model = onnx.load(bundle / "decoder.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    packed, scales = (numpy_helper.to_array(stored[f"{name}.{part}"]) for part in ("codes", "scales"))
    zeros = stored.get(f"{name}.zero_points")
    return (
        reference.unpack_nbits(packed, 4, width),
        scales,
        None if zeros is None else numpy_helper.to_array(zeros),
    )


def recorded(variant: str) -> tuple[dict[str, Tensor], Tensor, dict[str, object]]:
    tensors = load_file(RECORDED / variant / "layer.safetensors")
    dequantized = tensors.pop(f"{Q_PROJ}.dequantized")
    return tensors, dequantized, json.loads((RECORDED / variant / "quantize_config.json").read_text())


class TestReading:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_weights_equal_those_of_gptqmodel(self, a1: Path, tmp_path: Path, variant: str) -> None:
        tensors, dequantized, settings = recorded(variant)
        with Checkpoint(with_quantized(a1, tmp_path / "mixed", tensors, settings)) as checkpoint:
            assert checkpoint.quantized == {Q_PROJ, IMAGE_K}
            weight = checkpoint.quantized_weight(Q_PROJ)
            assert torch.equal(weight.dequantize().half(), dequantized)
            assert torch.equal(checkpoint.tensor(f"{Q_PROJ}.weight"), weight.dequantize())
            assert (weight.columns is not None) == variant.endswith("_act")
            assert (weight.zero_points is None) == ("asym" not in variant)
            scales = tensors[f"{Q_PROJ}.scales"].float().T
            assert torch.equal(weight.scales, scales)

    def test_a_bundle_keeps_them_and_quantizes_the_rest(self, a1: Path, tmp_path: Path) -> None:
        tensors, _, settings = recorded("int4_g16_asym_v1_act")
        folder = with_quantized(a1, tmp_path / "mixed", tensors, settings)
        report = export_bundle(ExportConfig(folder, tmp_path / "bundle", group_size=16, samples=24))
        with Checkpoint(folder) as checkpoint:
            for name in (Q_PROJ, IMAGE_K):
                weight = checkpoint.quantized_weight(name)
                assert weight.columns is not None
                assert weight.zero_points is not None
                codes, scales, zeros = bundle_weight(tmp_path / "bundle", name.removeprefix("model."), 64)
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

    def test_settings_that_contradict_the_file(self, written: tuple[Path, Report], tmp_path: Path) -> None:
        config = ExportConfig(written[0], tmp_path / "bundle", group_size=16)
        with pytest.raises(ConfigError, match=r"weights int8 were asked for, but .* holds int4"):
            export_bundle(replace(config, weights="int8"))
        with pytest.raises(ConfigError, match=r"group size 64 was asked for, but .* has groups of 16"):
            export_bundle(replace(config, group_size=64))
        with pytest.raises(ConfigError, match="GPTQ layout already"):
            export_gptq(replace(config, layout="gptq"))

    def test_tensors_and_settings_that_do_not_belong_together(self, a1: Path, tmp_path: Path) -> None:
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

    def test_a_checkpoint_that_only_claims_to_be_quantized(self, make_checkpoint: MakeCheckpoint) -> None:
        folder = make_checkpoint({"quantization_config": {"bits": 4, "group_size": 32, "quant_method": "gptq"}})
        with pytest.raises(CheckpointError, match="said to be quantized, but no layer"):
            Checkpoint(folder)

    def test_the_zero_biases_and_the_file_name_of_old_programs(self, a1: Path, tmp_path: Path) -> None:
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


class TestWriting:
    def test_files(self, written: tuple[Path, Report], a1: Path) -> None:
        folder, report = written
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = tensors_of(folder)
        assert len(shards) > 2
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
        assert all(sum(t.nbytes for t in load_file(shard).values()) <= 200_000 for shard in shards)
        assert {str(value.dtype) for value in tensors.values()} == {"torch.int32", "torch.float16"}
        config = json.loads((folder / "config.json").read_text())
        own = json.loads((folder / "quantize_config.json").read_text())
        assert config["quantization_config"] == own
        assert (own["bits"], own["group_size"], own["desc_act"], own["sym"]) == (4, 16, False, True)
        assert config["model_type"] == "mplug_owl2"
        for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
            assert (folder / name).read_bytes() == (a1 / name).read_bytes()
        assert report.accuracy.positions > 100
        assert report.accuracy.kl_text > 0
        assert set(report.modules) == {f"layers.{i}.{name}" for i in range(3) for name in LINEARS}
        assert all(module.error < module.rtn_error for module in report.modules.values())

    def test_dense_tensors_are_those_of_the_checkpoint(self, written: tuple[Path, Report], a1: Path) -> None:
        tensors = tensors_of(written[0])
        with Checkpoint(a1) as before, Checkpoint(written[0]) as after:
            assert len(after.quantized) == 3 * len(LINEARS)
            for name in set(before._weight_map) & set(tensors):
                assert torch.equal(tensors[name], before.tensor(name).half()), name

    def test_the_bundle_of_it_has_the_same_integers(self, written: tuple[Path, Report], tmp_path: Path) -> None:
        report = export_bundle(ExportConfig(written[0], tmp_path / "bundle", group_size=16, samples=24))
        with Checkpoint(written[0]) as checkpoint:
            for name in sorted(checkpoint.quantized):
                weight = checkpoint.quantized_weight(name)
                assert weight.columns is None
                width = weight.codes.shape[1]
                codes, scales, zeros = bundle_weight(tmp_path / "bundle", name.removeprefix("model."), width)
                np.testing.assert_array_equal(codes, weight.codes.numpy())
                np.testing.assert_array_equal(scales, weight.scales.numpy())
                assert zeros is None
        assert report.modules == {}
        assert report.calibration.source == "none"
        assert report.recipe["quant"] is None
        assert report.parity[1].exact < 1e-4
        # Nothing of the decoder's layers changes any more: what is left are head and vision side in int8.
        assert report.accuracy.kl_text < written[1].accuracy.kl_text

    def test_values_beyond_fp16(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        folder = make_checkpoint()
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][5] = 1e5
        save_file(tensors, folder / "model.safetensors")
        config = ExportConfig(folder, tmp_path / "written", group_size=16, method="rtn", layout="gptq")
        with pytest.raises(ExportError, match=r"model.norm.weight holds values up to 1e\+05; fp16"):
            export_gptq(config)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]

    def test_shapes_that_do_not_fill_words(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        folder = make_checkpoint({"intermediate_size": 100})
        config = ExportConfig(folder, tmp_path / "written", group_size=16, method="rtn", layout="gptq")
        with pytest.raises(ConfigError, match="intermediate_size 100 is no multiple of 8"):
            export_gptq(config)

    def test_targets(self, written: tuple[Path, Report], a1: Path, tmp_path: Path) -> None:
        """What is there stays, unless it was written here and --overwrite is given."""
        folder = tmp_path / "written"
        shutil.copytree(written[0], folder)
        config = ExportConfig(a1, folder, group_size=16, method="rtn", layout="gptq")
        with pytest.raises(ExportError, match="give --overwrite"):
            export_gptq(config)
        export_gptq(replace(config, overwrite=True))
        assert not (folder / "model.safetensors.index.json").exists()
        (folder / "report.json").unlink()
        with pytest.raises(ExportError, match="left alone"):
            export_gptq(replace(config, overwrite=True))

    def test_float_weights_have_no_such_layout(self, a1: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="layout gptq has integer weights"):
            ExportConfig(a1, tmp_path / "written", weights="fp16", layout="gptq")
        with pytest.raises(ConfigError, match=r"layout gptq .* vision int8"):
            ExportConfig(a1, tmp_path / "written", vision="int8", layout="gptq")

    def test_a_tensor_that_is_forgotten(self, a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gptq_checkpoint.GptqWriter, "finish", lambda writer, norm, head: writer._file.finish())
        with pytest.raises(ExportError, match=r"tensors were not written: model.embed_tokens.weight"):
            export_gptq(ExportConfig(a1, tmp_path / "written", group_size=16, method="rtn", layout="gptq"))


class TestCommand:
    """Options that are not given are those of the file."""

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(export, [str(argument) for argument in arguments], prog_name="owl2-export")

    def test_there_and_back(self, a1: Path, tmp_path: Path) -> None:
        folder, bundle = tmp_path / "written", tmp_path / "bundle"
        options = ("--weights", "int8", "--group-size", "32", "--method", "rtn")
        result = self.run(a1, folder, "--layout", "gptq", *options)
        assert result.exit_code == 0, result.output
        assert f"{folder}: " in result.output
        result = self.run(folder, bundle, "--group-size", "64")
        assert result.exit_code == 1
        assert "has groups of 32, stored in a bundle as 32; leave --group-size out" in result.output
        result = self.run(folder, bundle)
        assert result.exit_code == 0, result.output
        assert "source: GPTQ checkpoint by owl2:" in result.output
        assert "27 linear layers kept" in result.output
        weights = Bundle.open(bundle).manifest.weights
        assert (weights.decoder, weights.group_size, weights.method) == ("int8", 32, "gptq checkpoint")

    @pytest.mark.parametrize("layout", ["bundle", "gptq"])
    def test_a_checkpoint_is_never_replaced_by_what_is_made_of_it(
        self, written: tuple[Path, Report], tmp_path: Path, layout: str
    ) -> None:
        folder = shutil.copytree(written[0], tmp_path / "checkpoint")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        (tmp_path / "link").symlink_to(folder)
        for target in (folder, tmp_path / "link"):
            result = self.run(folder, target, "--layout", layout, "--overwrite")
            assert result.exit_code == 1
            assert "is the checkpoint itself; choose another folder" in result.output
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_an_unfinished_bundle_is_not_thrown_away(self, a1: Path, tmp_path: Path) -> None:
        journal = tmp_path / ".target.partial" / "journal"
        journal.mkdir(parents=True)
        (journal.parent / "bundle").mkdir()
        (journal / "journal.json").write_text("{}")
        options = ("--layout", "gptq", "--group-size", "32", "--method", "rtn")
        result = self.run(a1, tmp_path / "target", *options)
        assert result.exit_code == 1
        assert "holds an unfinished export of a bundle, which would be lost" in result.output
        assert (journal / "journal.json").exists()
        assert self.run(a1, tmp_path / "target", *options, "--fresh").exit_code == 0
        assert not journal.exists()

    def test_biases_are_written_and_read(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        folder, official = tmp_path / "written", make_checkpoint({"attention_bias": True})
        assert self.run(official, folder, "--layout", "gptq", "--group-size", "32", "--method", "rtn").exit_code == 0
        result = self.run(folder, tmp_path / "bundle")
        assert result.exit_code == 0, result.output
        name = "model.layers.1.self_attn.v_proj.multiway.1.bias"
        assert torch.equal(tensors_of(folder)[name], tensors_of(official)[name].half())


class TestScales:
    @pytest.mark.parametrize("clip_search", [True, False])
    def test_they_are_exact_in_fp16_before_anything_is_rounded_by_them(self, clip_search: bool) -> None:
        torch.manual_seed(0)
        weight = torch.randn(32, 96) * 0.02
        config = QuantConfig(group_size=32, method="rtn", clip_search=clip_search, scale_dtype="fp16")
        made = rtn(weight, config)
        assert torch.equal(made.scales.half().float(), made.scales)
        codes = (weight / made.scales.repeat_interleave(32, 1)).round().clamp(-8, 7)
        assert torch.equal(made.codes.float(), codes)
        exact = rtn(weight, replace(config, scale_dtype="fp32"))
        assert not torch.equal(exact.scales.half().float(), exact.scales)

    def test_tiny_and_huge_ones(self) -> None:
        config = QuantConfig(group_size=32, method="rtn", scale_dtype="fp16")
        tiny = rtn(torch.full((1, 32), 1e-9), config)
        assert torch.equal(tiny.scales, torch.ones(1, 1))
        assert not tiny.codes.any()
        with pytest.raises(QuantizationError, match="fp16 does not"):
            rtn(torch.full((1, 32), 1e6), config)
