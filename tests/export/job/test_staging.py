"""A target is replaced only on purpose, appears whole or not at all, and has one writer at a time."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from folders import names

from owl2.export.config import ExportConfig
from owl2.export.graph.ort_dialect import OrtDialect
from owl2.export.job.contents import MARK, mark
from owl2.export.job.job import open_job
from owl2.export.job.progress import Silent
from owl2.export.job.staging import Staging
from owl2.export.pipeline import export_bundle
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import ExportError, ParityError

pytestmark = pytest.mark.slow


class TestTarget:
    def test_an_existing_bundle_is_kept_unless_overwritten(self, a1: Path, tmp_path: Path) -> None:
        target = tmp_path / "bundle"
        config = ExportConfig(a1, target, weights="fp32")
        export_bundle(config)
        with pytest.raises(ExportError, match="exists; give --overwrite to replace it"):
            export_bundle(replace(config, weights="fp16"))
        assert Bundle.open(target).manifest.weights.decoder == "fp32"
        export_bundle(replace(config, weights="fp16", overwrite=True))
        assert Bundle.open(target).manifest.weights.decoder == "fp16"
        assert names(tmp_path) == ["bundle"]

    def test_a_folder_that_is_not_a_bundle_is_never_replaced(self, a1: Path, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "wedding.jpg").write_bytes(b"precious")
        with pytest.raises(ExportError, match="is not a bundle; it is left alone"):
            export_bundle(ExportConfig(a1, tmp_path / "photos", overwrite=True))
        assert names(tmp_path / "photos") == ["wedding.jpg"]

    def test_what_a_kill_between_the_renames_left_is_put_back(self, a1: Path, tmp_path: Path) -> None:
        target = tmp_path / "b[1]"  # brackets mean nothing here
        export_bundle(ExportConfig(a1, target, weights="fp32"))
        (tmp_path / ".b[1].partial" / "bundle").mkdir(parents=True)
        mark(tmp_path / ".b[1].partial")
        target.rename(tmp_path / ".b[1].partial" / "replaced")
        with pytest.raises(ExportError, match="exists; give --overwrite"):
            export_bundle(ExportConfig(a1, target, weights="fp16"))
        assert Bundle.open(target).manifest.weights.decoder == "fp32"
        export_bundle(ExportConfig(a1, target, weights="fp16", overwrite=True))
        assert names(tmp_path) == ["b[1]"]

    def test_a_link_to_a_bundle_stays_a_link(self, a1: Path, tmp_path: Path) -> None:
        export_bundle(ExportConfig(a1, tmp_path / "real", weights="fp32"))
        (tmp_path / "link").symlink_to("real")
        export_bundle(ExportConfig(a1, tmp_path / "link", weights="fp16", overwrite=True))
        assert (tmp_path / "link").is_symlink()
        assert Bundle.open(tmp_path / "real").manifest.weights.decoder == "fp16"
        assert names(tmp_path) == ["link", "real"]

    def test_the_root_folder_is_not_a_bundle(self) -> None:
        """Only looked at: a test must not depend on this to leave the machine whole."""
        with pytest.raises(ExportError, match="is not a bundle"):
            Staging(Path("/"), overwrite=True)

    def test_parents_are_made(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "deep" / "er" / "bundle", overwrite=False) as staging:
            (staging.folder / "file").write_text("x")
            staging.publish()
        assert names(tmp_path / "deep" / "er") == ["bundle"]

    def test_a_failed_overwrite_keeps_the_old_bundle(
        self, a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "bundle"
        export_bundle(ExportConfig(a1, target, weights="fp32"))
        monkeypatch.setattr(OrtDialect, "silu", lambda ops, x: ops.graph.op("Neg", x))
        with pytest.raises(ParityError):
            export_bundle(ExportConfig(a1, target, weights="fp16", overwrite=True))
        assert Bundle.open(target).manifest.weights.decoder == "fp32"
        assert names(tmp_path) == ["bundle"]

    def test_space_is_checked_first(self, a1: Path, tmp_path: Path) -> None:
        with (
            open_job(ExportConfig(a1, tmp_path / "bundle"), Silent()) as job,
            pytest.raises(
                ExportError, match=r"not enough space in .*: the export takes about 1\d{12} MB.* Nothing was"
            ),
            job.writing(2**60),
        ):
            job.check_space(2**60)
        assert names(tmp_path) == []


class TestInterrupts:
    """A publication that is interrupted right after one of its renames, which may be while it takes others back."""

    @pytest.mark.parametrize("kept", ["", "3 of 3 decoder layers"])
    @pytest.mark.parametrize("renames", [(1,), (2,), (1, 2), (2, 3), (2, 4)])
    def test_the_former_bundle_is_there_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, renames: tuple[int, ...]
    ) -> None:
        target = tmp_path / "bundle"
        target.mkdir()
        (target / "decoder.onnx").write_text("old")
        interrupt_after(monkeypatch, *renames)
        staging = replacing(target)
        with pytest.raises(KeyboardInterrupt):
            replace_files(staging, "decoder.onnx", kept=kept)
        monkeypatch.undo()
        if kept:
            assert (staging.folder / "decoder.onnx").read_text() == "new"
            replacing(target)  # as the next export does
        else:
            assert names(tmp_path) == ["bundle"]
        assert (target / "decoder.onnx").read_text() == "old"

    @pytest.mark.parametrize(("rename", "listed"), [(1, "old"), (2, "old"), (3, "new")])
    def test_files_are_those_that_the_entry_lists(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int, listed: str
    ) -> None:
        target, entry = tmp_path / "engines", tmp_path / "owl2.json"
        target.mkdir()
        for path in (target / "vision.engine", entry):
            path.write_text("old")
        interrupt_after(monkeypatch, rename)
        with pytest.raises(KeyboardInterrupt):
            replace_files(replacing(target), "owl2.json", "vision.engine", entry=("owl2.json", entry))
        assert entry.read_text() == (target / "vision.engine").read_text() == listed
        assert names(tmp_path) == ["engines", "owl2.json"]
        assert names(target) == ["vision.engine"]


def replacing(target: Path) -> Staging:
    known = {"decoder.onnx", "vision.engine", "owl2.json"}
    return Staging(target, overwrite=True, contents=lambda _: known.__contains__)


def replace_files(opened: Staging, *files: str, kept: str = "", entry: tuple[str, Path] | None = None) -> None:
    with opened as staging:
        for name in files:
            (staging.folder / name).write_text("new")
        staging.kept = kept
        staging.publish(entry)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Raise KeyboardInterrupt once each of these renames, counted from 1, is done."""
    rename, made = Path.rename, 0

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal made
        made += 1
        moved = rename(self, target)
        if made in calls:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)


