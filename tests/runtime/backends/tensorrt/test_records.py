"""Engines of a bundle that cannot be used are refused before any of them is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCommand, edit_manifest, flip_byte
from fake_engines import CONTEXT, FakeModel, build, read_record, write_record
from fake_tensorrt import FakeGpu

from owl2 import BackendError, BackendUnavailableError, BundleCorruptError, BundleError
from owl2.runtime.backends.ort.engine import OrtEngine
from owl2.runtime.backends.tensorrt.records import BUILT_ANYWHERE
from owl2.runtime.bundle import Bundle
from owl2.runtime.fit.products import PRODUCTS
from owl2.runtime.verification import hash_file

ENGINES = Path("engines", "tensorrt-sm87")


@pytest.fixture
def copy(float32: Bundle, tmp_path: Path) -> Path:
    """A bundle with engines, to be damaged."""
    return Path(shutil.copytree(float32.folder, tmp_path / "bundle"))


def load(folder: Path) -> FakeModel:
    return FakeModel(Bundle.open(folder))


def edit(folder: Path, **changes: Any) -> Path:
    """Change the record of the engines."""
    return write_record(folder / ENGINES, json.loads((folder / ENGINES / "engine.json").read_text()) | changes)


def edit_entry(folder: Path, path: Path) -> None:
    """Let the record of the engines list a file as it is."""
    files = read_record(folder / ENGINES).to_json()["files"]
    edit(folder, files=files | {path.name: {"size": path.stat().st_size, "sha256": hash_file(path)}})


def test_a_bundle_opens_with_and_without_its_device(copy: Path) -> None:
    assert Bundle.open(copy).manifest == Bundle.open(copy).manifest
    assert OrtEngine(Bundle.open(copy))


def test_no_engines(bundle_a2_onnx: Path) -> None:
    hint = f"run on this device: owl2-export engine {bundle_a2_onnx} --kind tensorrt"
    with pytest.raises(BundleError, match=rf"has no engines of tensorrt; {hint}$"):
        load(bundle_a2_onnx)


def test_engines_of_another_gpu(copy: Path) -> None:
    message = (
        rf"are for other GPUs \(tensorrt-sm87\), this device is a Thor \(sm110\); "
        rf"run on this device: owl2-export engine {copy} --kind tensorrt$"
    )
    with pytest.raises(BackendUnavailableError, match=message):
        FakeModel(Bundle.open(copy), FakeGpu(name="Thor", compute_capability=(11, 0)))


@pytest.mark.parametrize(
    ("capability", "where", "gpu"),
    [
        ((8, 9), "any machine", " --gpu sm89"),
        ((12, 1), "this device", ""),
        ((12, 0), "any machine", " --gpu sm120"),
    ],
)
def test_the_command_builds_the_kind_that_is_missing(
    copy: Path, capability: tuple[int, int], where: str, gpu: str
) -> None:
    """For a GPU that the exporter knows by number, anywhere; it would build the other kind on a server's."""
    hint = f"run on {where}: owl2-export engine {copy} --kind tensorrt-rtx{gpu}$"
    fake = FakeGpu(compute_capability=capability)
    with pytest.raises(BundleError, match=f"has no engines of tensorrt-rtx; {hint}"):
        FakeModel(Bundle.open(copy), fake, kind="tensorrt-rtx")
    build(copy, kind="tensorrt-rtx")
    with pytest.raises(BackendUnavailableError, match=rf"other GPUs \(tensorrt-rtx-sm87\), .*; {hint}"):
        FakeModel(Bundle.open(copy), fake, kind="tensorrt-rtx")


def test_engines_are_built_anywhere_for_the_products_that_can_run_them() -> None:
    """The backends do not know the table of products."""
    assert {product.compute for product in PRODUCTS.values() if "tensorrt-rtx" in product.engines} == BUILT_ANYWHERE


def test_a_record_of_another_gpu(copy: Path) -> None:
    edit(copy, compute_capability=[11, 0])
    with pytest.raises(BundleCorruptError, match=r"engine\.json is of engines tensorrt-sm110, not tensorrt-sm87"):
        load(copy)


def test_a_record_that_was_edited(copy: Path) -> None:
    path = copy / ENGINES / "engine.json"
    path.write_text(path.read_text().replace(f'"context": {CONTEXT}', '"context": 4096'))
    with pytest.raises(BundleCorruptError, match=r"engine\.json is not the one that owl2\.json names"):
        load(copy)


