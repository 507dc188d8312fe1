"""The tokenizer of a checkpoint: the files in which transformers 4.31 to 5 describe added tokens, put together.

A bundle has one place for them, ``added_tokens_decoder`` in tokenizer_config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl2.export.checkpoint import keys
from owl2.export.checkpoint.files import TOKENIZER_DEFAULTS
from owl2.export.checkpoint.keys import Json, check_keys
from owl2.runtime.config import require
from owl2.runtime.errors import CheckpointError
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.families.mplug_owl2.tokenizer_files import (
    ADDED,
    DEFAULT_SPECIALS,
    added_tokens,
    load_json,
    load_model,
    named_tokens,
)
from owl2.runtime.foreign import listed, shorten
from owl2.runtime.spec import TOKENIZER_FILES

CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
TOKENS, FAST = "added_tokens.json", "tokenizer.json"

Entries = dict[int, dict[str, Any]]
"""Added tokens by id, each with ``content``, ``lstrip``, ``rstrip`` and ``single_word``."""


@dataclass(frozen=True)
class TokenizerSource:
    """A checkpoint's tokenizer.

    Attributes:
        tokenizer: as a bundle has it.
        changed: content of the files that a bundle has in another form, or that are missing, by name.
        notes: what the files say that has no effect here, a sentence each.
        outdated: files that must not be taken over, since they list a token that is left out; ``changed`` has the rest.
    """

    tokenizer: Tokenizer
    changed: Mapping[str, Json]
    notes: tuple[str, ...]
    outdated: tuple[str, ...]

    def write(self, source: Path, target: Path) -> None:
        """Copy the files from the checkpoint's folder, but for those that a bundle has in another form."""
        for name in TOKENIZER_FILES:
            if name in self.changed:
                text = json.dumps(self.changed[name], indent=2) + "\n"
                (target / name).write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(source / name, target / name)


def read_tokenizer(folder: Path, rows: int) -> TokenizerSource:
    """Read the tokenizer of a checkpoint whose token table has ``rows`` rows.

    Raises:
        BundleError: a file is unreadable, or asks for something that LLaMA tokenizers do not do.
        CheckpointError: files contradict each other, or a token has no row in the table.
        ConfigError: a setting would change ids or texts in a way that cannot be converted.
    """
    config: Json
    special_map: Json
    given = [load_json(folder / name) if (folder / name).exists() else None for name in (CONFIG, SPECIAL_MAP)]
    config, special_map = (
        TOKENIZER_DEFAULTS[name] if content is None else content for name, content in zip((CONFIG, SPECIAL_MAP), given)
    )
    notes = [*check_keys(CONFIG, config, keys.TOKENIZER), *check_keys(SPECIAL_MAP, special_map, keys.SPECIAL_MAP)]
    legacy = config.get("legacy")
    require(
        legacy is None or isinstance(legacy, bool), f"{CONFIG}: legacy must be true or false, got {shorten(legacy)}"
    )
    if legacy is False:
        notes.append(
            f"{CONFIG}: legacy is false, which is followed as in transformers 4.31, the original's version; later ones "
            "tokenize text after a special token in another way"
        )
    # transformers 4.31 left an old name in tokenizer_config.json; later versions, which list the added tokens, do not.
    for role in DEFAULT_SPECIALS if config.get(ADDED) else ():
        names = {text for part in (config, special_map) if (text := _content(part.get(role))) is not None}
        require(
            len(names) < 2,
            f"{SPECIAL_MAP} and {CONFIG} call the {role} {listed(sorted(names))}; keep the one that the model was "
            "trained with",
        )
    _, pieces = load_model(folder / "tokenizer.model")
    added_tokens(folder, config.get(ADDED) or {}, pieces)  # refuses what is no such object
    named = named_tokens(config, special_map)
    entries = _merged(folder, config, named, pieces)
    known = {*pieces, *(entry["content"] for entry in entries.values())}
    missing = {content for content, _, _ in named.values() if content not in known}
    if missing:
        # transformers gives it the next id. Of several the order decides, in which its versions differ.
        if len(missing) > 1:
            raise CheckpointError(
                f"{folder}: {listed(sorted(missing))} are special tokens without ids; add {TOKENS} from where the "
                "checkpoint was trained"
            )
        after = max([len(pieces) - 1, *entries]) + 1
        entries[after] = next(_entry(*token) for token in named.values() if token[0] in missing)
    whole = len(entries)
    config, special_map = _without_idle_padding(folder, config, special_map, entries, rows, notes)
    if entries != {int(token): entry for token, entry in (config.get(ADDED) or {}).items()}:
        config = {**config, ADDED: {str(token): entry for token, entry in sorted(entries.items())}}
    tokenizer = Tokenizer.of(folder, config, special_map)
    made = zip((CONFIG, SPECIAL_MAP), given, (config, special_map))
    changed = {name: new for name, old, new in made if new != old}
    outdated = (TOKENS, FAST) if len(entries) < whole else ()
    return TokenizerSource(tokenizer, changed, tuple(notes), outdated)


