"""Ids and texts equal those of the original's slow tokenizer; streaming gives the same text in pieces."""

import json
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from conftest import GOLDEN, edit_json
from hypothesis import given, strategies as st

from owl2.runtime.config import IMAGE_TOKEN, IMAGE_TOKEN_ID
from owl2.runtime.errors import BundleCorruptError, BundleError, PromptError
from owl2.runtime.families.mplug_owl2.tokenizer import StreamDecoder, Tokenizer

CASES = ["a1_base_bin", "a2_fp16_safetensors", "a3_tokenizer_plain_special_map"]
OWL = [243, 162, 169, 140]  # the four byte pieces of U+1F989

# Ids that meet often at the edges of UTF-8: lead bytes, trail bytes, spaces, special ids, ordinary words.
EDGES = [3 + byte for byte in (0x00, 0x41, 0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xF8, 0xFF)]
TOKENS = st.sampled_from([*EDGES, 0, 1, 2, 13, 727, 284, 319]) | st.integers(3, 258) | st.integers(0, 799)


@cache
def load(case: str = "a1_base_bin") -> Tokenizer:
    return Tokenizer.load(GOLDEN / case / "model")


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """The tokenizer's files, to be damaged."""
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden / "a1_base_bin" / "model" / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_prompts_become_the_originals_ids(golden: Path, case: str) -> None:
    for entry in json.loads((golden / case / "prompts.json").read_text()):
        assert load(case).encode_prompt(entry["prompt"]) == entry["input_ids"], entry["id"]


@pytest.mark.parametrize("case", CASES)
def test_ids_become_the_originals_text(golden: Path, case: str) -> None:
    for entry in json.loads((golden / case / "tokenizer_decode.json").read_text()):
        assert load(case).decode(entry["ids"]) == entry["text_skip_special"], entry["id"]
        assert load(case).decode(entry["ids"], skip_special=False) == entry["text"], entry["id"]


def test_fields() -> None:
    tokenizer = load()
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 800
    assert tokenizer.special_ids == {0, 1, 2}


def test_special_strings_can_be_left_as_text() -> None:
    tokenizer = load()
    text = "say </s> and <s>, <unk>"
    plain = tokenizer.encode(text, parse_special=False)
    assert tokenizer.special_ids.isdisjoint(plain)
    assert tokenizer.decode(plain) == text
    assert {0, 1, 2} <= set(tokenizer.encode(text))


def test_placeholders_count_even_where_special_strings_do_not() -> None:
    ids = load().encode_prompt(f"a</s>{IMAGE_TOKEN}b", parse_special=False)
    assert ids.count(IMAGE_TOKEN_ID) == 1
    assert ids.count(2) == 0


def test_bos_is_asked_for() -> None:
    assert load().encode("") == []
    assert load().encode("", bos=True) == [1]
    assert load().encode("Hello.", bos=True) == [1, *load().encode("Hello.")]


# Recorded from transformers 4.31 with "legacy": false: no leading space after a special string.
@pytest.mark.parametrize(
    ("case", "text", "expected"),
    [
        ("a1_base_bin", "one</s>two", [1, 325, 728, 2, 0]),
        ("a1_base_bin", "one </s> two</s>▁three", [1, 325, 728, 727, 2, 727, 459, 2, 727, 576]),
        ("a1_base_bin", "</s>USER: hi", [1, 2, 0, 752, 297, 731]),
        ("a3_tokenizer_plain_special_map", "one </s> two</s>▁three", [1, 325, 728, 2, 0, 2, 0]),
    ],
)
def test_tokenizer_without_legacy_behaviour(case: str, text: str, expected: list[int]) -> None:
    assert replace(load(case), legacy=False).encode(text, bos=True) == expected


