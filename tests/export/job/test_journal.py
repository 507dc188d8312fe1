"""An interrupted export goes on where it was and gives the same files, or starts over and says why."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import flip_byte
from folders import names

from owl2.export import decoder
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.modules import load_layer
from owl2.export.config import ExportConfig
from owl2.export.job.contents import MARK
from owl2.export.job.progress import Silent
from owl2.export.job.staging import Staging
from owl2.export.pipeline import export_bundle
from owl2.quant.grid import QuantizedWeight
from owl2.quant.models.mplug_owl2 import DecoderLayer
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import ParityError

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL
JOURNAL = "owl2.export.job.journal:Journal"
# (where the process is killed, what the next one says)
POINTS = [
    (["owl2.export.graph.vision:VisionGraph", "write", 1, "after"], None),
    ([JOURNAL, "_remove_others", 1, "before"], "continuing an interrupted export after the vision tower"),
    (["owl2.export.decoder", "quantize_layer", 2, "after"], "continuing an interrupted export at layer 2 of 5"),
    # layer 2 becomes part of the journal; of layer 3 everything is written, but the journal does not name it
    ([JOURNAL, "_write", 6, "after"], "continuing an interrupted export at layer 3 of 5"),
    ([JOURNAL, "_remove_others", 2, "before"], "continuing an interrupted export at layer 4 of 5"),
    (
        ["owl2.export.graph.builder:GraphBuilder", "_write", 9, "after"],
        "continuing an interrupted export at layer 4 of 5",
    ),
    (
        ["owl2.export.checks.bundle", "_probe_logits", 1, "before"],
        "continuing an interrupted export after the last of 5 layers",
    ),
    (["pathlib:Path", "rename", 1, "before"], "continuing an interrupted export after the last of 5 layers"),
    (["owl2.export.job.staging:Staging", "publish", 1, "after"], None),
]


class Notes(Silent):
    """Keeps what the user would see."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def files(bundle: Path) -> dict[str, bytes]:
    """All files but the two that hold times and memory, or the hash of these."""
    assert Bundle.open(bundle)
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name not in ("report.json", "owl2.json")}


def timeless_report(bundle: Path) -> dict[str, object]:
    report = json.loads((bundle / "report.json").read_text())
    kept = {name: report[name] for name in report if name not in ("seconds", "layer_seconds")}
    return {name: value for name, value in kept.items() if not name.startswith("peak")}


