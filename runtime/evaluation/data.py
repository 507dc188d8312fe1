"""The user's own data: a JSON object per line, whose fields say what is asked of the model.

=========================================  ==================================================================
``{"question", "answers": [...]}``         a short answer, against those that people gave
``{"question", "choices": [...],           the likeliest of several answers
"answer": number or text}``
``{"captions": [...]}``                    a description, against those that people wrote
``{"conversations": [{"from", "value"}]}`` the likelihood of the assistant's turns, as in calibration data
``{"text"}``                               the likelihood of plain text
=========================================  ==================================================================

``"image"`` names an image or a list of them, relative to the file; ``"kind"`` is a category that results are grouped
by; ``"id"`` is repeated in the results; other fields are ignored. ``<|image|>`` in a question marks the place of an
image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl2.runtime.config import IMAGE_TOKEN, require
from owl2.runtime.errors import DataError, ImageError
from owl2.runtime.families.mplug_owl2.template import Message, Role, check_placeholders, render, with_images
from owl2.runtime.preprocess import load_image

CAPTION_QUESTION = "Provide a one-sentence caption for the provided image."
MAX_LISTED_PROBLEMS = 100
ROLES: dict[str, Role] = {"human": "USER", "user": "USER", "gpt": "ASSISTANT", "assistant": "ASSISTANT"}

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with a short answer; ``answers`` are those that people gave."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A question with several answers to choose from; ``answer`` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Caption:
    """A request for a description; ``captions`` are those that people wrote."""

    question: str
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation; the likelihood of its assistant turns is measured."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, without a template."""

    text: str


Task = Question | Choice | Caption | Conversation | Text


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the data.

    Attributes:
        line: its number, from 1.
        task: to be measured.
        images: paths of its images.
        category: the line's ``"kind"``, by which results are grouped; empty for none.
        id: as given; None for none.
    """

    line: int
    task: Task
    images: tuple[Path, ...] = ()
    category: str = ""
    id: str | int | None = None


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read at most ``limit`` lines, spread evenly over the file; only their images are opened.

    Raises:
        DataError: the file cannot be read or is empty, or lines are malformed or images unusable; names all of them.
        ConfigError: the limit is not positive.
    """
    require(limit is None or limit > 0, f"limit {limit} must be at least 1")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a UTF-8 file with one JSON object per line") from error
    if lines[0].lstrip().startswith("["):
        raise DataError(f"{path} is a JSON array; give one JSON object per line")
    items, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(parse_line(line, number, path.parent))
        except ValueError as error:  # PromptError too
            problems.append(f"line {number}: {error}")
    raise_problems(str(path), problems)
    if not items:
        raise DataError(f"{path} is empty; give one JSON object per line")
    chosen = items if limit is None or limit >= len(items) else [items[i * len(items) // limit] for i in range(limit)]
    raise_problems(str(path), image_problems(chosen))
    return chosen


def parse_line(line: str, number: int, folder: Path) -> Item:
    """Read one line; its images are in ``folder``.

    Raises:
        ValueError: the line cannot be used; says why.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    images = _images(record)
    task = _reader(record)(record, len(images))
    category, name = record.get("kind", ""), record.get("id")
    if not isinstance(category, str):
        raise ValueError(f'"kind" must be a string, got {category!r}')
    if name is not None and (not isinstance(name, str | int) or isinstance(name, bool)):
        raise ValueError(f'"id" must be a string or a whole number, got {name!r}')
    return Item(number, task, tuple(folder / image for image in images), category, name)


def image_problems(items: Sequence[Item]) -> list[str]:
    """A sentence for each image that cannot be used; every file is read once."""
    checked: dict[Path, str] = {}
    problems = []
    for item in items:
        for path in item.images:
            if path not in checked:
                checked[path] = _image_problem(path)
            if checked[path]:
                problems.append(f"line {item.line}: {checked[path]}")
    return problems


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raise a :class:`DataError` that lists ``problems``, if there are any."""
    if problems:
        shown = list(problems[:MAX_LISTED_PROBLEMS])
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more")
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"{source}: {count}; nothing was measured:\n  " + "\n  ".join(shown))


def messages(task: Task, answer: str | None) -> tuple[Message, ...]:
    """The conversation of a task that asks a question, up to and with ``answer``; None leaves it to the model."""
    match task:
        case Conversation(given):
            return given
        case Text():
            return ()
        case _:
            return Message("USER", task.question), Message("ASSISTANT", answer)


def _image_problem(path: Path) -> str:
    try:
        load_image(path)
    except ImageError as error:
        return str(error)
    return ""


def _images(record: Record) -> list[str]:
    named = record.get("image") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"image" must be a file name or a list of them, got {named!r}')
    return names


def _reader(record: Record) -> Callable[[Record, int], Task]:
    """The reader of the task that the record's fields stand for."""
    found = [name for name in _READERS if name in record]
    if len(found) != 1:
        given = ", ".join(found) if found else ", ".join(map(str, record)) or "nothing"
        raise ValueError(
            f"exactly one of the fields {', '.join(_READERS)} must say what to measure; got {given}"
            + ("" if found or "answer" not in record else ' (a single answer is a list, too: "answers": ["red"])')
        )
    return _READERS[found[0]]


def _question(record: Record, images: int) -> Question:
    return Question(_asked(record, images), _texts(record, "answers"))


def _choice(record: Record, images: int) -> Choice:
    choices, answer = _texts(record, "choices"), record.get("answer")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f'"choices" must be at least two different strings, got {list(choices)!r}')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" must be one of the choices or its index from 0, got {answer!r}')
    return Choice(_asked(record, images), choices, answer)