def _content(token: object) -> str | None:
    """The string of a special token, which may be an object; None where none is named."""
    content = token.get("content") if isinstance(token, dict) else token
    return None if content is None else str(content)


def _entry(content: str, left: bool, right: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": left, "rstrip": right, "normalized": False, "single_word": False}


def _merged(folder: Path, config: Json, named: Mapping[str, tuple[str, bool, bool]], pieces: list[str]) -> Entries:
    """Added tokens of all files; where several describe a token, the first one's flags count."""
    entries: Entries = {int(token): dict(entry) for token, entry in (config.get(ADDED) or {}).items()}
    origin = dict.fromkeys(entries, CONFIG)
    plain = {content: (left, right) for content, left, right in named.values()}
    ids = {piece: token for token, piece in enumerate(pieces)}
    ids |= {entry["content"]: token for token, entry in entries.items()}

    def add(file: str, token: object, entry: dict[str, Any]) -> None:
        content = entry.get("content")
        if not isinstance(token, int) or isinstance(token, bool) or token < 0 or not isinstance(content, str):
            raise CheckpointError(f"{folder / file}: an added token needs a text and an id, got {shorten(entry)}")
        ours = entries[token]["content"] if token in entries else pieces[token] if token < len(pieces) else content
        if ours != content:
            raise CheckpointError(
                f"{folder}: token {token} is {shorten(content)} in {file} and {shorten(ours)} in "
                f"{origin.get(token, 'tokenizer.model')}; use files that belong together"
            )
        other = ids.setdefault(content, token)
        if other != token:
            raise CheckpointError(
                f"{folder}: {shorten(content)} is token {token} in {file} and token {other} in "
                f"{origin.get(other, 'tokenizer.model')}; use files that belong together"
            )
        # A piece that is special anyway is described by the special tokens' own files.
        if token not in entries and (token >= len(pieces) or content not in plain):
            entries[token], origin[token] = entry, file

    if (folder / TOKENS).is_file():
        for content, token in load_json(folder / TOKENS).items():
            # transformers 4.31, which knew only this file, let such tokens swallow the blanks next to them.
            add(TOKENS, token, _entry(content, *plain.get(content, (True, True))))
    if (folder / FAST).is_file():
        fast = load_json(folder / FAST).get("added_tokens") or []
        for given in fast if isinstance(fast, list) else [fast]:
            entry = dict(given) if isinstance(given, dict) else {}
            add(FAST, entry.pop("id", None), entry)
    return entries


def _without_idle_padding(
    folder: Path, config: Json, special_map: Json, entries: Entries, rows: int, notes: list[str]
) -> tuple[Json, Json]:
    """Leave out the padding token if it has no row in the token table, as it has no place in a prompt then."""
    beyond = {token: entries[token]["content"] for token in sorted(entries) if token >= rows}
    roles = {role: token[0] for role, token in named_tokens(config, special_map).items()}
    padding = roles.get("pad_token", "")
    needed = [content for content in beyond.values() if content != padding or list(roles.values()).count(padding) > 1]
    if needed:
        raise CheckpointError(
            f"{folder}: {listed(needed)} have ids up to {max(beyond)}, but the token table has {rows} rows; export the "
            "checkpoint whose table was resized for them, or take them out of the tokenizer's files"
        )
    for token, content in beyond.items():
        del entries[token]
        notes.append(f"the padding token {shorten(content)} has id {token}, beyond the token table; it is left out")
        config, special_map = ({**part, "pad_token": None} for part in (config, special_map))
    return config, special_map
