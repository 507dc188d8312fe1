"""Writing checkpoints in the GPTQ layout, and exporting them again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import MakeCheckpoint, edit_json
from gptq_files import bundle_weight, tensors_of
from safetensors.torch import load_file, save_file

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.cli.commands import cli
from owl2.export.config import ExportConfig
from owl2.export.gptq_checkpoint import GptqWriter, export_gptq
from owl2.export.job.contents import mark
from owl2.export.pipeline import export_bundle
from owl2.export.report import Report
from owl2.quant.config import QuantConfig
from owl2.quant.grid import rtn
from owl2.quant.layer import LINEARS
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import CheckpointError, ConfigError, ExportError, QuantizationError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(a1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Golden a1 in the GPTQ layout."""
    folder = tmp_path_factory.mktemp("gptq") / "written"
    return folder, export_gptq(ExportConfig(a1, folder, group_size=16, samples=24, layout="gptq"))


class TestWriting:
    def test_files(self, written: tuple[Path, Report], a1: Path) -> None:
        folder, report = written
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = tensors_of(folder)
        assert [shard.name for shard in shards] == [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
        assert set(index["weight_map"]) == set(tensors)
        for name, file in index["weight_map"].items():
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 3
            assert file == shards[layer].name
            assert name in load_file(folder / file)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
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
            for name in (name for name in tensors if name in before):
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

    @pytest.mark.parametrize(
        "name",
        [
            "model.norm.weight",
            "lm_head.weight",
            "model.visual_abstractor.vit_eos",
            "model.layers.2.input_layernorm.multiway.1.weight",
        ],
    )
    def test_values_beyond_fp16_are_refused_before_anything_is_quantized(
        self, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        folder = make_checkpoint()
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[5] = 1e5
        save_file(tensors, folder / "model.safetensors")
        config = ExportConfig(folder, tmp_path / "written", group_size=16, method="rtn", layout="gptq")
        monkeypatch.setattr("owl2.export.gptq_checkpoint.export_layers", lambda *_: 1 / 0)
        message = rf"{name} holds values up to 1e\+05, and fp16, .*; write a bundle instead, .* \(--layout bundle "
        with pytest.raises(ExportError, match=message):
            export_gptq(config)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]

    def test_padding_without_a_row_is_left_out(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        folder = make_checkpoint()
        rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        edit_json(folder / "special_tokens_map.json", pad_token="[PAD]")
        (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": rows}))
        fast = {"added_tokens": [{"id": rows, "content": "[PAD]", "special": True}]}
        (folder / "tokenizer.json").write_text(json.dumps(fast))
        export_gptq(ExportConfig(folder, tmp_path / "written", group_size=16, method="rtn", layout="gptq"))
        with Checkpoint(folder) as before, Checkpoint(tmp_path / "written") as after:
            assert any("'[PAD]'" in note and "it is left out" in note for note in before.notes)
            assert after.notes == ()
            assert after.tokenizer.tokenizer.vocab_size == before.tokenizer.tokenizer.vocab_size == rows

    def test_all_names_of_the_type_say_fp16(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        nested = {"dtype": "bfloat16", "torch_dtype": None}
        folder = make_checkpoint({"dtype": "bfloat16", "text_config": nested})
        export_gptq(ExportConfig(folder, tmp_path / "written", group_size=16, method="rtn", layout="gptq"))
        config = json.loads((tmp_path / "written" / "config.json").read_text())
        assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
        assert config["text_config"] == {"dtype": "float16", "torch_dtype": None}

    def test_shapes_that_do_not_fill_words(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        folder = make_checkpoint({"intermediate_size": 100})
        config = ExportConfig(folder, tmp_path / "written", group_size=16, method="rtn", layout="gptq")
        with pytest.raises(ConfigError, match="intermediate_size 100 is not a multiple of 8"):
            export_gptq(config)

    def test_targets(self, written: tuple[Path, Report], a1: Path, tmp_path: Path) -> None:
        """An existing folder stays, unless it was written here and --overwrite is given."""
        folder = tmp_path / "written"
        shutil.copytree(written[0], folder)
        config = ExportConfig(a1, folder, group_size=16, method="rtn", layout="gptq")
        with pytest.raises(ExportError, match="give --overwrite"):
            export_gptq(config)
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(ExportError, match=r"holds model\.safetensors, which no export wrote"):
            export_gptq(replace(config, overwrite=True))
        (folder / "model.safetensors").unlink()
        edit_json(folder / "model.safetensors.index.json", metadata={})
        export_gptq(replace(config, overwrite=True))
        assert json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]
        (folder / "report.json").unlink()
        with pytest.raises(ExportError, match="left alone"):
            export_gptq(replace(config, overwrite=True))

    def test_a_tensor_that_is_forgotten(self, a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = GptqWriter.layer
        monkeypatch.setattr(GptqWriter, "layer", lambda writer, linears, gains: original(writer, linears, {}))
        with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.input_layernorm\.multiway\.0\.weight"):
            export_gptq(ExportConfig(a1, tmp_path / "written", group_size=16, method="rtn", layout="gptq"))


class TestCommand:
    """Options that are not given are those of the file."""

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="owl2-export")

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
        mark(journal.parent)
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
