"""Added tokens of all files become the original's ids and texts, or are refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json

from owl2.export.checkpoint.tokenizer_source import read_tokenizer
from owl2.runtime.errors import BundleError, CheckpointError, ConfigError, Owl2Error
from owl2.runtime.families.mplug_owl2.tokenizer import StreamDecoder, Tokenizer
from owl2.runtime.spec import TOKENIZER_FILES

Json = dict[str, Any]

# Recorded from the slow LlamaTokenizer of transformers 4.31.0, which the original uses, and of 4.44.2, which describes
# added tokens in tokenizer_config.json: files as saved, random texts with their ids, and, from 4.31.0 only, random ids
# with their texts, without special tokens and with them.
RECORDED = json.loads((Path(__file__).parent / "added_tokens.json").read_text())


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """Tokenizer files without added tokens."""
    for name in TOKENIZER_FILES:
        shutil.copy(golden / "a1_base_bin" / "model" / name, tmp_path)
    return tmp_path


def written(folder: Path, changed: Mapping[str, Mapping[str, Any]]) -> Path:
    """The tokenizer's files as a bundle has them."""
    for name, content in changed.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", RECORDED, ids=[case["name"] for case in RECORDED])
def test_added_tokens_as_recorded(folder: Path, case: Json) -> None:
    for name, content in case["files"].items():
        (folder / name).write_text(json.dumps(content))
    source = read_tokenizer(folder, rows=900)
    for name in ("added_tokens.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)  # a bundle does not have them
    for tokenizer in (source.tokenizer, Tokenizer.load(written(folder, source.changed))):
        for text, ids in case["texts"]:
            assert tokenizer.encode(text, bos=True) == ids, text
        for ids, without_special, text in case["decoded"]:
            assert tokenizer.decode(ids) == without_special, ids
            assert tokenizer.decode(ids, skip_special=False) == text, ids
            stream = StreamDecoder(tokenizer)
            assert "".join(map(stream.feed, ids)) + stream.flush() == without_special, ids


def test_files_without_added_tokens_stay_as_they_are(folder: Path, sample_checkpoint: Path) -> None:
    for source in (read_tokenizer(folder, rows=800), read_tokenizer(sample_checkpoint, rows=1024)):
        assert source.changed == {}
        assert source.notes == ()


def test_tokens_of_the_fast_tokenizers_file(folder: Path) -> None:
    """transformers 5 writes no other."""
    entry = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    tokens = [{"id": 1, "content": "<s>", **entry}, {"id": 800, "content": "<box>", **entry}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {}}))
    tokenizer = read_tokenizer(folder, rows=801).tokenizer
    assert tokenizer.encode("<box>  a") == [800, *tokenizer.encode("a")]
    assert tokenizer.encode("<s> a") == [1, *tokenizer.encode(" a")]
    assert tokenizer.decode([800]) == "<box>"


def test_a_special_token_without_an_id_gets_the_next_one(folder: Path) -> None:
    """As in transformers."""
    edit_json(folder / "special_tokens_map.json", additional_special_tokens=["<box>"])
    tokenizer = read_tokenizer(folder, rows=801).tokenizer
    assert tokenizer.encode("<box>") == [800]
    assert 800 in tokenizer.special_ids
    edit_json(folder / "special_tokens_map.json", additional_special_tokens=["<box>", "</box>"])
    with pytest.raises(CheckpointError, match="</box>, <box> are special tokens without ids; add added_tokens"):
        read_tokenizer(folder, rows=802)


def test_a_padding_token_without_a_row_is_left_out(folder: Path) -> None:
    edit_json(folder / "special_tokens_map.json", pad_token="[PAD]")
    (folder / "added_tokens.json").write_text('{"[PAD]": 800}')
    source = read_tokenizer(folder, rows=800)
    assert source.notes == ("the padding token '[PAD]' has id 800, beyond the token table; it is left out",)
    assert source.outdated == ("added_tokens.json", "tokenizer.json")
    assert Tokenizer.load(written(folder, source.changed)).vocab_size == 800


