"""Prompts to token ids and back, as the original's slow LlamaTokenizer does it; placeholders become -200."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from owl2.runtime.config import IMAGE_TOKEN, IMAGE_TOKEN_ID, DecoderConfig
from owl2.runtime.errors import BundleCorruptError, BundleError, PromptError
from owl2.runtime.families.mplug_owl2.tokenizer_files import (
    ADDED,
    COPY_IT,
    SPACE,
    AddedToken,
    Json,
    added_tokens,
    check_settings,
    load_json,
    load_model,
    named_tokens,
)
from owl2.runtime.foreign import reading, shorten


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        model: the sentencepiece model.
        added: special strings and added tokens, as the tokenizer's files name them.
        special_ids: those of ``added`` that decoding leaves out.
        surfaces: text of every id, with spaces as "▁"; one ``bytes`` for a byte piece.
        bos_id, eos_id, unk_id: ids of the three roles every LLaMA tokenizer has.
        legacy: whether text after a special string gets a leading space, as in mPLUG-Owl2.
    """

    model: SentencePieceProcessor
    added: Mapping[str, AddedToken]
    special_ids: frozenset[int]
    surfaces: Sequence[str | bytes]
    bos_id: int
    eos_id: int
    unk_id: int
    legacy: bool

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.model, tokenizer_config.json and special_tokens_map.json.

        Raises:
            BundleCorruptError: a file is missing or unreadable.
            BundleError: the files ask for something that LLaMA tokenizers do not do.
        """
        return cls.of(
            folder, load_json(folder / "tokenizer_config.json"), load_json(folder / "special_tokens_map.json")
        )

    @classmethod
    def of(cls, folder: Path, config: Json, special_map: Json) -> Tokenizer:
        """The tokenizer.model in ``folder`` with what the two other files hold; raises as :meth:`load`."""
        model, pieces = load_model(folder / "tokenizer.model")
        check_settings(folder, config, special_map)
        more = added_tokens(folder, config.get(ADDED) or {}, pieces)
        named = named_tokens(config, special_map)
        added, special_ids = dict[str, AddedToken](), set[int]()
        # Where two roles share a string, the one that strips less wins.
        for content, left, right in sorted(named.values(), key=lambda name: name[1:], reverse=True):
            token = model.piece_to_id(content)
            if content not in more and pieces[token] != content:
                raise BundleError(
                    f"{folder}: the special token {shorten(content)} is neither in tokenizer.model nor in the {ADDED} "
                    "of tokenizer_config.json; use the tokenizer files of the original checkpoint"
                )
            # Files that describe a token by itself say whether it strips, and then that counts.
            added[content] = more[content] if content in more else AddedToken(token, left, right)
            special_ids.add(added[content].id)
        added = {**more, **added}
        beyond = sorted((token.id, content) for content, token in more.items() if token.id >= len(pieces))
        with reading(folder / "tokenizer.model", BundleCorruptError, COPY_IT):  # a byte piece may hold no number
            surfaces = [_surface(model, token, piece) for token, piece in enumerate(pieces)]
        surfaces += [content for _, content in beyond]
        return cls(
            model=model,
            added=added,
            special_ids=frozenset(special_ids),
            surfaces=tuple(surfaces),
            bos_id=added[named["bos_token"][0]].id,
            eos_id=added[named["eos_token"][0]].id,
            unk_id=added[named["unk_token"][0]].id,
            legacy=config.get("legacy") is not False,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.surfaces)

    @property
    def longest(self) -> int:
        """Characters that one position stands for, at most, unless a special string swallows blanks."""
        return max(len(text) for text in (*self.surfaces, *self.added, IMAGE_TOKEN))

    @property
    def apart(self) -> Mapping[int, str]:
        """Text of the ids that are decoded by themselves, with a space to what is next to them."""
        pieces = self.model.vocab_size()
        return {
            token.id: content
            for content, token in self.added.items()
            if token.id >= pieces or token.id not in self.special_ids
        }

    def surface_bytes(self, token: int) -> bytes:
        """What a token adds to a text in UTF-8, its leading space included.

        Nothing for one that is not a token, or is the byte of a space: of all spaces it alone would stay at the
        beginning of a text, and pieces with a space do for the others.
        """
        if token in self.special_ids or token >= len(self.surfaces):
            return b""
        surface = self.surfaces[token]
        if isinstance(surface, bytes):
            return b"" if surface == b" " else surface
        return surface.replace(SPACE, " ").encode()

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
        for position, part in enumerate(self._split_added(text)):
            if part in self.added:
                ids.append(self.added[part].id)
            elif part:
                ids.extend(self._encode_part(part, is_first=position == 0))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; invalid UTF-8 gives one U+FFFD per byte.

        Added tokens stand by themselves, with a space to what is next to them. With ``skip_special`` off, special ids
        are written out and each run between them is decoded separately; transformers 4.31 puts a space in front of a
        run that a special id closes, and so does this.

        Raises:
            BundleError: an id is not in the vocabulary.
        """
        self.check_ids(ids)
        special_ids, apart = self.special_ids, self.apart
        texts, run = list[str](), list[int]()
        for token in ids:
            if token in special_ids and skip_special:
                continue
            if token not in apart:
                run.append(token)
                continue
            texts += [self._decode_run(run)] if run else []
            texts.append(apart[token])
            run = []
        return " ".join([*texts, self._decode_run(run)] if run else texts)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise :class:`BundleError` for the first id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise BundleError(
                    f"token id {token} is outside the tokenizer's vocabulary 0..{self.vocab_size - 1}; "
                    "the tokenizer and the model of this bundle do not belong together"
                )

    def require_fit(self, decoder: DecoderConfig, folder: Path) -> None:
        """Refuse a tokenizer of another model than the one in ``folder``.

        Raises:
            BundleError: it has more ids than the token table has rows, or another first token.
        """
        problem = ""
        if self.vocab_size > decoder.vocab_size:
            problem = f"it has {self.vocab_size} tokens, the model's token table has {decoder.vocab_size} rows"
        elif self.bos_id != decoder.bos_token_id:
            problem = f"its bos_token has the id {self.bos_id}, the model's bos_token_id is {decoder.bos_token_id}"
        if problem:
            raise BundleError(
                f"{folder}: the tokenizer and the model do not belong together: {problem}; use the tokenizer files of "
                "the original checkpoint"
            )

    def _split_added(self, text: str) -> list[str]:
        """Ordinary text, which comes first, and the added tokens in it; blanks stripped as they ask."""
        by_length = sorted(self.added, key=len, reverse=True)
        first, *rest = re.split(f"({'|'.join(map(re.escape, by_length))})", text)
        parts = [first, *filter(None, rest)]
        for i, part in enumerate(parts):
            token = self.added.get(part)
            if token is not None and token.strip_right and i + 1 < len(parts):
                parts[i + 1] = parts[i + 1].lstrip()
            if token is not None and token.strip_left and i > 0:
                parts[i - 1] = parts[i - 1].rstrip()
        return parts

    def _decode_run(self, ids: Sequence[int]) -> str:
        special_ids = self.special_ids
        text, run = "", list[int]()
        for token in ids:
            if token not in special_ids:
                run.append(token)
                continue
            text += (" " if run else "") + self.model.decode(run) + self.model.id_to_piece(token)
            run = []
        return text + str(self.model.decode(run))

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
        self._apart = tokenizer.apart
        self._bytes = b""
        self._at_start = True  # of a run of ordinary ids
        self._begun = False
        self._after_apart = False

    def feed(self, token: int) -> str:
        """Text that ``token`` completes, possibly none.

        Raises:
            BundleError: the id is not in the vocabulary.
        """
        self._tokenizer.check_ids([token])
        if token in self._special_ids:
            return ""
        if token in self._apart:
            text = self._take(final=True) + (" " if self._begun else "") + self._apart[token]
            self._begun = self._after_apart = self._at_start = True
            return text
        gap = " " if self._after_apart else ""
        self._begun, self._after_apart = True, False
        surface = self._tokenizer.surfaces[token]
        if isinstance(surface, bytes):
            self._bytes += surface
            return gap + self._take(final=False)
        text = gap + self._take(final=True)
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


def _surface(model: SentencePieceProcessor, token: int, piece: str) -> str | bytes:
    text = "" if model.is_control(token) else piece
    return bytes([int(piece[1:-1], 16)]) if model.is_byte(token) else text