def _caption(record: Record, images: int) -> Caption:
    if images == 0:
        raise ValueError('"captions" needs an "image"')
    return Caption(_asked(record, images, CAPTION_QUESTION), _texts(record, "captions"))


def _conversation(record: Record, images: int) -> Conversation:
    given = record["conversations"]
    if not isinstance(given, list) or not given:
        raise ValueError(f'"conversations" must be a list of turns, got {given!r}')
    turns = [_message(entry) for entry in given]
    if not any(IMAGE_TOKEN in (turn.text or "") for turn in turns):
        turns[0] = Message(turns[0].role, with_images(turns[0].text or "", images))
    check_placeholders(render(turns), images)
    if not any(turn.role == "ASSISTANT" and turn.text for turn in turns):
        raise ValueError('"conversations" has no turn from "gpt" with a text to measure')
    return Conversation(tuple(turns))


def _message(entry: Any) -> Message:  # noqa: ANN401 - any JSON value
    given: Record = entry if isinstance(entry, Mapping) else {}
    role, text = ROLES.get(str(given.get("from"))), given.get("value")
    if role is None or not isinstance(text, str):
        raise ValueError(f'a turn must be {{"from": "human" or "gpt", "value": text}}, got {entry!r}')
    return Message(role, _valid(text))


def _text(record: Record, images: int) -> Text:
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"text" must be a non-empty string, got {text!r}')
    if images:
        raise ValueError('"text" cannot have an "image"; use "conversations" for both')
    return Text(_valid(text))


_READERS: dict[str, Callable[[Record, int], Task]] = {
    "answers": _question,
    "choices": _choice,
    "captions": _caption,
    "conversations": _conversation,
    "text": _text,
}


def _asked(record: Record, images: int, default: str = "") -> str:
    question = record.get("question", default)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'"question" must be a non-empty string, got {question!r}')
    return with_images(_valid(question), images)


def _texts(record: Record, name: str) -> tuple[str, ...]:
    given = record[name]
    if not isinstance(given, list) or not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError(f'"{name}" must be a list of non-empty strings, got {given!r}')
    if any(IMAGE_TOKEN in text for text in given):
        raise ValueError(f'"{name}" must not contain {IMAGE_TOKEN}')
    return tuple(_valid(text) for text in given)


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is not valid Unicode") from error
    return text