class TestOneAtATime:
    def test_a_second_export_is_told_who_writes(self, a1: Path, tmp_path: Path) -> None:
        with (
            Staging(tmp_path / "bundle", overwrite=False) as first,
            pytest.raises(
                ExportError, match=rf"another owl2-export \(process {os.getpid()}\) is writing to .*/bundle;"
            ),
        ):
            export_bundle(ExportConfig(a1, tmp_path / "bundle"))
        assert not first.folder.exists()
        assert names(tmp_path) == []

    def test_another_process_holds_it_until_it_ends(self, tmp_path: Path) -> None:
        """Even one that is killed, and never takes its lock away."""
        target = tmp_path / "bundle"
        script = (
            "import sys, time\n"
            "from pathlib import Path\n"
            "from owl2.export.job.staging import Staging\n"
            f"with Staging(Path({str(target)!r}), overwrite=False) as staging:\n"
            "    staging.kept = '1 layer'\n"
            "    print('in', flush=True)\n"
            "    time.sleep(100)\n"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "in\n"
            for _ in range(2):  # asking does not disturb it
                with pytest.raises(ExportError, match=rf"another owl2-export \(process {other.pid}\) is writing to"):
                    Staging(target, overwrite=False)
            other.kill()
        assert names(tmp_path / ".bundle.partial") == ["bundle", "journal", "lock", MARK]
        with Staging(target, overwrite=False) as staging:
            staging.publish()
        assert names(tmp_path) == ["bundle"]

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(ExportError, match=r"cannot write to .*/file: Not a directory"),
            Staging(tmp_path / "file" / "bundle", overwrite=False),
        ):
            pass