def test_killed_anywhere_it_becomes_the_same_bundle(sample_checkpoint: Path, tmp_path: Path) -> None:
    def job(bundle: str, kill: list[object] | None) -> dict[str, object]:
        settings = {"checkpoint": str(sample_checkpoint), "bundle": str(tmp_path / bundle / "bundle"), "samples": 4}
        return {"config": settings, "kill": kill}

    jobs = [job("whole", None), *(job("parts", kill) for kill, _ in POINTS)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("interrupted.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    whole, *parts = map(json.loads, run.stdout.splitlines())
    assert whole == {"notes": [], "ended": 0}
    assert [part["ended"] for part in parts] == [KILLED] * len(POINTS)
    said = [None, *(said for _, said in POINTS)]
    assert [part["notes"] for part in parts] == [[] if text is None else [text] for text in said[:-1]]
    made, expected = tmp_path / "parts" / "bundle", tmp_path / "whole" / "bundle"
    assert files(made) == files(expected)
    assert timeless_report(made) == timeless_report(expected)
    report = json.loads((made / "report.json").read_text())
    assert len(report["layer_seconds"]) == 5
    assert 0 < sum(report["layer_seconds"]) < report["seconds"]
    assert 0 < report["peak_own_memory"] < report["peak_memory"]
    # The last kill came before the hidden folder was removed.
    assert names(made.parent) == [".bundle.partial", "bundle"]
    with Staging(made, overwrite=True):
        pass
    assert names(made.parent) == ["bundle"]


def settings(a1: Path, folder: Path) -> ExportConfig:
    return ExportConfig(a1, folder / "bundle", method="rtn", group_size=32, samples=1)


def interrupt(config: ExportConfig, layer: int, error: BaseException | None = None) -> list[str]:
    """Export until ``layer`` (0 is the first) begins, then stop as Ctrl-C does; returns the notes."""
    notes = Notes()
    with pytest.MonkeyPatch.context() as patch:

        def stopped(checkpoint: Checkpoint, index: int, device: str) -> tuple[DecoderLayer, dict[str, QuantizedWeight]]:
            if index == layer:
                raise error or KeyboardInterrupt
            return load_layer(checkpoint, index, device)

        patch.setattr(decoder, "load_layer", stopped)
        with pytest.raises(type(error) if error else KeyboardInterrupt):
            export_bundle(config, notes)
    return notes.texts


@pytest.fixture(scope="module")
def whole(a1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    export_bundle(settings(a1, folder))
    return files(folder / "bundle")


@pytest.fixture(scope="module")
def stopped(a1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export that was stopped after two of three layers."""
    folder = tmp_path_factory.mktemp("stopped")
    interrupt(settings(a1, folder), 2)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "index cut": (
        lambda work: os.truncate(work / "journal" / "journal.json", 300),
        "it is not JSON: .*; it is damaged",
    ),
    "index changed": (lambda work: flip_byte(work / "journal" / "journal.json"), "journal.json is damaged"),
    "index of no JSON object": (
        lambda work: (work / "journal" / "journal.json").write_text('["x"]'),
        "cannot read journal.json: .*; it is damaged",
    ),
    "nodes changed": (
        lambda work: flip_byte(work / "journal" / "layer-2.graph"),
        "layer-2.graph is missing or damaged",
    ),
    "rows changed": (lambda work: flip_byte(work / "journal" / "layer-2.rows"), "layer-2.rows is missing or damaged"),
    "rows missing": (lambda work: (work / "journal" / "vision.rows").unlink(), "vision.rows is missing or damaged"),
    "weights changed": (
        lambda work: flip_byte(work / "bundle" / "decoder.onnx.data"),
        r"layer \d in decoder.onnx.data is incomplete or damaged",
    ),
    "weights cut": (
        lambda work: os.truncate(work / "bundle" / "decoder.onnx.data", 4096),
        "layer 1 in decoder.onnx.data is incomplete or damaged",
    ),
    "vision changed": (
        lambda work: flip_byte(work / "bundle" / "vision.onnx.data"),
        "vision.onnx.data is missing or damaged",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_journal_starts_over(a1: Path, copy: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(copy / ".bundle.partial")
    first, second = interrupt(settings(a1, copy), 1)
    assert first.startswith("starting over; the interrupted export cannot be continued: ")
    assert re.search(reason, first), first
    assert second.startswith("1 of 3 decoder layers are kept in ")


def test_what_starts_over_after_damage_is_whole(a1: Path, copy: Path, whole: dict[str, bytes]) -> None:
    flip_byte(copy / ".bundle.partial" / "bundle" / "decoder.onnx.data")
    export_bundle(settings(a1, copy))
    assert files(copy / "bundle") == whole


def test_a_torn_tail_after_the_last_layer_is_not_damage(a1: Path, copy: Path, whole: dict[str, bytes]) -> None:
    with (copy / ".bundle.partial" / "bundle" / "decoder.onnx.data").open("ab") as file:
        file.write(b"half a layer" * 10_000)
    notes = Notes()
    export_bundle(settings(a1, copy), notes)
    assert notes.texts == ["continuing an interrupted export at layer 3 of 3"]
    assert files(copy / "bundle") == whole
    assert names(copy) == ["bundle"]


class TestKey:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"weights": "int8"}, "weights was int4, now int8"),
            ({"group_size": 64, "samples": 200}, r"group_size was 32, now 64, .*samples was 1, now 200"),
        ],
    )
    def test_other_settings_start_over(self, a1: Path, copy: Path, change: dict[str, Any], reason: str) -> None:
        notes = interrupt(replace(settings(a1, copy), **change), 1)
        assert re.search(f"cannot be continued: .*{reason}", notes[0]), notes

    def test_another_checkpoint_starts_over(self, a1: Path, copy: Path, tmp_path: Path) -> None:
        moved = Path(shutil.copytree(a1, tmp_path / "moved"))  # copies times too
        assert interrupt(settings(moved, copy), 2)[0] == "continuing an interrupted export at layer 3 of 3"
        shard = moved / "pytorch_model-00002-of-00004.bin"
        os.utime(shard, ns=(0, 1))
        first = interrupt(settings(moved, copy), 1)[0]
        assert first.endswith(f"cannot be continued: the checkpoint's {shard.name} changed")

    def test_other_images_start_over(self, a1: Path, copy: Path, tmp_path: Path, golden: Path) -> None:
        """The built-in probes stay; what the held-out prompts are changes."""
        folder = tmp_path / "images"
        folder.mkdir()
        for path in sorted((golden / "images").iterdir()):
            shutil.copy(path, folder / path.name)
        first = interrupt(replace(settings(a1, copy), calibration=folder, samples=8), 1)[0]
        assert "measured prompts changed" in first


class TestWhatIsKept:
    def test_nothing_before_the_first_layer(self, a1: Path, tmp_path: Path) -> None:
        assert interrupt(settings(a1, tmp_path), 0) == []
        assert names(tmp_path) == []

    def test_finished_layers_after_ctrl_c(self, stopped: Path, a1: Path, tmp_path: Path) -> None:
        (note,) = interrupt(settings(a1, tmp_path), 2)
        assert names(tmp_path) == [".bundle.partial"]
        size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert note == (
            f"2 of 3 decoder layers are kept in {tmp_path}/.bundle.partial ({size / 1e6:.0f} MB): the same command "
            "continues there, with --fresh it starts over"
        )

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("the device was lost"), OSError(5, "bad sector")])
    def test_finished_layers_after_what_another_try_may_not_meet(
        self, a1: Path, tmp_path: Path, error: Exception
    ) -> None:
        assert "1 of 3 decoder layers are kept" in interrupt(settings(a1, tmp_path), 1, error)[0]
        assert names(tmp_path) == [".bundle.partial"]

    def test_nothing_after_an_error_that_would_come_again(self, a1: Path, copy: Path) -> None:
        assert len(interrupt(settings(a1, copy), 2, ParityError("not equal"))) == 1  # that it continued
        assert names(copy) == []

    def test_the_lock_of_a_killed_process_holds_nobody_off(self, a1: Path, copy: Path) -> None:
        (copy / ".bundle.partial" / "lock").write_text("1")
        assert interrupt(settings(a1, copy), 2)[0].startswith("continuing")

    def test_fresh_starts_over(self, a1: Path, copy: Path, whole: dict[str, bytes]) -> None:
        notes = Notes()
        export_bundle(replace(settings(a1, copy), fresh=True), notes)
        assert notes.texts == ["starting over; the finished parts of an earlier export are removed"]
        assert files(copy / "bundle") == whole

    def test_the_journal_keeps_one_layer(self, stopped: Path) -> None:
        work = stopped / ".bundle.partial"
        assert names(work) == ["bundle", "journal", "lock", MARK]
        assert names(work / "journal") == ["journal.json", "layer-2.graph", "layer-2.rows", "vision.rows"]
