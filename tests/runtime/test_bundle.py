"""A bundle is used when every file is what the manifest says, and refused with the reason otherwise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from owl2.runtime import Owl2
from owl2.runtime.bundle import Bundle, Manifest, check_onnxruntime, read_manifest
from owl2.runtime.errors import (
    BackendError,
    BackendUnavailableError,
    BundleCorruptError,
    BundleError,
    BundleVersionError,
    ConfigError,
)


@pytest.fixture
def copy(bundle_a1: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle_a1, tmp_path / "bundle"))


def edit(bundle: Path, **changes: object) -> None:
    path = bundle / "owl2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_file_is_listed_with_its_size(bundle_a1: Path) -> None:
    bundle = Bundle.open(bundle_a1)
    listed = set(bundle.manifest.files)
    assert listed == {path.name for path in bundle_a1.iterdir()} - {"owl2.json"}
    assert bundle.size() == sum((bundle_a1 / name).stat().st_size for name in listed)


def test_the_manifest_survives_json(bundle_a1: Path) -> None:
    manifest = read_manifest(bundle_a1)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_the_token_table_is_mapped_and_not_read(bundle_a1: Path) -> None:
    table = Bundle.open(bundle_a1).embeddings()
    assert isinstance(table, np.memmap)
    assert table.shape == (800, 64)
    assert not table.flags.writeable


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "vision.onnx.data", "embeddings.bin"])
def test_one_changed_byte(copy: Path, name: str) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleCorruptError, match=rf"{name} was changed \(its sha256 differs\); copy or export"):
        Owl2.load(copy)


def test_everything_wrong_is_named_at_once(copy: Path) -> None:
    data = copy / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    (copy / "tokenizer.model").unlink()
    with pytest.raises(BundleCorruptError) as caught:
        Owl2.load(copy)
    size = data.stat().st_size
    assert f"decoder.onnx.data has {size} bytes, expected {size + 1} (truncated?)" in str(caught.value)
    assert "tokenizer.model is missing" in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_unknown_format_version(copy: Path, version: object) -> None:
    edit(copy, format=version)
    with pytest.raises(BundleVersionError, match="is not known; this owl2 reads version 1; export the checkpoint"):
        Owl2.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "unknown keys surprise"),
        ({"weights": {"decoder": "int4"}}, "weights: missing keys"),
        ({"files": []}, "files: expected an object"),
        ({"files": {"decoder.onnx": {"size": "big", "sha256": "x"}}}, "size: expected int, got 'big'"),
    ],
)
def test_a_manifest_that_was_edited(copy: Path, changes: dict[str, object], message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(BundleCorruptError, match=message):
        Owl2.load(copy)


def test_a_manifest_that_is_no_json(copy: Path) -> None:
    (copy / "owl2.json").write_text('{"format": 1')
    with pytest.raises(BundleCorruptError, match=r"owl2\.json is no readable JSON"):
        Owl2.load(copy)


def test_files_outside_the_bundle_are_not_followed(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    files = json.loads((copy / "owl2.json").read_text())["files"]
    edit(copy, files=files | {"../outside": {"size": 6, "sha256": "0" * 64}})
    with pytest.raises(BundleCorruptError, match=r"\.\./outside lies outside the bundle"):
        Owl2.load(copy)


def test_a_folder_that_is_no_bundle(tmp_path: Path, golden: Path) -> None:
    with pytest.raises(BundleError, match=r"owl2\.json is missing; expected a folder written by owl2-export"):
        Owl2.load(tmp_path)
    with pytest.raises(BundleError, match="it is a PyTorch checkpoint: convert it with owl2-export"):
        Owl2.load(golden / "a1_base_bin" / "model")


def test_a_graph_without_its_data_cannot_be_loaded(copy: Path) -> None:
    """The hashes hold, yet ONNX Runtime refuses the graph: its own first line is passed on."""
    files = json.loads((copy / "owl2.json").read_text())["files"]
    (copy / "vision.onnx.data").unlink()
    del files["vision.onnx.data"]
    edit(copy, files=files)
    with pytest.raises(BackendError, match=r"vision\.onnx cannot be loaded: "):
        Owl2.load(copy)


def test_an_older_onnxruntime_than_needed() -> None:
    with pytest.raises(BackendUnavailableError, match=r"needs onnxruntime 99\.1 or newer, .* upgrade it"):
        check_onnxruntime("99.1")
    check_onnxruntime("1.2")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"provider": "cuda"}, BackendUnavailableError, "provider 'cuda' is not known; known: cpu"),
        ({"threads": 0}, ConfigError, "threads must be positive, got 0"),
        ({"context": 0}, ConfigError, "context must be positive, got 0"),
        ({"context": 4096}, ConfigError, "context 4096 exceeds the 2048 positions this model was trained for"),
    ],
)
def test_settings_that_cannot_work(
    bundle_a1: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Owl2.load(bundle_a1, **settings)