def test_legacy_is_read_from_the_file(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", legacy=False)
    assert not Tokenizer.load(folder).legacy
    edit_json(folder / "tokenizer_config.json", legacy=None)
    assert Tokenizer.load(folder).legacy


def test_only_plain_strings_of_the_special_map_swallow_blanks(folder: Path) -> None:
    ids = load().encode("a </s> b")
    edit_json(folder / "tokenizer_config.json", eos_token="</s>")
    (folder / "special_tokens_map.json").write_text("{}")
    assert Tokenizer.load(folder).encode("a </s> b") == ids
    edit_json(folder / "special_tokens_map.json", eos_token="</s>")
    assert Tokenizer.load(folder).encode("a </s> b") == load().encode("a</s>b")


@given(st.text())
def test_text_survives_encoding_and_decoding(text: str) -> None:
    ids = load().encode(text, parse_special=False)
    assert load().decode(ids) == text.replace("▁", " ")


@given(st.lists(TOKENS))
def test_streamed_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    stream = StreamDecoder(load())
    assert "".join(map(stream.feed, ids)) + stream.flush() == load().decode(ids)


@given(st.text())
def test_streaming_never_shows_half_a_character(text: str) -> None:
    stream = StreamDecoder(load())
    seen = ""
    for token in load().encode(text, parse_special=False):
        seen += stream.feed(token)
        assert text.replace("▁", " ").startswith(seen)


def test_incomplete_characters_are_held_back() -> None:
    stream = StreamDecoder(load())
    assert [stream.feed(token) for token in OWL] == ["", "", "", "\N{OWL}"]
    assert [stream.feed(token) for token in OWL[:2]] == ["", ""]
    assert stream.feed(319) == "\ufffd\ufffd USER"
    assert stream.feed(OWL[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@pytest.mark.parametrize("token", [-1, IMAGE_TOKEN_ID, 800])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    for decode in (StreamDecoder(load()).feed, lambda token: load().decode([1, token])):
        with pytest.raises(BundleError, match=rf"token id {token} is outside the tokenizer's vocabulary 0\.\.799"):
            decode(token)


def test_invalid_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="not valid Unicode: surrogates not allowed at position 2"):
        load().encode_prompt("ab\ud800")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"])
def test_missing_and_damaged_files_are_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff\xfe garbage"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(BundleCorruptError, match=f"cannot read .*{name}: .*; copy it from the original"):
            Tokenizer.load(folder)
    (folder / name).unlink()
    with pytest.raises(BundleCorruptError, match=f"cannot read .*{name}: it is missing; copy it"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config.json", b"[" * 100_000, "it is nested too deeply"),
        ("tokenizer_config.json", b'{"legacy": ' + b"9" * 5000 + b"}", "it has a number of 5000 digits"),
        ("tokenizer_config.json", b'{"sep_token": "\\ud800"}', "it has half of a surrogate pair"),
        ("special_tokens_map.json", '{"a": 1}'.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ("tokenizer_config.json", b" " * (17 << 20), "it has 17825792 bytes"),
    ],
)
def test_hostile_files_are_named(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(BundleCorruptError, match=f"cannot read .*{name}: {reason}.*; copy it from the original"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"])
def test_pipes_and_folders_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BundleCorruptError, match=f"cannot read .*{name}: it is not a regular file; copy it"):
        Tokenizer.load(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleCorruptError, match=f"cannot read .*{name}: it is a folder; copy it"):
        Tokenizer.load(folder)


def test_pieces_that_are_no_text(folder: Path) -> None:
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(model.replace("▁▁".encode(), b"\xff" * 6))
    with pytest.raises(BundleCorruptError, match=r"cannot read .*tokenizer\.model: .*; copy it from the original"):
        Tokenizer.load(folder)


def test_no_text_is_shorter_in_positions_than_told() -> None:
    tokenizer = load()
    for text in (" " * 1000, "".join(str(surface) for surface in tokenizer.surfaces), "<s></s>" * 100, IMAGE_TOKEN * 9):
        assert len(tokenizer.encode_prompt(text)) >= len(text) // tokenizer.longest


def test_files_of_another_kind_are_refused(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text("[]")
    with pytest.raises(BundleCorruptError, match=r"special_tokens_map\.json must hold a JSON object, got list"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token is False, only True is supported"),
        ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token is True, only False is supported"),
        (
            "special_tokens_map.json",
            {"additional_special_tokens": ["<x>"]},
            r"special token '<x>' is neither in tokenizer\.model nor in the added_tokens_decoder",
        ),
        (
            "special_tokens_map.json",
            {"pad_token": "[PAD]"},
            r"special token '\[PAD\]' is neither in tokenizer\.model nor in",
        ),
    ],
)
def test_unsupported_settings_are_refused(folder: Path, name: str, change: dict[str, object], message: str) -> None:
    edit_json(folder / name, **change)
    with pytest.raises(BundleError, match=message):
        Tokenizer.load(folder)
