"""A bundle is used when every file is what the manifest says, and refused with the reason otherwise."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_manifest, flip_byte, rehash, write_manifest

from owl2 import Owl2, verify
from owl2.runtime import spec
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
    data = json.loads((copy / "owl2.json").read_text())
    data["template"] = data.pop("family")
    data["model"]["decoder"]["eos_token_id"] = data["model"]["decoder"].pop("eos_token_ids")[0]
    expected = Owl2.load(copy).chat().ask("Hi", max_new_tokens=5)
    write_old_manifest(copy, data, 3)
    assert read_manifest(copy).family == "mplug_owl2"
    assert Owl2.load(copy).chat().ask("Hi", max_new_tokens=5).ids == expected.ids


def write_old_manifest(bundle: Path, content: dict[str, Any], version: int) -> None:
    """Write a manifest of a format that has no digest."""
    content = {key: value for key, value in content.items() if key not in ("digest", "preset")}
    (bundle / "owl2.json").write_text(json.dumps(content | {"format": version}))


def test_a_bundle_of_format_5(copy: Path) -> None:
    """It named no preset."""
    content = json.loads((copy / "owl2.json").read_text()) | {"format": 5}
    write_manifest(copy, content)
    with pytest.raises(BundleCorruptError, match="unknown keys preset"):
        read_manifest(copy)
    del content["preset"]
    write_manifest(copy, content)
    assert read_manifest(copy).preset == ""
    assert verify(copy).passed


def test_a_bundle_of_format_4(copy: Path) -> None:
    """It knew one end token."""
    data = json.loads((copy / "owl2.json").read_text())
    decoder = data["model"]["decoder"]
    del decoder["eos_token_ids"]
    decoder["eos_token_id"] = 7
    write_old_manifest(copy, data, 4)
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


@pytest.mark.parametrize("version", [0, 2, 7, "4", None, [4], True, 4.0, 10**60])
def test_unknown_format_version(copy: Path, version: object) -> None:
    edit_manifest(copy, format=version)
    with pytest.raises(
        BundleVersionError,
        match=r"this owl2 reads versions 3 to 6; export the checkpoint again \(owl2-export CHECKPOINT BUNDLE --over",
    ):
        Owl2.load(copy)


class TestDigest:
    def test_as_the_page_computes_it(self, bundle_a1: Path) -> None:
        """docs/bundle.md: what any other tool does."""
        content = json.loads((bundle_a1 / "owl2.json").read_text())
        digest = content.pop("digest")
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        assert digest == hashlib.sha256(text.encode()).hexdigest() == read_manifest(bundle_a1).digest

    @pytest.mark.parametrize("digest", ["0" * 64, None, 3, "missing"])
    def test_another_one(self, copy: Path, digest: object) -> None:
        path = copy / "owl2.json"
        content = json.loads(path.read_text()) | {"digest": digest}
        if digest == "missing":
            del content["digest"]
        path.write_text(json.dumps(content))
        with pytest.raises(
            BundleCorruptError, match=r"its digest is not that of its content; copy or export the bundle again"
        ):
            read_manifest(copy)

    def test_a_key_twice(self, copy: Path) -> None:
        path = copy / "owl2.json"
        path.write_text(path.read_text().replace('"bos_token_id": 1', '"bos_token_id": 13, "bos_token_id": 1'))
        with pytest.raises(BundleCorruptError, match="the key 'bos_token_id' occurs more than once"):
            read_manifest(copy)

    def test_the_formats_before_have_none(self, copy: Path) -> None:
        path = copy / "owl2.json"
        content = json.loads(path.read_text())
        write_old_manifest(copy, content, 4)
        verdict = verify(copy)
        assert verdict.passed
        assert "were not compared: an older owl2 exported this bundle" in verdict.notes[0]
        del content["preset"]
        path.write_text(json.dumps(content | {"format": 4}))
        with pytest.raises(BundleCorruptError, match="unknown keys digest"):
            read_manifest(copy)

    def test_writing_an_old_manifest_again_renews_it(self, copy: Path) -> None:
        content = json.loads((copy / "owl2.json").read_text())
        write_old_manifest(copy, content, 4)
        assert json.loads(json.dumps(read_manifest(copy).sealed())) == content


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
        ({"files": {"decoder.onnx": {"size": 10**50, "sha256": "x"}}}, "size: 10+ is beyond 9007199254740992"),
        ({"files": {f"f{i}": {"size": 1, "sha256": "x"} for i in range(65)}}, "files: 65 entries are more than 64"),
        ({"engines": {"tensorrt-sm87": "0" * 300}}, "engines.tensorrt-sm87: a text of 300 characters is too long"),
        ({"producer": "x" * 10_000}, "producer: a text of 10000 characters is too long"),
        ({"kv_cache": {"fp32": "1.22", "x" * 10_000: "1.22"}}, "kv_cache: 'x+… is not known"),
        ({"\x1b[31m" * 500: 1}, r"unknown keys \\x1b\[31m.*…; known"),
        ({"engines": {"../x": "0"}}, r"engines: '../x' is not a plain file name"),
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
    with pytest.raises(BundleCorruptError, match=r"cannot read .*owl2\.json: it is not JSON: .*; copy or export"):
        Owl2.load(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 5000, "it is nested too deeply"),
        ('{"format": ' + "9" * 400 + "}", "it has a number of 400 digits"),
        (" " * (2 << 20), "it has 2097152 bytes, at most 1048576 are read"),
        ("3", "it has format version None"),
        ('{"format": 5, "a": ' + "[" * 800 + "]" * 800 + "}", "nested too deeply|its digest is not that"),
    ],
)
def test_a_hostile_manifest(copy: Path, content: str, message: str) -> None:
    (copy / "owl2.json").write_text(content)
    with pytest.raises(BundleError, match=message.replace("it has format", "has format")):
        Owl2.load(copy)


@pytest.mark.parametrize(
    "name", ["../outside", "a/b", "..", ".hidden", "a\\b", "", "nul.txt", "COM1", "end.", "a\nb", "é", "x" * 101]
)
def test_names_of_files_are_plain(copy: Path, name: str) -> None:
    files = json.loads((copy / "owl2.json").read_text())["files"]
    edit_manifest(copy, files=files | {name: {"size": 6, "sha256": "0" * 64}})
    with pytest.raises(BundleCorruptError, match="is not a plain file name"):
        Owl2.load(copy)


@pytest.mark.parametrize("name", [*spec.BUNDLE_FILES, spec.MANIFEST])
def test_a_pipe_or_a_folder_in_the_place_of_a_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(BundleCorruptError, match=rf"{name}(: it)? is not a regular file"):
        Owl2.load(copy)
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(BundleCorruptError, match=rf"{name}(:| is) (not a regular file|it is a folder)"):
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
    (copy / "vision.onnx").write_bytes(b"")  # a message of Protocol Buffers without fields
    rehash(copy, "vision.onnx")
    with pytest.raises(BackendError, match=r"vision\.onnx cannot be loaded: "):
        Owl2.load(copy, backend="onnxruntime")


@pytest.mark.parametrize(
    ("part", "changes", "error", "message"),
    [
        ("decoder", {"vocab_size": 900}, BundleCorruptError, "embeddings.bin has .* the model's token table takes"),
        ("decoder", {"num_attention_heads": 0}, BundleCorruptError, "num_attention_heads must be positive, got 0"),
        ("decoder", {"num_attention_heads": 8}, BackendError, "does not fit the manifest: past_key_values.0.key"),
        ("decoder", {"num_hidden_layers": 4}, BackendError, "does not fit the manifest: past_key_values.3.key"),
        ("decoder", {"num_hidden_layers": 10**6}, BundleCorruptError, "num_hidden_layers 1000000 is more than 512"),
        ("decoder", {"vocab_size": 10**7}, BundleCorruptError, "vocab_size 10000000 is more than"),
        ("decoder", {"hidden_size": 10**9}, BundleCorruptError, "hidden_size 1000000000 is more than"),
        ("decoder", {"hidden_size": 1 << 16, "max_position_embeddings": 1 << 20}, BundleCorruptError, "rotary table"),
        ("vision", {"num_hidden_layers": 10**6}, BundleCorruptError, "num_hidden_layers 1000000 is more than 512"),
        ("vision", {"image_size": 14 * 10**6}, BundleCorruptError, "image_size 14000000 is more than 4096"),
        ("abstractor", {"num_learnable_queries": 10**9}, BundleCorruptError, "num_learnable_queries .* is more than"),
        ("preprocess", {"size": 10**9}, BundleCorruptError, "size 1000000000 is more than 8192"),
        ("decoder", {"bos_token_id": 3}, BundleError, "its bos_token has the id 1, the model's bos_token_id is 3"),
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
