"""The user's own data: JSON objects whose fields say what is asked of the model; see docs/commands.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from owl2.runtime.config import require
from owl2.runtime.errors import DataError
from owl2.runtime.evaluation.conversations import (
    Record,
    conversation,
    evenly,
    image_names,
    image_problems,
    list_problems,
    placeholders,
    read_records,
    with_placeholders,
)
from owl2.runtime.families.mplug_owl2.template import Message
from owl2.runtime.foreign import listed, shorten
from owl2.runtime.harmless import harmless
from owl2.runtime.preprocess import load_image

CAPTION_QUESTION = "Provide a one-sentence caption for the provided image."
TASK_FIELDS = ("answers", "choices", "captions", "conversations", "messages", "text")


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
    """One record of the data.

    Attributes:
        line: its number, from 1: of the line, or of the record in a JSON array.
        category: its ``"category"``, by which results are grouped; empty for none.
        id: its ``"id"``, or the ``"question_id"`` of VQA v2; passed on.
        unit: what ``line`` counts, ``line`` or ``record``.
    """

    line: int
    task: Task
    images: tuple[Path, ...] = ()
    category: str = ""
    id: str | int | None = None
    unit: str = "line"

    @property
    def where(self) -> str:
        """Its place in the file, for people."""
        return f"{self.unit} {self.line}"


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read at most ``limit`` records, spread evenly over the file; only their images are opened.

    Raises:
        DataError: the file cannot be read or is empty, or records are malformed or images unusable; names all of them.
        ConfigError: the limit is not a positive whole number.
    """
    if limit is not None:
        require(
            isinstance(limit, int) and not isinstance(limit, bool),
            f"limit must be a whole number, got {shorten(limit)}",
        )
        require(limit > 0, f"limit {limit} must be at least 1")
    items, problems = read_records(path, lambda unit, line, record: _item(unit, line, record, path.parent))
    raise_problems(str(path), problems)
    chosen = evenly(items, limit)
    raise_problems(str(path), image_problems(placed_images(chosen), load_image))
    return chosen


def placed_images(items: Sequence[Item]) -> list[tuple[str, Path]]:
    """All images of ``items``, each with the place in the file that names it."""
    return [(item.where, image) for item in items for image in item.images]


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raise a :class:`DataError` that lists ``problems``, if there are any."""
    if problems:
        raise DataError(f"{harmless(source)}: nothing was measured; {list_problems(problems)}")


def messages(task: Task, answer: str | None) -> tuple[Message, ...]:
    """The conversation of a task that asks a question, up to and with ``answer``; None leaves it to the model."""
    match task:
        case Conversation(given):
            return given
        case Text():
            return ()
        case _:
            return Message("USER", task.question), Message("ASSISTANT", answer)


def _item(unit: str, line: int, record: Record, folder: Path) -> Item:
    images = image_names(record)
    found = [name for name in TASK_FIELDS if name in record]
    if len(found) != 1:
        given = listed(found or record) or "nothing"
        raise ValueError(
            f"exactly one of the fields {', '.join(TASK_FIELDS)} must say what to measure; got {given}"
            + ("" if found or "answer" not in record else ' (a single answer is a list, too: "answers": ["red"])')
        )
    task = _task(found[0], record, len(images))
    category, name = record.get("category", ""), record.get("id", record.get("question_id"))
    if not isinstance(category, str):
        raise ValueError(f'"category" must be a string, got {shorten(category)}')
    if name is not None and (not isinstance(name, str | int) or isinstance(name, bool)):
        raise ValueError(f'"id" must be a string or a whole number, got {shorten(name)}')
    return Item(line, task, tuple(folder / image for image in images), category, name, unit)


def _task(name: str, record: Record, images: int) -> Task:
    match name:
        case "answers":
            return Question(_asked(record, images), _texts(record, "answers"))
        case "choices":
            return _choice(record, images)
        case "captions":
            if images == 0:
                raise ValueError('"captions" needs an "image"')
            return Caption(_asked(record, images, CAPTION_QUESTION), _texts(record, "captions"))
        case "conversations" | "messages":
            turns = conversation(record, images)
            if not any(turn.role == "ASSISTANT" and turn.text for turn in turns):
                raise ValueError(f'"{name}" has no turn from "gpt" with a text to measure')
            return Conversation(turns)
        case _:
            text = record["text"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f'"text" must be a non-empty string, got {shorten(text)}')
            if images:
                raise ValueError('"text" cannot have an "image"; use "conversations" for both')
            return Text(text)


def _choice(record: Record, images: int) -> Choice:
    choices, answer = _texts(record, "choices"), record.get("answer")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f'"choices" must be at least two different strings, got {shorten(list(choices))}')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" must be one of the choices or its index from 0, got {shorten(answer)}')
    return Choice(_asked(record, images), choices, answer)


def _asked(record: Record, images: int, default: str = "") -> str:
    question = record.get("question", default)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'"question" must be a non-empty string, got {shorten(question)}')
    return with_placeholders([question], images)[0]


def _texts(record: Record, name: str) -> tuple[str, ...]:
    """Texts in a list; each may be in an object, as VQA v2 publishes ``answers`` and COCO ``captions``."""
    given = record[name]
    entries = given if isinstance(given, list) else []
    texts = [entry.get(name[:-1]) if isinstance(entry, Mapping) else entry for entry in entries]
    valid = [text for text in texts if isinstance(text, str) and text.strip()]
    if not valid or len(valid) < len(texts):
        raise ValueError(f'"{name}" must be a list of non-empty strings, got {shorten(given)}')
    if found := placeholders(valid):
        raise ValueError(f'"{name}" must not contain {found[0]}')
    return tuple(valid)
