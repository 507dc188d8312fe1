"""Prompts to token ids and back, as the original's slow LlamaTokenizer does it; placeholders become -200."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from owl2.runtime.config import IMAGE_TOKEN, IMAGE_TOKEN_ID
from owl2.runtime.errors import BundleCorruptError, BundleError, PromptError
from owl2.runtime.foreign import read_bytes, read_json, reading, shorten

SPACE = "▁"
MODEL_BYTES = 64 << 20
"""Largest tokenizer.model that is read; that of LLaMA 2 has 500 kB."""

# The strings LlamaTokenizer uses where the files name none.
DEFAULT_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL_ROLES = (*DEFAULT_SPECIALS, "pad_token", "sep_token", "cls_token", "mask_token")
# Only these values are implemented; models of this family use no others.
FIXED_SETTINGS = {"add_bos_token": True, "add_eos_token": False, "additional_special_tokens": []}


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A string that stands for one id wherever it occurs, and whether it swallows the blanks next to it."""

    id: int
    strip_left: bool
    strip_right: bool


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        model: the sentencepiece model.
        specials: special strings, as the tokenizer's files name them.
        surfaces: text of every id, with spaces as "▁"; one ``bytes`` for a byte piece.
        bos_id, eos_id, unk_id: ids of the three roles every LLaMA tokenizer has.
        legacy: whether text after a special string gets a leading space, as in mPLUG-Owl2.
    """

    model: SentencePieceProcessor
    specials: Mapping[str, SpecialToken]
    surfaces: Sequence[str | bytes]
    bos_id: int
    eos_id: int
    unk_id: int
    legacy: bool

    @classmethod
    def load(cls, folder: Path, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> Tokenizer:
        """Read tokenizer.model, tokenizer_config.json and special_tokens_map.json.

        Args:
            folder: of the files.
            defaults: contents of JSON files that may be missing, by name; a bundle has all of them.

        Raises:
            BundleCorruptError: a file is missing or unreadable.
            BundleError: the files ask for something that LLaMA tokenizers do not do.
        """
        model = _load_model(folder / "tokenizer.model")
        config, special_map = (
            dict((defaults or {})[name])
            if name in (defaults or {}) and not (folder / name).exists()
            else _load_json(folder / name)
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        for key, expected in FIXED_SETTINGS.items():
            given = special_map.get(key) or config.get(key)
            if given not in (None, expected):
                raise BundleError(
                    f"{folder}: the tokenizer's {key} is {shorten(given)}, only {expected!r} is supported; "
                    "use the tokenizer files of the original checkpoint"
                )
        named = {role: name for role in SPECIAL_ROLES if (name := _named(role, config, special_map))}
        specials: dict[str, SpecialToken] = {}
        # Where two roles share a string, the one that strips less wins.
        for content, left, right in sorted(named.values(), key=lambda name: name[1:], reverse=True):
            token = model.piece_to_id(content)
            if model.id_to_piece(token) != content:
                raise BundleError(
                    f"{folder}: the special token {shorten(content)} is not in tokenizer.model; "
                    "tokens added to its vocabulary are not supported"
                )
            specials[content] = SpecialToken(token, left, right)
        with _reading(folder / "tokenizer.model"):  # a piece may be no text, or one of a byte no number
            pieces: list[str] = model.id_to_piece(list(range(model.vocab_size())))
            surfaces = tuple(_surface(model, token, piece) for token, piece in enumerate(pieces))
        return cls(
            model=model,
            specials=specials,
            surfaces=surfaces,
            bos_id=specials[named["bos_token"][0]].id,
            eos_id=specials[named["eos_token"][0]].id,
            unk_id=specials[named["unk_token"][0]].id,
            legacy=config.get("legacy") is not False,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.surfaces)

    @property
    def longest(self) -> int:
        """Characters that one position stands for, at most, unless a special string swallows blanks."""
        return max(len(text) for text in (*self.surfaces, *self.specials, IMAGE_TOKEN))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special strings."""
        return frozenset(special.id for special in self.specials.values())

    def encode_prompt(self, prompt: str, *, parse_special: bool = True) -> list[int]:
        """Ids of a prompt, with -200 for every image placeholder.

        Each chunk between placeholders is tokenized separately and gets its own leading space. BOS goes to the
        first chunk only, or to every chunk if the prompt starts with a placeholder: the original's rule.

        Args:
            prompt: rendered conversation or free text.
            parse_special: whether ``</s>`` and the like in the text become special ids. Turn it off for text
                from strangers, unless the conversation template rendered it: its separators need it.

        Raises:
            PromptError: the text is not valid Unicode.
        """
        chunks = prompt.split(IMAGE_TOKEN)
        ids: list[int] = []
        for position, chunk in enumerate(chunks):
            ids += [IMAGE_TOKEN_ID] if position > 0 else []
            if chunk:
                ids += self.encode(chunk, bos=position == 0 or not chunks[0], parse_special=parse_special)
        return ids

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of text without image placeholders.

        Raises:
            PromptError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode: {error.reason} at position {error.start}; "
                "decode its source as UTF-8 before passing it on"
            ) from error
        ids = [self.bos_id] if bos else []
        if not parse_special:
            return ids + list(self.model.encode(text))
        if not self.legacy:
            text = text.replace(SPACE, " ")
        for position, part in enumerate(self._split_specials(text)):
            if part in self.specials:
                ids.append(self.specials[part].id)
            elif part:
                ids.extend(self._encode_part(part, is_first=position == 0))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; invalid UTF-8 gives one U+FFFD per byte.

        With ``skip_special`` off, special ids are written out and each run between them is decoded separately.
        transformers 4.31 puts a space in front of a run that a special id closes, and so does this.

        Raises:
            BundleError: an id is not in the vocabulary.
        """
        self.check_ids(ids)
        special_ids = self.special_ids
        text, run = "", list[int]()
        for token in ids:
            if token not in special_ids:
                run.append(token)
            elif not skip_special:
                text += (" " if run else "") + self.model.decode(run) + self.model.id_to_piece(token)
                run = []
        return text + str(self.model.decode(run))

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise :class:`BundleError` for the first id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise BundleError(
                    f"token id {token} is outside the tokenizer's vocabulary 0..{self.vocab_size - 1}; "
                    "the tokenizer and the model of this bundle do not belong together"
                )

    def _split_specials(self, text: str) -> list[str]:
        """Ordinary text at even places, special strings at odd ones, blanks stripped as they ask."""
        by_length = sorted(self.specials, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, by_length))})", text)
        for i in range(1, len(parts), 2):
            special = self.specials[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip() if special.strip_left else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if special.strip_right else parts[i + 1]
        return parts

    def _encode_part(self, text: str, is_first: bool) -> list[int]:
        ids: list[int] = self.model.encode(text)
        first = self.model.id_to_piece(ids[0])
        if self.legacy or is_first or text.startswith(" ") or not first.startswith(SPACE):
            return ids
        # Without the legacy behaviour the leading space is cut off the first piece after the fact.
        rest = first.removeprefix(SPACE)
        return [self.model.piece_to_id(rest), *ids[1:]] if rest else ids[1:]


class StreamDecoder:
    """Decodes ids one at a time; the pieces joined are what :meth:`Tokenizer.decode` makes of all ids.

    Special ids are skipped. A character that is still incomplete is held back, never more than three bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special_ids = tokenizer.special_ids
        self._bytes = b""
        self._at_start = True

    def feed(self, token: int) -> str:
        """Text that ``token`` completes, possibly none.

        Raises:
            BundleError: the id is not in the vocabulary.
        """
        self._tokenizer.check_ids([token])
        if token in self._special_ids:
            return ""
        surface = self._tokenizer.surfaces[token]
        if isinstance(surface, bytes):
            self._bytes += surface
            return self._take(final=False)
        text = self._take(final=True)
        # The one space that tokenizing put in front of the text is not part of it.
        if self._at_start and surface:
            self._at_start = False
            surface = surface.removeprefix(SPACE)
        return text + surface.replace(SPACE, " ")

    def flush(self) -> str:
        """End the text: U+FFFD for each byte of a character that was never completed."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        text = ""
        while self._bytes:
            needed = _utf8_length(self._bytes[0])
            if len(self._bytes) < needed and not final:
                break
            try:
                text += self._bytes[:needed].decode()
            except UnicodeDecodeError:
                text += "\ufffd"
                needed = 1
            self._bytes = self._bytes[needed:]
        self._at_start = self._at_start and not text
        return text


def _utf8_length(lead: int) -> int:
    """Bytes of the UTF-8 character that ``lead`` would start."""
    return 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)


def _load_model(path: Path) -> SentencePieceProcessor:
    probe = "  a \u00bd"
    with _reading(path):
        model = SentencePieceProcessor(model_proto=read_bytes(path, MODEL_BYTES))
        adds_space = model.encode("a", out_type=str)[0].startswith(SPACE)
        keeps_text = adds_space and model.decode(model.encode(probe)) == probe
    if not keeps_text:
        raise BundleError(
            f"{path} is not a LLaMA tokenizer: it must keep text as it is, with byte fallback; copy it from the "
            "original checkpoint"
        )
    return model


def _load_json(path: Path) -> dict[str, Any]:
    with _reading(path):
        data = read_json(path)
    if not isinstance(data, dict):
        raise BundleCorruptError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _reading(path: Path) -> AbstractContextManager[None]:
    return reading(path, BundleCorruptError, "copy it from the original checkpoint")


def _named(role: str, config: dict[str, Any], special_map: dict[str, Any]) -> tuple[str, bool, bool] | None:
    """String of a special token and whether it strips blanks left and right; None if the files name none."""
    entry = special_map.get(role)
    if isinstance(entry, str):
        # As in transformers, only this way of naming a token makes it swallow the blanks next to it.
        return entry, True, True
    entry = entry or config.get(role) or DEFAULT_SPECIALS.get(role)
    if isinstance(entry, dict):
        return str(entry.get("content")), bool(entry.get("lstrip")), bool(entry.get("rstrip"))
    return (str(entry), False, False) if entry else None


def _surface(model: SentencePieceProcessor, token: int, piece: str) -> str | bytes:
    text = "" if model.is_control(token) else piece
    return bytes([int(piece[1:-1], 16)]) if model.is_byte(token) else text
