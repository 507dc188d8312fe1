"""Conversations in files: continued as if never interrupted, refused where damaged or foreign."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, GOLDEN, rehash
from numpy.testing import assert_array_equal

from owl2 import EncodedImage, ImageError, Owl2, Owl2Error, SavedChatError, saved_messages
from owl2.runtime.engine import BackendName
from owl2.runtime.saved_chat import KIND
from owl2.runtime.spec import KvType
from owl2.runtime.stored import LENGTH_BYTES, METADATA, Stored, read_stored, write_stored

IMAGES = sorted((GOLDEN / "images").glob("*.png"))
PICTURE = IMAGES[0]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_cache", ["fp32", "fp16", "int8"])
def test_a_loaded_chat_goes_on_as_if_never_interrupted(
    bundle_a1: Path, tmp_path: Path, backend: BackendName, kv_cache: KvType
) -> None:
    if backend == "onnxruntime" and kv_cache != "fp32":
        pytest.skip("this bundle has one type of K/V cache in ONNX Runtime")
    with Owl2.load(bundle_a1, backend=backend, kv_cache=kv_cache) as owl:
        chat = owl.chat()
        chat.ask("What is this?", images=[IMAGES[0]], **OPTIONS)
        chat.ask("And this?", images=[IMAGES[1]], **OPTIONS)
        chat.save(tmp_path / "chat")
        expected = chat.ask("Compare them.", **OPTIONS)
    with Owl2.load(bundle_a1, backend=backend, kv_cache=kv_cache) as owl:
        loaded = owl.load_chat(tmp_path / "chat")
        answer = loaded.ask("Compare them.", **OPTIONS)
        assert (answer.ids, answer.logprobs) == (expected.ids, expected.logprobs)
        assert answer.stats.reused_tokens == expected.stats.reused_tokens > 0
        assert answer.stats.images_encoded == 0
        # What was loaded can be saved, forked and taken back as any other.
        loaded.undo()
        loaded.save(tmp_path / "again")
        assert owl.load_chat(tmp_path / "again").ask("Compare them.", **OPTIONS).ids == expected.ids


def test_a_file_is_replaced_as_a_whole_and_private(owl: Owl2, tmp_path: Path) -> None:
    chat, path = owl.chat(), tmp_path / "chat"
    chat.save(path)
    chat.ask("What is this?", images=[PICTURE], **OPTIONS)
    chat.save(path)
    assert len(owl.load_chat(path).messages) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat"]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="missing"):
        chat.save(tmp_path / "missing" / "chat")


def test_the_text_can_be_taken_alone(owl: Owl2, tmp_path: Path) -> None:
    chat = owl.chat()
    said = chat.ask("What is this?", images=[PICTURE], **OPTIONS).text
    chat.save(tmp_path / "chat")
    content = bytearray((tmp_path / "chat").read_bytes())
    content[-1] ^= 1
    (tmp_path / "chat").write_bytes(content)
    with pytest.raises(SavedChatError, match="saved_messages"):
        owl.load_chat(tmp_path / "chat")
    assert saved_messages(tmp_path / "chat") == [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": said},
    ]


@pytest.fixture(scope="module")
def saved(owl: Owl2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "chat"
    chat = owl.chat()
    chat.ask("What is this?", images=[PICTURE], **OPTIONS)
    chat.save(path)
    return path


def _flip(place: float) -> Callable[[bytearray], None]:
    def damage(content: bytearray) -> None:
        content[int(place * (len(content) - 1))] ^= 1

    return damage


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytearray], None]:
    """A change of the header that keeps its length's field right."""

    def damage(content: bytearray) -> None:
        length = int.from_bytes(content[:LENGTH_BYTES], "little")
        header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
        change(header)
        text = json.dumps(header).encode()
        content[: LENGTH_BYTES + length] = len(text).to_bytes(LENGTH_BYTES, "little") + text

    return damage


