"""Command ``owl2-export engine``, and the options of ``owl2-export`` that lead there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from owl2.export.cli.commands import cli
from owl2.export.tensorrt.cli import engine as command
from owl2.runtime.backends.tensorrt import records
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import ExportError

pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 only")


def test_no_gpu_here_is_said(folder: Path) -> None:
    made = CliRunner().invoke(command, [str(folder)])
    assert made.exit_code == 1
    assert "no NVIDIA GPU is found on this machine" in made.output


@pytest.mark.slow
def test_it_needs_neither_torch_nor_onnx_nor_an_onnx_runtime(folder: Path) -> None:
    """As on a Jetson with only the extra tensorrt."""
    blocked = dict.fromkeys(("torch", "onnx", "onnxruntime", "safetensors", "huggingface_hub"))
    run = f"import sys; sys.modules |= {blocked}; from owl2.export.__main__ import main; main()"
    arguments = ["engine", str(folder), "--gpu", "rtx3070", "--context", "256", "--prefill", "64", "--json"]
    made = subprocess.run([sys.executable, "-c", run, *arguments], check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "building the decoder's engine takes about" in made.stderr
    assert json.loads(made.stdout)["engine"]["compute_capability"] == [8, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "gptq", "--gpu", "rtx3060"], "leave --layout gptq out"),
        (["--dialect", "ort", "--engine", "tensorrt-rtx", "--gpu", "rtx3060"], "--dialect onnx, not of ort"),
        (["--layout", "gptq", "--activations", "fp16"], "leave dialect, activations and preset out"),
    ],
)
def test_options_that_exclude_each_other(
    sample_checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    made = CliRunner().invoke(cli, [str(sample_checkpoint), str(tmp_path / "bundle"), *options])
    assert made.exit_code == 1
    assert message in made.output
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_bundle_stays_when_its_engines_cannot_be_built(
    sample_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ExportError("TensorRT could not")

    monkeypatch.setattr("owl2.export.tensorrt.folder.build_engine", refused)
    given = [str(sample_checkpoint), str(tmp_path / "bundle"), "--method", "rtn", "--gpu", "rtx3060", "--samples", "2"]
    made = CliRunner().invoke(cli, given)
    assert made.exit_code == 1
    assert f"owl2-export engine {tmp_path / 'bundle'} --gpu rtx3060" in made.output
    assert "equals torch within" in made.output
    assert Bundle.open(tmp_path / "bundle").manifest.engines == {}


def test_list_shows_all_and_does_nothing_else() -> None:
    made = CliRunner().invoke(command, ["--gpu", "list"])
    assert made.exit_code == 0
    assert "rtx3060" in made.output


@pytest.mark.slow
def test_json(folder: Path) -> None:
    given = [str(folder), "--gpu", "sm80", "--context", "256", "--prefill", "64", "--json"]
    made = CliRunner().invoke(command, given, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["engine"]["compute_capability"] == [8, 0]
    assert set(record["built"]) == {records.DECODER_ENGINE, records.VISION_ENGINE}
