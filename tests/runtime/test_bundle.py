"""A bundle is used when every file is what the manifest says, and refused with the reason otherwise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import edit_manifest, flip_byte, rehash

from owl2 import Owl2
from owl2.runtime.bundle import Bundle, Manifest, read_manifest
from owl2.runtime.errors import (
    BackendError,
    BundleCorruptError,
    BundleError,
    BundleVersionError,
    ConfigError,
)


def test_every_file_is_listed_with_its_size(bundle_a1: Path) -> None:
    bundle = Bundle.open(bundle_a1)
    listed = set(bundle.manifest.files)
    assert listed == {path.name for path in bundle_a1.iterdir()} - {"owl2.json"}
    assert bundle.manifest.size == sum((bundle_a1 / name).stat().st_size for name in listed)


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
    flip_byte(copy / name)
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


def test_a_bundle_of_format_3(copy: Path) -> None:
    """It called the family by the name of its template, and knew one end token."""
    path = copy / "owl2.json"
    data = json.loads(path.read_text())
    data["template"] = data.pop("family")
    data["model"]["decoder"]["eos_token_id"] = data["model"]["decoder"].pop("eos_token_ids")[0]
    expected = Owl2.load(copy).chat().ask("Hi", max_new_tokens=5)
    path.write_text(json.dumps(data | {"format": 3}))
    assert read_manifest(copy).family == "mplug_owl2"
    assert Owl2.load(copy).chat().ask("Hi", max_new_tokens=5).ids == expected.ids


def test_a_bundle_of_format_4(copy: Path) -> None:
    """It knew one end token."""
    model = json.loads((copy / "owl2.json").read_text())["model"]
    del model["decoder"]["eos_token_ids"]
    edit_manifest(copy, format=4, model=model | {"decoder": model["decoder"] | {"eos_token_id": 7}})
    assert read_manifest(copy).model.decoder.eos_token_ids == (7,)


def test_every_end_token_ends_an_answer(copy: Path) -> None:
    """Those that the manifest lists, and the separator of the conversation in any case."""
    ids = Owl2.load(copy).chat().ask("Hi", max_new_tokens=6).ids
    end = ids[3]
    model = json.loads((copy / "owl2.json").read_text())["model"]
    for listed in ([2, end], [end]):
        edit_manifest(copy, model=model | {"decoder": model["decoder"] | {"eos_token_ids": listed}})
        owl = Owl2.load(copy)
        answer = owl.chat().ask("Hi", max_new_tokens=6)
        assert (answer.ids, answer.finish_reason) == (ids[: ids.index(end) + 1], "stop")
        assert answer.text == owl.model.tokenizer.decode(answer.ids[:-1])
        assert owl.model.end_ids == {2, end}


@pytest.mark.parametrize("version", [0, 2, 6, "4", None, [4]])
def test_unknown_format_version(copy: Path, version: object) -> None:
    edit_manifest(copy, format=version)
    with pytest.raises(
        BundleVersionError,
        match=r"this owl2 reads versions 3 to 5; export the checkpoint again \(owl2-export CHECKPOINT BUNDLE --over",
    ):
        Owl2.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "unknown keys surprise"),
        ({"dialect": "tflite"}, "dialect: expected one of ort, onnx, got 'tflite'"),
        ({"activations": "bf16"}, "activations: expected one of fp32, fp16, got 'bf16'"),
        ({"family": "vicuna"}, "family: expected one of mplug_owl2, got 'vicuna'"),
        ({"minimum_onnxruntime": "new"}, "minimum_onnxruntime 'new' is not a version"),
        ({"weights": {"decoder": "int4"}}, "weights: missing keys"),
        ({"files": []}, "files: expected an object"),
        ({"files": {"decoder.onnx": {"size": "big", "sha256": "x"}}}, "size: expected int, got 'big'"),
    ],
)
def test_a_manifest_that_was_edited(copy: Path, changes: dict[str, object], message: str) -> None:
    edit_manifest(copy, **changes)
    with pytest.raises(BundleCorruptError, match=message):
        Owl2.load(copy)


def test_weights_of_an_unknown_type(copy: Path) -> None:
    weights = json.loads((copy / "owl2.json").read_text())["weights"]
    edit_manifest(copy, weights=weights | {"decoder": "int3"})
    with pytest.raises(
        BundleCorruptError, match=r"weights\.decoder: expected one of int4, int8, fp16, fp32, got 'int3'"
    ):
        Owl2.load(copy)


def test_a_manifest_that_is_not_json(copy: Path) -> None:
    (copy / "owl2.json").write_text('{"format": 3')
    with pytest.raises(BundleCorruptError, match=r"owl2\.json is not readable JSON"):
        Owl2.load(copy)


def test_files_outside_the_bundle_are_not_followed(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    files = json.loads((copy / "owl2.json").read_text())["files"]
    edit_manifest(copy, files=files | {"../outside": {"size": 6, "sha256": "0" * 64}})
    with pytest.raises(BundleCorruptError, match=r"\.\./outside is outside the bundle"):
        Owl2.load(copy)


def test_a_folder_that_is_not_a_bundle(tmp_path: Path, golden: Path) -> None:
    with pytest.raises(BundleError, match=r"owl2\.json is missing; give a folder written by owl2-export"):
        Owl2.load(tmp_path)
    with pytest.raises(BundleError, match="nowhere does not exist; give a folder written by owl2-export"):
        Owl2.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="file is a file; give the folder"):
        Owl2.load(tmp_path / "file")
    with pytest.raises(BundleError, match="it is a PyTorch checkpoint: convert it with owl2-export"):
        Owl2.load(golden / "a1_base_bin" / "model")


def test_a_file_that_is_not_listed_is_not_used(copy: Path) -> None:
    files = json.loads((copy / "owl2.json").read_text())["files"]
    del files["vision.onnx.data"]
    edit_manifest(copy, files=files)
    with pytest.raises(BundleCorruptError, match=r"vision\.onnx\.data is not listed in owl2\.json"):
        Owl2.load(copy)


def test_a_graph_that_onnxruntime_refuses(copy: Path) -> None:
    """The hashes hold; its own first line is passed on."""
    (copy / "vision.onnx").write_bytes(b"no graph")
    rehash(copy, "vision.onnx")
    with pytest.raises(BackendError, match=r"vision\.onnx cannot be loaded: "):
        Owl2.load(copy)


@pytest.mark.parametrize(
    ("part", "changes", "error", "message"),
    [
        ("decoder", {"vocab_size": 900}, BundleCorruptError, "embeddings.bin has .* the model's token table takes"),
        ("decoder", {"num_attention_heads": 0}, BundleCorruptError, "num_attention_heads must be positive, got 0"),
        ("decoder", {"num_attention_heads": 8}, BackendError, "does not fit the manifest: past_key_values.0.key"),
        ("decoder", {"num_hidden_layers": 4}, BackendError, "does not fit the manifest: past_key_values.3.key"),
        ("decoder", {"eos_token_ids": [2, 5000]}, BundleCorruptError, "eos_token_ids 5000 is outside the vocabulary"),
        ("decoder", {"eos_token_ids": [2, 2]}, BundleCorruptError, r"must be different ids, got \(2, 2\)"),
        ("decoder", {"eos_token_ids": []}, BundleCorruptError, r"must be different ids, got \(\)"),
        ("decoder", {"eos_token_ids": 2}, BundleCorruptError, "eos_token_ids: expected a list, got 2"),
        ("decoder", {"eos_token_ids": [2, True]}, BundleCorruptError, "eos_token_ids: expected int, got True"),
        ("decoder", {"max_position_embeddings": 10**9}, BundleCorruptError, "max_position_embeddings .* is more than"),
        ("vision", {"patch_size": 0}, BundleCorruptError, "patch_size must be positive"),
        ("abstractor", {"num_learnable_queries": 3}, BackendError, "does not fit the manifest: image_rows has shape"),
        ("preprocess", {"mean": [1.0, 2.0]}, BundleCorruptError, "mean: expected a list of 3"),
        ("preprocess", {"std": ["a", "b", "c"]}, BundleCorruptError, "std: expected float, got 'a'"),
        (
            "preprocess",
            {"mode": "stretch"},
            BundleCorruptError,
            "preprocess 'stretch' is not known; use resize",
        ),
    ],
)
def test_a_model_that_was_edited(
    copy: Path, part: str, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    model = json.loads((copy / "owl2.json").read_text())["model"]
    edit_manifest(copy, model=model | {part: model[part] | changes})
    with pytest.raises(error, match=message):
        Owl2.load(copy)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"device": "abacus"}, ConfigError, "device 'abacus' is not known; use cpu, cuda"),
        ({"threads": 0}, ConfigError, "threads must be positive, got 0"),
        ({"threads": 100_000}, ConfigError, "threads 100000 is more than this machine can use; give at most"),
        ({"context": 0}, ConfigError, "context must be positive, got 0"),
        ({"context": 4096}, ConfigError, "context 4096 exceeds the 2048 positions this model was trained for"),
    ],
)
def test_settings_that_cannot_work(
    bundle_a1: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Owl2.load(bundle_a1, **settings)