def test_a_padding_token_with_a_row_is_kept(folder: Path) -> None:
    edit_json(folder / "special_tokens_map.json", pad_token="[PAD]")
    (folder / "added_tokens.json").write_text('{"[PAD]": 800}')
    source = read_tokenizer(folder, rows=801)
    assert source.outdated == ()
    tokenizer = source.tokenizer
    assert tokenizer.encode("[PAD]") == [800]
    assert tokenizer.decode([800]) == ""


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            {"added_tokens.json": {"<a>": 5}},
            CheckpointError,
            r"token 5 is '<a>' in added_tokens.json and '<0x02>' in tok",
        ),
        ({"added_tokens.json": {"<a>": "5"}}, CheckpointError, "an added token needs a text and an id, got"),
        (
            {"added_tokens.json": {"</s>": 800}},
            CheckpointError,
            "'</s>' is token 800 in added_tokens.json and token 2 in",
        ),
        (
            {"added_tokens.json": {"<a>": 800}, "tokenizer.json": {"added_tokens": [{"id": 801, "content": "<a>"}]}},
            CheckpointError,
            "'<a>' is token 801 in tokenizer.json and token 800 in added_tokens.json; use files that belong together",
        ),
        (
            {"added_tokens.json": {"<a>": 800}, "tokenizer.json": {"added_tokens": [{"id": 800, "content": "<b>"}]}},
            CheckpointError,
            "token 800 is '<b>' in tokenizer.json and '<a>' in added_tokens.json",
        ),
        (
            {"added_tokens.json": {"<a>": 800, "<b>": 801}},
            CheckpointError,
            "<b> have ids up to 801, but the token table has 801 rows; export the checkpoint whose table was resized",
        ),
        ({"tokenizer.json": {"added_tokens": ["<a>"]}}, CheckpointError, "an added token needs a text and an id"),
        ({"added_tokens.json": [1]}, BundleError, "must hold a JSON object, got list"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    folder: Path, files: Json, error: type[Owl2Error], message: str
) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        read_tokenizer(folder, rows=801)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"800": {"content": "<a>", "single_word": True}},
            BundleError,
            "'<a>' has single_word, which is not supported",
        ),
        ({"7": {"content": "<a>"}}, BundleError, "calls token 7 '<a>', tokenizer.model calls it '<0x04>'"),
        ({"800": {"content": ""}}, BundleError, "must give each id a text of its own"),
        ({str(token): {} for token in range(10_001)}, BundleError, "of at most 10000 tokens, got dict of 10001"),
        ({"800": "<a>"}, BundleError, "must give each id a text of its own"),
        ({"-1": {"content": "<a>"}}, BundleError, "must give each id a text of its own"),
        ({"801": {"content": "<a>"}}, BundleError, r"leaves out ids: .* got \[801\]"),
        ([1], BundleError, "must be an object"),
    ],
)
def test_added_tokens_that_cannot_be_are_refused(
    folder: Path, change: object, error: type[Owl2Error], message: str
) -> None:
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=change)
    with pytest.raises(error, match=message):
        read_tokenizer(folder, rows=801)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces is True, but only False can be"),
        ({"split_special_tokens": True}, "split_special_tokens is True"),
        ({"sp_model_kwargs": {"enable_sampling": True, "alpha": 0.1}}, "sp_model_kwargs is {'enable_sampling'"),
        ({"add_prefix_space": False}, "add_prefix_space is False, but only True"),
        ({"tokenizer_class": "CodeLlamaTokenizer"}, "tokenizer_class is 'CodeLlamaTokenizer'"),
        ({"add_bos_token": False}, "add_bos_token is False, but only True"),
        ({"legacy": "no"}, "legacy must be true or false, got 'no'"),
    ],
)
def test_settings_that_change_ids_or_texts_are_refused(folder: Path, change: Json, message: str) -> None:
    edit_json(folder / "tokenizer_config.json", **change)
    with pytest.raises(ConfigError, match=f"^tokenizer_config.json: {message}"):
        read_tokenizer(folder, rows=800)


def test_files_must_agree_on_the_special_tokens(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<s>", added_tokens_decoder={"1": {"content": "<s>"}})
    with pytest.raises(ConfigError, match=r"special_tokens_map.json and .* call the eos_token </s>, <s>; keep the one"):
        read_tokenizer(folder, rows=800)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("special_tokens_map.json", {"additional_special_tokens": 5}),
        ("special_tokens_map.json", {"additional_special_tokens": [["<a>"]]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": 1}}),
    ],
)
def test_special_tokens_of_a_wrong_type_are_refused(folder: Path, name: str, change: Json) -> None:
    edit_json(folder / name, **change)
    with pytest.raises(BundleError, match="special_tokens must be a list of tokens, got"):
        read_tokenizer(folder, rows=800)
