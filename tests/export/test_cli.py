"""The command owl2-export: its output, its errors, and what is left when it is stopped."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from folders import names

import owl2.export
from owl2.export.cli.commands import cli
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle

COMMAND = (sys.executable, "-m", "owl2.export")


@pytest.mark.slow
class TestCommand:
    def run(self, *args: object, **options: Any) -> "subprocess.CompletedProcess[str]":
        command = [*COMMAND, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)

    def test_json(self, a1: Path, tmp_path: Path, photos: Path) -> None:
        result = self.run(a1, tmp_path / "bundle", "--json", "--calibration", photos, "--vision", "fp32")
        assert result.returncode == 0
        assert result.stderr == ""
        report = json.loads(result.stdout)
        assert report["recipe"]["weights"] == "int4"
        assert report["calibration"]["source"] == photos.name
        assert report["calibration"]["images"] == 3
        assert "2 of 3 images have no text" in report["calibration"]["notes"][0]
        assert report["size"] == sum(p.stat().st_size for p in (tmp_path / "bundle").iterdir()) - (
            (tmp_path / "bundle" / "owl2.json").stat().st_size + (tmp_path / "bundle" / "report.json").stat().st_size
        )

    def test_the_built_in_calibration_is_told(self, a1: Path, tmp_path: Path) -> None:
        result = self.run(a1, tmp_path / "bundle")
        assert result.returncode == 0
        assert "owl2-export: note: the built-in calibration set was used: drawn images" in result.stderr
        assert "equals torch within" in result.stdout
        notes = json.loads((tmp_path / "bundle" / "report.json").read_text())["calibration"]["notes"]
        assert notes[0].startswith("the built-in calibration set was used")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("nowhere", "out"), "nowhere is not a folder"),
            (("owner/model", "out"), "if it is a hub id, add --download"),
            ((".", "out"), "is not an official mPLUG-Owl2 checkpoint; missing: config.json"),
        ],
    )
    def test_errors_are_one_line(self, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
        result = self.run(*args, cwd=tmp_path)
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stderr.startswith("owl2-export: error: ")
        assert result.stderr.count("\n") == 1
        assert names(tmp_path) == []

    def test_wrong_usage(self) -> None:
        assert self.run("one").returncode == 2
        assert "'int3' is not one of" in self.run("a", "b", "--weights", "int3").stderr

    def test_disk_full(self, a1: Path, tmp_path: Path) -> None:
        """The system refuses to let files grow beyond a limit, as it does when a quota is used up."""

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

        result = self.run(a1, tmp_path / "bundle", "--weights", "fp32", preexec_fn=limit)
        assert result.returncode == 1
        assert "not enough space in" in result.stderr
        assert "the export takes about" in result.stderr
        assert result.stderr.endswith("Nothing was left behind\n")
        assert names(tmp_path) == []

    def test_disk_full_after_finished_layers(self, a1: Path, tmp_path: Path) -> None:
        """They are kept, and with room the same command continues."""

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (450_000, 450_000))

        options = ("--weights", "fp32", "--vision", "int8", "--samples", "1")
        result = self.run(a1, tmp_path / "bundle", *options, preexec_fn=limit)
        assert result.returncode == 1
        assert "not enough space in" in result.stderr
        kept = re.search(
            r"(\d) of 3 decoder layers are kept in .*/.bundle.partial \(\d MB\): the same command", result.stderr
        )
        assert kept is not None, result.stderr
        assert result.stderr.count("are kept in") == 1
        assert names(tmp_path) == [".bundle.partial"]
        again = self.run(a1, tmp_path / "bundle", *options, "--json")
        assert again.stderr == f"owl2-export: continuing an interrupted export at layer {int(kept[1]) + 1} of 3\n"
        assert json.loads(again.stdout)["size"] > 450_000
        assert names(tmp_path) == ["bundle"]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    def test_stopping_before_the_first_layer_leaves_nothing(
        self, sample_checkpoint: Path, tmp_path: Path, number: int, code: int
    ) -> None:
        with started(sample_checkpoint, tmp_path, "bundle/vision.onnx.data") as process:
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in errors
        assert errors.endswith("owl2-export: stopped\n")
        assert names(tmp_path) == []

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    def test_stopping_later_leaves_the_finished_layers(
        self, sample_checkpoint: Path, tmp_path: Path, number: int, code: int
    ) -> None:
        with started(sample_checkpoint, tmp_path, "journal/layer-2.graph") as process:
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert re.search(rf"owl2-export: \d of 5 decoder layers are kept in {tmp_path}/.bundle.partial", errors)
        assert "Traceback" not in errors
        assert errors.endswith("owl2-export: stopped\n")
        assert names(tmp_path) == [".bundle.partial"]

    def test_a_killed_export_leaves_no_half_bundle(self, a1: Path, sample_checkpoint: Path, tmp_path: Path) -> None:
        with started(sample_checkpoint, tmp_path, "bundle/decoder.onnx.data") as process:
            process.kill()
            process.communicate(timeout=60)
        assert names(tmp_path) == [".bundle.partial"]
        export_bundle(ExportConfig(a1, tmp_path / "bundle", weights="fp32"))
        assert names(tmp_path) == ["bundle"]

    def test_a_gpu_that_torch_cannot_use(self, a1: Path, tmp_path: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
        result = self.run(a1, tmp_path / "bundle", "--device", "cuda")
        assert result.returncode == 1
        assert re.match(rf"owl2-export: error: device cuda: .*torch {re.escape(torch.__version__)}", result.stderr)
        assert names(tmp_path) == []


def started(checkpoint: Path, folder: Path, file: str) -> "subprocess.Popen[str]":
    """An export that has begun to write ``file`` of its hidden folder."""
    process = subprocess.Popen(
        [*COMMAND, str(checkpoint), str(folder / "bundle"), "--samples", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    end = time.monotonic() + 120
    while not (folder / ".bundle.partial" / file).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


class TestCommands:
    """``convert`` is the default; what is called like a command can still be a folder."""

    def run(self, *args: str) -> Result:
        return CliRunner().invoke(cli, args, prog_name="owl2-export")

    def test_help_lists_both_and_imports_nothing_heavy(self) -> None:
        script = (
            "import sys\n"
            "from owl2.export.__main__ import main\n"
            "try:\n    main(['--help'])\n"
            "finally:\n    assert not {'torch', 'onnx', 'onnxruntime', 'safetensors'} & set(sys.modules)\n"
        )
        told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        assert re.search(r"^  convert  .*\n  engine  ", told.stdout, re.MULTILINE)
        assert "owl2-export mplug-owl2-llama2-7b/ owl2-int4/" in told.stdout

    @pytest.mark.parametrize("args", [(), ("convert",), ("--weights", "int4"), ("--json",)])
    def test_convert_is_the_default(self, args: tuple[str, ...]) -> None:
        told = self.run(*args)
        assert told.exit_code == 2
        assert "Usage: owl2-export convert [OPTIONS] CHECKPOINT BUNDLE" in told.output
        assert "Missing argument 'CHECKPOINT'" in told.output

    def test_a_checkpoint_called_like_a_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert "engine is not a folder" in self.run("convert", "engine", "out").output
        assert "engine does not exist; give a folder" in self.run("engine", "engine").output
        assert "folder ./engine does not exist" in self.run("./engine", "out").output

    def test_version(self) -> None:
        assert self.run("--version").output == f"owl2-export, version {owl2.export.__version__}\n"

    @pytest.mark.parametrize(
        ("args", "extra"), [(("a", "b"), "cpu,export"), (("engine", "a"), "tensorrt' or 'owl2[tensorrt-rtx")]
    )
    def test_a_missing_module_is_named_with_its_extra(self, args: tuple[str, ...], extra: str) -> None:
        script = (
            "import sys\n"
            "sys.modules |= dict.fromkeys(('torch', 'rich'))\n"
            "from owl2.export.__main__ import main\n"
            f"main({list(args)!r})\n"
        )
        told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert told.returncode == 1
        assert re.fullmatch(
            rf"owl2-export: error: \w+ is not installed; this needs: pip install 'owl2\[{re.escape(extra)}\]'\n",
            told.stderr.replace("rich.console", "rich"),
        )


def test_public_names() -> None:
    """They are imported when they are used; the package itself needs no torch."""
    script = "import sys, owl2.export; assert not {'torch', 'onnx'} & set(sys.modules); owl2.export.ExportConfig"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    for name in owl2.export.__all__:
        assert getattr(owl2.export, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'export_model'"):
        _ = owl2.export.export_model
