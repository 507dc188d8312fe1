"""Engines appear in a bundle together, or not at all; built by the real TensorRT for RTX."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from owl2 import Owl2
from owl2.export.job.contents import mark
from owl2.export.job.progress import Silent
from owl2.export.tensorrt.build import BuildStats, build_engine
from owl2.export.tensorrt.folder import build_engines
from owl2.export.tensorrt.profiles import Limits
from owl2.export.tensorrt.target import BuildTarget, choose_target, find_gpu
from owl2.runtime import spec
from owl2.runtime.backends.tensorrt import records
from owl2.runtime.backends.tensorrt.records import EngineRecord
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import ExportError
from owl2.runtime.verification import hash_file

pytestmark = pytest.mark.slow

trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 only")


def target_of(gpu: str) -> BuildTarget:
    device, here = find_gpu(gpu)
    return choose_target("tensorrt-rtx", device, "onnx", "int4", here=here)


def test_engines_are_stamped_and_listed(folder: Path) -> None:
    bundle, limits = Bundle.open(folder), Limits(512, 128, 1)
    report = build_engines(bundle, target_of("rtx4060"), limits, 256 << 20, Silent())
    assert report.folder == folder / "engines" / "tensorrt-rtx-sm89"
    record = EngineRecord.from_json(json.loads((report.folder / "engine.json").read_text()))
    assert record == report.record
    assert (record.kind, record.tensorrt) == ("tensorrt-rtx", trt.__version__)
    assert (record.compute_capability, record.gpu, record.driver) == ((8, 9), None, None)
    assert (record.context, record.prefill, record.images) == (512, 128, 1)
    for name, entry in record.files.items():
        assert (entry.size, entry.sha256) == (
            (report.folder / name).stat().st_size,
            hash_file(report.folder / name),
        )
    for name, sha256 in record.source.items():
        assert sha256 == hash_file(folder / name)
    manifest = Bundle.open(folder).manifest
    assert manifest.engines == {"tensorrt-rtx-sm89": hash_file(report.folder / "engine.json")}
    assert replace(manifest, engines={}) == bundle.manifest
    shown = subprocess.run(
        [sys.executable, "-m", "owl2.runtime", "info", str(folder)], check=False, capture_output=True, text=True
    )
    assert "tensorrt-rtx-sm89" in shown.stdout
    assert f"TensorRT {trt.__version__}, built without a GPU; 512 positions, 128 in a step" in shown.stdout
    (report.folder / records.VISION_ENGINE).write_bytes(b"cut")
    shown = subprocess.run(
        [sys.executable, "-m", "owl2.runtime", "info", str(folder)], check=False, capture_output=True, text=True
    )
    assert shown.returncode == 1
    assert "tensorrt-rtx-sm89: vision.engine has 3 bytes" in shown.stdout
    assert Owl2.load(folder).logits("Hi").shape[1] == manifest.model.decoder.vocab_size


def test_a_failure_leaves_engines_and_manifest_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("sm86")
    before, listed = (folder / spec.MANIFEST).read_bytes(), sorted(folder.glob("engines/*"))

    def fail_at_the_decoder(module: ModuleType, graph: Path, engine: Path, *args: Any, **settings: Any) -> BuildStats:
        if engine.name == records.DECODER_ENGINE:
            raise ExportError("out of memory")
        return build_engine(module, graph, engine, *args, **settings)

    monkeypatch.setattr("owl2.export.tensorrt.folder.build_engine", fail_at_the_decoder)
    with pytest.raises(ExportError, match="out of memory"):
        build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent())
    assert (folder / spec.MANIFEST).read_bytes() == before
    assert sorted(folder.glob("engines/*")) == listed


def test_a_full_disk_at_the_last_moment_brings_the_former_engines_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of("sm89")
    made = build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent()).folder
    before = {path: path.read_bytes() for path in (*made.iterdir(), folder / spec.MANIFEST)}
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if target.name == spec.MANIFEST:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(ExportError, match="cannot be written: No space left on device"):
        build_engines(Bundle.open(folder), target, Limits(256, 64, 1), None, Silent())
    assert {path: path.read_bytes() for path in before} == before
    assert not [path.name for path in made.parent.iterdir() if path.name.startswith(".")]
    assert not list(folder.glob("*.new"))


def test_engines_that_a_kill_left_aside_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("sm89")
    made = build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent()).folder
    work = made.with_name(f".{made.name}.partial")
    work.mkdir()
    mark(work)
    made.rename(work / "replaced")
    monkeypatch.setattr("owl2.export.tensorrt.folder.build_engine", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent())
    assert (made / records.DECODER_ENGINE).is_file()
    assert not work.exists()


@pytest.mark.parametrize("place", ["{}/notes.txt", ".{}.partial/notes.txt", ".{}.partial/bundle/notes.txt"])
def test_what_no_build_wrote_is_named_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    target = target_of("sm80")
    path = folder / "engines" / place.format("tensorrt-rtx-sm80")
    path.parent.mkdir(parents=True)
    if "bundle" in place:
        mark(path.parent.parent)
    path.write_text("precious")
    monkeypatch.setattr("owl2.export.tensorrt.folder.build_engine", lambda *_, **__: 1 / 0)
    with pytest.raises(ExportError, match=r"notes\.txt, which no export wrote|was not made by owl2-export"):
        build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent())
    assert path.read_text() == "precious"
    shutil.rmtree(folder / "engines" / place.format("tensorrt-rtx-sm80").split("/")[0])


@pytest.mark.parametrize("linked", ["engines", "engines/tensorrt-rtx-sm80", "engines/.tensorrt-rtx-sm80.partial"])
def test_links_are_not_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: str) -> None:
    target = target_of("sm80")
    bundle = Path(shutil.copytree(folder, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("precious")
    (bundle / linked).parent.mkdir(exist_ok=True)
    (bundle / linked).symlink_to(tmp_path / "photos")
    monkeypatch.setattr("owl2.export.tensorrt.folder.build_engine", lambda *_, **__: 1 / 0)
    opened = Bundle(bundle, Bundle.open(folder).manifest)
    with pytest.raises(ExportError, match="is a link and is left alone"):
        build_engines(opened, target, Limits(512, 128, 1), None, Silent())
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["1.jpg"]


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    arguments = ["engine", str(folder), "--gpu", "rtx5090", "--context", "777"]
    process = subprocess.Popen([sys.executable, "-m", "owl2.export", *arguments], stderr=subprocess.PIPE, text=True)
    work = folder / "engines" / ".tensorrt-rtx-sm120.partial"
    while not work.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.splitlines()[-1].endswith("stopped")
    assert not work.exists()
    assert not (folder / "engines" / "tensorrt-rtx-sm120").exists()