def test_engines_of_another_tensorrt(copy: Path) -> None:
    message = r"were built with tensorrt 10\.3\.0, 10\.7\.0 is installed, .* to read them; .*owl2-export engine"
    with pytest.raises(BackendUnavailableError, match=message):
        FakeModel(Bundle.open(copy), version="10.7.0")


def test_engines_of_other_graphs(copy: Path) -> None:
    edit(copy, source={**read_record(copy / ENGINES).source, "decoder.onnx.data": "0" * 64})
    with pytest.raises(BundleError, match=r"built from another decoder\.onnx\.data than the bundle has now"):
        load(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "decoder.engine is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"decoder.engine has .*truncated"),
        (flip_byte, "decoder.engine was changed"),
    ],
)
def test_damage(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy / ENGINES / "decoder.engine")
    hint = f"run on this device: owl2-export engine {copy} --kind tensorrt"
    with pytest.raises(BundleCorruptError, match=f"{message}.*; {hint}$"):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1 is not known; this owl2 reads 2"),
        ({"context": 0}, "context must be positive, got 0"),
        ({"files": {}}, "files: decoder.engine is missing"),
        ({"source": {}}, "source: decoder.onnx is missing"),
        ({"kind": "openvino"}, "expected one of tensorrt, tensorrt-rtx"),
        ({"extra": 1}, "unknown keys extra"),
    ],
)
def test_impossible_records(copy: Path, changes: dict[str, Any], message: str) -> None:
    path = edit(copy, **changes)
    with pytest.raises(
        BundleCorruptError,
        match=rf"^{path} cannot be used: .*{message}.*owl2-export engine {copy} --kind tensorrt$",
    ):
        load(copy)


def test_a_record_that_is_not_json(copy: Path) -> None:
    (copy / ENGINES / "engine.json").write_text("{")
    with pytest.raises(BundleCorruptError, match=r"engine\.json: it is not JSON: Expecting"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("damage", "sm87: vision.engine was changed"),
        ("edit", "engine.json is not the one that owl2.json names"),
        ("graphs", "built from another decoder.onnx than the bundle has now"),
        ("gpu", "engine.json is of engines tensorrt-sm110, not tensorrt-sm87"),
        ("remove", "engine.json: it is missing; run on this device"),
        ("rename", "engines: 'x-sm87' is not a name such as tensorrt-sm87"),
    ],
)
def test_info_and_verify_tell_wherever_they_run(run: RunCommand, copy: Path, change: str, message: str) -> None:
    folder = copy / ENGINES
    if change == "damage":
        flip_byte(folder / "vision.engine")
    elif change == "edit":
        path = folder / "engine.json"
        path.write_text(path.read_text().replace(f'"context": {CONTEXT}', '"context": 4096'))
    elif change == "graphs":
        edit(copy, source={**read_record(folder).source, "decoder.onnx": "0" * 64})
    elif change == "gpu":
        edit(copy, compute_capability=[11, 0])
    elif change == "remove":
        shutil.rmtree(folder)
    else:
        edit_manifest(copy, engines={"x-sm87": "0"})
    for command, shown in (("info", "1 problem:"), ("verify", "nothing was replayed")):
        result = run(command, copy)
        assert result.exit_code == 1
        assert message in result.stdout
        assert shown in result.stdout


def test_info_and_verify_are_content_with_whole_ones(run: RunCommand, copy: Path) -> None:
    for command in ("info", "verify"):
        result = run(command, copy)
        assert result.exit_code == 0, result.stdout
        assert "files verified" in result.stdout


def test_an_engine_that_tensorrt_refuses(copy: Path) -> None:
    path = copy / ENGINES / "decoder.engine"
    path.write_bytes(b"no engine at all")
    edit_entry(copy, path)
    with pytest.raises(
        BackendError, match=r"decoder\.engine cannot be loaded: magicTag failed: it is not a TRT engine"
    ):
        load(copy)


def test_an_engine_of_another_model(copy: Path, bundle_a1_onnx: Path) -> None:
    """Whose entry in the record was copied together with it."""
    other = Path(shutil.copytree(bundle_a1_onnx, copy.parent / "other"))
    build(other)
    edit_entry(copy, Path(shutil.copy(other / ENGINES / "decoder.engine", copy / ENGINES / "decoder.engine")))
    with pytest.raises(BackendError, match=r"does not fit the manifest: .* is .* needed; build the engines again"):
        load(copy)
