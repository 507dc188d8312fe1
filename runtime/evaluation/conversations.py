"""JSON Lines of conversations, the fine-tuning format of mPLUG-Owl2, which calibration and evaluation read.

A line is ``{"image": "a.png", "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}``.
``"image"`` names a file or a list of files, relative to the folder of the JSON Lines file. ``<|image|>`` in a turn
says where an image goes; without it, all images go before the first turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import DataError, ImageError
from owl2.runtime.families.mplug_owl2.template import Message, Role, check_placeholders, render, with_images
from owl2.runtime.preprocess import load_image

ROLES: dict[str, Role] = {"human": "USER", "user": "USER", "gpt": "ASSISTANT", "assistant": "ASSISTANT"}

Record = Mapping[str, Any]
T = TypeVar("T")


def read_records(path: Path, parse: Callable[[int, Record], T]) -> tuple[list[T], list[str]]:
    """Read a file with a JSON object per line; empty lines are skipped.

    Args:
        path: of the file.
        parse: called with the number of each line, from 1, and its object; its ValueError makes the line malformed.

    Returns:
        The results of ``parse``, and a sentence for each line that is malformed.

    Raises:
        DataError: the file cannot be read, is empty, or is one JSON array.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give UTF-8 text, one JSON object per line") from error
    if text.lstrip().startswith("["):
        raise DataError(f"{path} is one JSON array; give one JSON object per line")
    records, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(parse(number, _record(line)))
            except ValueError as error:  # PromptError too
                problems.append(f"line {number}: {error}")
    if not records and not problems:
        raise DataError(f"{path} is empty; give one JSON object per line")
    return records, problems


def _record(line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return record


def image_names(record: Record) -> list[str]:
    """The file names in the field ``image``; raises ValueError if it is neither a name nor a list of names."""
    given = record.get("image") or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"image" must be a file name or a list of them, got {given!r}')
    return names


def conversation(record: Record, images: int) -> tuple[Message, ...]:
    """The turns in the field ``conversations``, with a placeholder for each of ``images`` images.

    Raises:
        ValueError: turns that are malformed, or placeholders for another number of images.
    """
    given = record.get("conversations")
    if not isinstance(given, list) or not given:
        raise ValueError(f'"conversations" must be a list of turns, got {given!r}')
    turns = []
    for turn in given:
        role, text = (ROLES.get(str(turn.get("from"))), turn.get("value")) if isinstance(turn, Mapping) else (None, "")
        if role is None or not isinstance(text, str):
            raise ValueError(f'a turn must be {{"from": "human" or "gpt", "value": text}}, got {turn!r}')
        turns.append(Message(role, valid_text(text)))
    if not any(IMAGE_TOKEN in (turn.text or "") for turn in turns):
        turns[0] = Message(turns[0].role, with_images(turns[0].text or "", images))
    check_placeholders(render(turns), images)
    return tuple(turns)


def valid_text(text: str) -> str:
    """The same text; raises ValueError if it holds half a surrogate pair, which JSON allows and Unicode does not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is not valid Unicode") from error
    return text


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` items, spread evenly over all of them."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def unusable_images(paths: Iterable[Path]) -> dict[Path, str]:
    """The images that cannot be read, each with the reason; every file is opened once."""
    problems = {}
    for path in dict.fromkeys(paths):
        try:
            load_image(path)
        except ImageError as error:
            problems[path] = str(error)
    return problems


def list_problems(problems: Sequence[str], limit: int) -> str:
    """Their number, and a line for each of at most ``limit``."""
    more = [f"… and {len(problems) - limit} more"] if len(problems) > limit else []
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join([f"{count}:", *problems[:limit], *more])
