"""Which preset a checkpoint gets, and how it reaches who scores."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import GOLDEN, MakeCheckpoint, RunCommand, edit_json, edit_manifest

from owl2 import ConfigError, Owl2
from owl2.export.checkpoint.scoring import PRESETS, find_preset
from owl2.export.cli.commands import cli
from owl2.export.config import ExportConfig
from owl2.runtime.bundle import read_manifest
from owl2.runtime.errors import BundleCorruptError
from owl2.runtime.scoring import scale

IMAGES = sorted((GOLDEN / "images").glob("*.png"))


@pytest.mark.parametrize(
    ("folder", "named", "adapter", "expected"),
    [
        ("models--q-future--one-align/snapshots/0123abcd", None, None, "q-align"),
        ("OneAlign", None, None, "q-align"),
        ("q-align-iqa", None, None, "q-align"),
        ("DeQA-Score-Mix3", None, None, "q-align"),
        ("checkpoint", "teowu/mplug_owl2_7b_448_qinstruct_preview_v0.1", None, "q-instruct"),
        ("Compare2Score_1", None, None, "compare2score"),
        ("mplug-owl2-llama2-7b", "MAGAer13/mplug-owl2-llama2-7b", None, ""),
        ("mplug-owl2-llama2-7b", None, "DeQA-Score-LoRA-Mix3", "q-align"),
        ("checkpoint", ["no", "name"], None, ""),
        ("my_q_align_finetune", None, None, "q-align"),
        # Parts of other words, and folders of other things.
        ("code-qa-owl2", None, None, ""),
        ("grade-qa", None, None, ""),
        ("my-decode-qa", None, None, ""),
        ("q-align/checkpoints/mplug-owl2-llama2-7b", None, None, ""),
    ],
)
def test_what_names_tell(tmp_path: Path, folder: str, named: object, adapter: str | None, expected: str) -> None:
    path = None if adapter is None else tmp_path / adapter
    assert find_preset(tmp_path / "home" / folder, {"_name_or_path": named}, path) == expected


def test_all_of_them_exist() -> None:
    assert set(PRESETS.values()) <= set(scale.PRESETS)


def test_the_bundle_names_it_and_scores_use_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, run: RunCommand
) -> None:
    checkpoint = make_checkpoint(top={"num_hidden_layers": 1})
    edit_json(checkpoint / "config.json", _name_or_path="teowu/q-instruct-preview")
    told, chosen = tmp_path / "told", tmp_path / "chosen"
    settings = ["--weights", "fp32"]
    result = CliRunner().invoke(cli, [str(checkpoint), str(told), *settings])
    assert result.exit_code == 0
    assert "its name says that it scores images: scores will be asked for as in the preset q-instruct" in result.stderr
    assert CliRunner().invoke(cli, [str(checkpoint), str(chosen), *settings, "--preset", "q-align"]).exit_code == 0
    for bundle, preset in ((told, "q-instruct"), (chosen, "q-align")):
        assert read_manifest(bundle).preset == preset
        assert f"images, with the preset {preset}" in run("info", bundle).stdout
        with Owl2.load(bundle) as owl:
            expected = owl.score(IMAGES[0], preset=preset)[0]
            assert owl.score(IMAGES[0])[0] == expected
        shown = run("score", bundle, IMAGES[0], "--json")
        assert json.loads(shown.stdout) == expected.to_json()


def test_what_is_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match="preset 'x': use one of"):
        ExportConfig("a", "b", preset="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no graphs and no manifest"):
        ExportConfig("a", "b", layout="gptq", preset="q-align")  # type: ignore[arg-type]
    edit_manifest(copy, preset="../../presets/evil.json")  # no file of a bundle's choice is read
    with pytest.raises(BundleCorruptError, match="is not a name such as q-align"):
        read_manifest(copy)
    edit_manifest(copy, preset="of-next-year")
    with Owl2.load(copy) as owl:
        with pytest.raises(ConfigError, match="preset 'of-next-year' is not known"):
            owl.score(IMAGES[0])
        assert owl.score(IMAGES[0], preset="q-align")
