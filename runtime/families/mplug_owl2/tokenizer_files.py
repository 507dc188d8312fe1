"""The files of a LLaMA tokenizer: the pieces of its model, the special strings, and the tokens added to both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from owl2.runtime.errors import BundleCorruptError, BundleError
from owl2.runtime.foreign import read_bytes, read_json, reading, shorten

SPACE = "▁"
COPY_IT = "copy it from the original checkpoint"

# The strings LlamaTokenizer uses where the files name none.
DEFAULT_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MORE_SPECIALS, NEWER_SPECIALS = "additional_special_tokens", "extra_special_tokens"
SPECIAL_ROLES = (*DEFAULT_SPECIALS, "pad_token", "sep_token", "cls_token", "mask_token")
ADDED = "added_tokens_decoder"
"""Key of tokenizer_config.json with the tokens that were added to those of tokenizer.model."""
# Only these values are implemented; models of this family use no others.
FIXED_SETTINGS: dict[str, tuple[object, ...]] = {"add_bos_token": (True,), "add_eos_token": (False,)}
MOST_ADDED = 10_000
"""Added tokens, at most: a text is searched for all of them."""
MODEL_BYTES = 64 << 20
"""Largest tokenizer.model that is read; that of LLaMA has 500 kB."""

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A string that stands for one id wherever it occurs in a text.

    Attributes:
        id: of the token.
        strip_left, strip_right: whether it swallows the blanks next to it.
    """

    id: int
    strip_left: bool
    strip_right: bool


def load_model(path: Path) -> tuple[SentencePieceProcessor, list[str]]:
    """Read tokenizer.model: the processor and its pieces, by id.

    Raises:
        BundleCorruptError: it is missing or unreadable.
        BundleError: it is not the model of a LLaMA tokenizer.
    """
    probe = "  a \u00bd"
    with reading(path, BundleCorruptError, COPY_IT):
        model = SentencePieceProcessor(model_proto=read_bytes(path, MODEL_BYTES))
        adds_space = model.encode("a", out_type=str)[0].startswith(SPACE)
        keeps_text = adds_space and model.decode(model.encode(probe)) == probe
        pieces: list[str] = model.id_to_piece(list(range(model.vocab_size())))
    if not keeps_text:
        raise BundleError(
            f"{path} is not a LLaMA tokenizer: it must keep text as it is, with byte fallback; copy it from the "
            "original checkpoint"
        )
    return model, pieces


def load_json(path: Path) -> dict[str, Any]:
    """Read one of the tokenizer's JSON files, an object.

    Raises:
        BundleCorruptError: it is missing or unreadable.
    """
    with reading(path, BundleCorruptError, COPY_IT):
        data = read_json(path)
    if not isinstance(data, dict):
        raise BundleCorruptError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def named_tokens(config: Json, special_map: Json) -> dict[str, tuple[str, bool, bool]]:
    """Special tokens by role, or by their own string: the string, and whether it strips blanks left and right.

    Raises:
        BundleError: they are not named by strings or objects.
    """
    named = {role: token for role in SPECIAL_ROLES if (token := _named(role, config, special_map))}
    listed = special_map.get(MORE_SPECIALS) or config.get(MORE_SPECIALS) or []
    newer = config.get(NEWER_SPECIALS) or []
    newer = list(newer.values()) if isinstance(newer, dict) else newer
    for name, value in ((MORE_SPECIALS, listed), (NEWER_SPECIALS, newer)):
        if not isinstance(value, list) or not all(isinstance(entry, str | dict) for entry in value):
            raise BundleError(f"the tokenizer's {name} must be a list of tokens, got {shorten(value)}")
    for entry in (*listed, *newer):
        if isinstance(entry, dict):
            content, left, right = str(entry.get("content")), bool(entry.get("lstrip")), bool(entry.get("rstrip"))
        else:
            content, left, right = str(entry), entry in listed, entry in listed
        named.setdefault(content, (content, left, right))
    return named


def _named(role: str, config: Json, special_map: Json) -> tuple[str, bool, bool] | None:
    """String of a special token and whether it strips blanks left and right; None if the files name none."""
    entry = special_map.get(role)
    if isinstance(entry, str):
        # As in transformers, only this way of naming a token makes it swallow the blanks next to it.
        return entry, True, True
    entry = entry or config.get(role) or DEFAULT_SPECIALS.get(role)
    if isinstance(entry, dict):
        return str(entry.get("content")), bool(entry.get("lstrip")), bool(entry.get("rstrip"))
    return (str(entry), False, False) if entry else None


def added_tokens(folder: Path, entries: object, pieces: Sequence[str]) -> dict[str, AddedToken]:
    """Tokens of ``added_tokens_decoder``, by their strings."""
    where = f"{folder}: {ADDED} of tokenizer_config.json"
    if not isinstance(entries, dict) or len(entries) > MOST_ADDED:
        raise BundleError(f"{where} must be an object of at most {MOST_ADDED} tokens, got {shorten(entries)}")
    added: dict[str, AddedToken] = {}
    for key, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or content in added or not re.fullmatch("[0-9]{1,9}", key):
            raise BundleError(f"{where} must give each id a text of its own, got {shorten({key: entry})}")
        token = int(key)
        if entry.get("single_word"):
            raise BundleError(
                f"{where}: {shorten(content)} has single_word, which is not supported; export a checkpoint without it"
            )
        if token < len(pieces) and pieces[token] != content:
            raise BundleError(
                f"{where} calls token {token} {shorten(content)}, tokenizer.model calls it {shorten(pieces[token])}; "
                "use files that belong together"
            )
        added[content] = AddedToken(token, bool(entry.get("lstrip")), bool(entry.get("rstrip")))
    beyond = sorted(token.id for token in added.values() if token.id >= len(pieces))
    if beyond != list(range(len(pieces), len(pieces) + len(beyond))):
        raise BundleError(
            f"{where} leaves out ids: those beyond the {len(pieces)} pieces of tokenizer.model must follow on them, "
            f"got {shorten(beyond)}"
        )
    return added


def check_settings(folder: Path, config: Json, special_map: Json) -> None:
    """Raise :class:`BundleError` for settings that are not implemented."""
    for key, allowed in FIXED_SETTINGS.items():
        given = special_map.get(key) or config.get(key)
        if given not in (None, *allowed):
            raise BundleError(
                f"{folder}: the tokenizer's {key} is {shorten(given)}, only {allowed[0]!r} is supported; "
                "use the tokenizer files of the original checkpoint"
            )
