"""Files of conversations that calibration and evaluation read: the fine-tuning format of mPLUG-Owl2, and LLaVA's.

A record is ``{"image": "a.png", "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}``.
A file has one in every line (JSON Lines), or all of them in one JSON array, as the official trainer reads them.
``"image"`` names a file or a list of files, relative to the folder of the file. ``<|image|>``, or ``<image>`` as LLaVA
writes it, says where in a turn an image goes; without it, all images go before the first turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import DataError, ImageError
from owl2.runtime.families.mplug_owl2.template import Message, Role
from owl2.runtime.foreign import ForeignError, cut, parse_json, read_text, reading, shorten
from owl2.runtime.harmless import harmless

DATA_BYTES = 1 << 30
"""Largest file of records."""
LINE_CHARACTERS = 16 << 20
"""Longest line of a file of records."""
LISTED_PROBLEMS = 100
"""Most problems that an error lists."""
PROBLEM_CHARACTERS = 400
"""Longest sentence about one record, which may name a file."""

LLAVA_IMAGE_TOKEN = "<image>"
ROLES: dict[str, Role] = {"human": "USER", "user": "USER", "gpt": "ASSISTANT", "assistant": "ASSISTANT"}
TURN_FIELDS = (("from", "value"), ("role", "content"))
URL = re.compile(r"[a-z][a-z0-9+.-]+:(//|.*;base64,)", re.IGNORECASE)

Record = Mapping[str, Any]
T = TypeVar("T")


def read_records(path: Path, parse: Callable[[str, int, Record], T]) -> tuple[list[T], list[str]]:
    """Read a file of JSON objects, one per line or all in one array; empty lines are skipped.

    Args:
        path: of the file.
        parse: called with ``line`` or, in an array, ``record``; its number from 1; and the object. Its ValueError makes
            the record malformed.

    Returns:
        The results of ``parse``, and a sentence for each record that is malformed.

    Raises:
        DataError: the file cannot be read, is empty, or is no JSON.
    """
    with reading(path, DataError, "give UTF-8 text with one JSON object per line, or all of them in one JSON array"):
        text = read_text(path, DATA_BYTES)
        unit = "record" if text.lstrip()[:1] == "[" else "line"
        entries = parse_json(text) if unit == "record" else [line.strip() for line in text.split("\n")]
    records, problems = [], []
    for number, entry in enumerate(entries, 1):
        if entry == "" and unit == "line":
            continue
        try:
            records.append(parse(unit, number, _object(entry if unit == "record" else _value(entry))))
        except ValueError as error:  # ForeignError and PromptError too
            problems.append(f"{unit} {number}: {error}")
    if not records and not problems:
        raise DataError(f"{harmless(str(path))} is empty; give one JSON object per line")
    return records, problems


def _value(line: str) -> object:
    if len(line) > LINE_CHARACTERS:
        raise ForeignError(f"it has {len(line)} characters, at most {LINE_CHARACTERS} are read")
    return parse_json(line)


def _object(entry: object) -> Record:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected a JSON object, got {type(entry).__name__}")
    return entry


def image_names(record: Record) -> list[str]:
    """The file names in the field ``image`` (or ``images``); raises ValueError if it has anything else."""
    found = [name for name in ("image", "images") if record.get(name) not in (None, "", [])]
    if len(found) > 1:
        raise ValueError('"image" and "images" are both given; keep one of them')
    given = record[found[0]] if found else []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'"{found[0]}" must be a file name or a list of them, got {shorten(given)}')
    for name in names:
        if URL.match(name):
            raise ValueError(f'"{found[0]}" must name files, got the URL {shorten(name)}; save the image as a file')
    return names


def conversation(record: Record, images: int) -> tuple[Message, ...]:
    """The turns in the field ``conversations`` (or ``messages``), with ``<|image|>`` for each of ``images`` images.

    A first turn from the model is left out, as the official trainer does.

    Raises:
        ValueError: turns that are malformed or not in turn, or placeholders for another number of images.
    """
    if "messages" in record and "conversations" in record:
        raise ValueError('"conversations" and "messages" are both given; keep one of them')
    name = "messages" if "messages" in record else "conversations"
    given = record.get(name)
    if not isinstance(given, list) or not given:
        raise ValueError(f'"{name}" must be a list of turns, got {shorten(given)}')
    turns = [_turn(turn) for turn in given]
    if turns[0][0] == "ASSISTANT":
        turns = turns[1:]
    if not turns:
        raise ValueError(f'"{name}" has no turn from "human"')
    for index, (role, _) in enumerate(turns):
        if role != ("USER", "ASSISTANT")[index % 2]:
            raise ValueError(f'two turns in a row are from the {role.lower()}; "human" and "gpt" must alternate')
    texts = with_placeholders([text for _, text in turns], images)
    return tuple(Message(role, text) for (role, _), text in zip(turns, texts))


def _turn(turn: object) -> tuple[Role, str]:
    fields = turn if isinstance(turn, Mapping) else {}
    pairs = [(fields.get(who), fields.get(what)) for who, what in TURN_FIELDS if who in fields]
    role, text = pairs[0] if pairs else (None, None)
    if role == "system":
        raise ValueError("it has a system message, which this model does not know; leave it out")
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        raise ValueError(f'a turn must be {{"from": "human" or "gpt", "value": text}}, got {shorten(turn)}')
    return ROLES[role], text


def with_placeholders(texts: Sequence[str], images: int) -> list[str]:
    """Texts of a record with one ``<|image|>`` for each of its images.

    LLaVA's ``<image>`` becomes ``<|image|>``; the newline that LLaVA writes after it stays, since the official trainer
    of mPLUG-Owl2 writes one there too. Without either, all images go before the first text.

    Raises:
        ValueError: both occur, or another number of them than of images.
    """
    found = placeholders(texts)
    if len(found) > 1:
        raise ValueError(f"both {IMAGE_TOKEN} and {LLAVA_IMAGE_TOKEN} occur; use one of them where images go")
    if not found:
        return [IMAGE_TOKEN * images + text if index == 0 else text for index, text in enumerate(texts)]
    [token] = found
    count = sum(text.count(token) for text in texts)
    if count != images:
        raise ValueError(
            f"{token} occurs {_times(count)}, but there {'is 1 image' if images == 1 else f'are {images} images'}; "
            "write it once for each image, where it belongs"
        )
    return [text.replace(token, IMAGE_TOKEN) for text in texts]


def placeholders(texts: Sequence[str]) -> list[str]:
    """The spellings of an image's placeholder that occur in ``texts``; answers must have none."""
    return [token for token in (IMAGE_TOKEN, LLAVA_IMAGE_TOKEN) if any(token in text for text in texts)]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` items, spread evenly over all of them."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def image_problems(images: Iterable[tuple[str, Path]], check: Callable[[Path], object]) -> list[str]:
    """A sentence for each image that ``check`` raises ImageError for.

    Args:
        images: where each is named, as in ``line 3`` or empty, and its path.
        check: called once with each path.
    """
    reasons: dict[Path, str] = {}
    problems = []
    for where, path in images:
        if path not in reasons:
            try:
                check(path)
                reasons[path] = ""
            except ImageError as error:
                reasons[path] = str(error)
        if reasons[path]:
            problems.append(": ".join(filter(None, (where, reasons[path]))))
    return problems


def list_problems(problems: Sequence[str]) -> str:
    """Their number, and a line for each of the first ones, harmless and cut off where it is long."""
    shown = [cut(harmless(problem), PROBLEM_CHARACTERS) for problem in problems[:LISTED_PROBLEMS]]
    more = [f"… and {len(problems) - LISTED_PROBLEMS} more"] if len(problems) > LISTED_PROBLEMS else []
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join([f"{count}:", *shown, *more])