DAMAGES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "empty": (lambda content: content.clear(), "only its first 0 bytes"),
    "a few bytes": (lambda content: content.__delitem__(slice(5, None)), "only its first 5 bytes"),
    "cut in the header": (lambda content: content.__delitem__(slice(100, None)), "only its first 100 bytes"),
    "cut in the data": (lambda content: content.__delitem__(slice(-100, None)), "cut off or added to"),
    "something behind it": (lambda content: content.extend(b"more"), "cut off or added to"),
    "another file": (
        lambda content: content.__setitem__(slice(0, 8), b"\x89PNG\r\n\x1a\n"),
        "not a saved conversation",
    ),
    "the header is no JSON": (lambda content: content.__setitem__(8, ord("[")), "not"),
    "no metadata": (_header(lambda header: header.pop(METADATA)), "not a saved conversation"),
    "another kind": (_header(lambda header: header[METADATA].update(kind="image")), "holds a saved .image."),
    "a later version": (_header(lambda header: header[METADATA].update(version="9")), "version '9'"),
    "another text": (_header(lambda header: header[METADATA].update(description="{}")), "header was changed"),
    "another shape": (_header(lambda header: header["keys"].update(shape=[1, 2])), "header was changed"),
    "a byte of the values": (_flip(1.0), "kv.values was changed"),
    "a byte of the keys": (_flip(0.6), "was changed"),
    "hashes of nothing": (_header(lambda header: header[METADATA].update(hashes="{}")), "header was changed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(owl: Owl2, saved: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    content = bytearray(saved.read_bytes())
    change(content)
    (tmp_path / "chat").write_bytes(content)
    with pytest.raises(SavedChatError, match=message):
        owl.load_chat(tmp_path / "chat")


INSIDE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "another bundle": (lambda told, _: told.update(bundle="0"), "another bundle"),
    "no turns": (lambda told, _: told.pop("turns"), "no list of turns"),
    "half a turn": (lambda told, _: told["turns"][0].pop("answer"), "turns is not whole"),
    "an image too few": (lambda told, _: told.update(images=[]), "turns is not whole"),
    "rows of another width": (lambda _, arrays: arrays.update({"rows.0": arrays["rows.0"][:, :-1]}), "image 0"),
    "a token beyond the vocabulary": (lambda _, arrays: arrays["keys"].__setitem__((0, 0), 10**6), "neither a token"),
    "an image that is not there": (lambda _, arrays: arrays["keys"].__setitem__((0, 1), 7), "neither a token"),
    "too few values": (lambda _, arrays: arrays.update({"kv.values": arrays["kv.values"][:-4]}), "do not fit"),
    "no values": (lambda _, arrays: arrays.pop("kv.values"), "kv|values|missing|fit"),
    "unknown form": (lambda told, _: told.pop("cache"), "what its keys and values are"),
}


@pytest.mark.parametrize("change", INSIDE)
def test_contents_that_make_no_sense_are_named(owl: Owl2, saved: Path, tmp_path: Path, change: str) -> None:
    stored = read_stored(saved, KIND)
    told = json.loads(json.dumps(stored.description))
    arrays = {name: array.copy() for name, array in stored.arrays.items()}
    edit, message = INSIDE[change]
    edit(told, arrays)
    write_stored(tmp_path / "chat", KIND, Stored(told, arrays))
    with pytest.raises(SavedChatError, match=message):
        owl.load_chat(tmp_path / "chat")


def test_another_type_of_cache_is_refused_with_its_name(bundle_a1: Path, saved: Path, tmp_path: Path) -> None:
    with Owl2.load(bundle_a1, backend="native", kv_cache="int8") as owl, pytest.raises(Owl2Error, match=r"fp32.*int8"):
        owl.load_chat(saved)


def test_a_bundle_of_other_weights_is_refused(copy: Path, saved: Path) -> None:
    path = copy / "embeddings.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    rehash(copy, "embeddings.bin")
    with Owl2.load(copy) as other, pytest.raises(SavedChatError, match="another bundle"):
        other.load_chat(saved)


class TestEncodedImages:
    def test_an_encoded_image_answers_as_before_and_after_saving(self, owl: Owl2, tmp_path: Path) -> None:
        image = owl.encode(PICTURE)
        image.save(tmp_path / "a.owl2image")
        loaded = EncodedImage.load(tmp_path / "a.owl2image")
        assert_array_equal(loaded.rows, image.rows)
        now = owl.chat().ask("What is this?", images=[image], **OPTIONS)
        later = owl.chat().ask("What is this?", images=[loaded], **OPTIONS)
        named = owl.chat().ask("What is this?", images=[tmp_path / "a.owl2image"], **OPTIONS)
        assert now.ids == later.ids == named.ids
        assert now.logprobs == later.logprobs == named.logprobs
        assert now.stats.images_encoded == 0
        plain = owl.chat().ask("What is this?", images=[PICTURE], **OPTIONS)
        assert np.allclose(plain.logprobs[:1], now.logprobs[:1], atol=0.05)  # rows are rounded to float16

    def test_rows_of_another_tower_are_refused(self, owl: Owl2) -> None:
        with pytest.raises(ImageError, match="another vision tower"):
            owl.chat().ask("What is this?", images=[replace(owl.encode(PICTURE), vision="0")])

    def test_a_conversation_is_no_image(self, owl: Owl2, saved: Path, tmp_path: Path) -> None:
        shutil.copy(saved, tmp_path / "a.owl2image")
        with pytest.raises(ImageError, match="expected a saved image"):
            owl.chat().ask("What is this?", images=[tmp_path / "a.owl2image"])
