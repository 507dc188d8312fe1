"""The user's own data: a JSON object per line, whose fields say what is asked of the model; see docs/commands.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from owl2.runtime.config import IMAGE_TOKEN, require
from owl2.runtime.errors import DataError
from owl2.runtime.evaluation.conversations import (
    Record,
    conversation,
    evenly,
    image_names,
    list_problems,
    read_records,
    unusable_images,
    valid_text,
)
from owl2.runtime.families.mplug_owl2.template import Message, with_images

CAPTION_QUESTION = "Provide a one-sentence caption for the provided image."
MAX_LISTED_PROBLEMS = 100
TASK_FIELDS = ("answers", "choices", "captions", "conversations", "text")


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
        category: the line's ``"category"``, by which results are grouped; empty for none.
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
        ConfigError: the limit is not a positive whole number.
    """
    if limit is not None:
        require(isinstance(limit, int) and not isinstance(limit, bool), f"limit must be a whole number, got {limit!r}")
        require(limit > 0, f"limit {limit} must be at least 1")
    items, problems = read_records(path, lambda line, record: _item(line, record, path.parent))
    raise_problems(str(path), problems)
    chosen = evenly(items, limit)
    unusable = unusable_images(image for item in chosen for image in item.images)
    problems = [f"line {item.line}: {unusable[image]}" for item in chosen for image in item.images if image in unusable]
    raise_problems(str(path), problems)
    return chosen


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raise a :class:`DataError` that lists ``problems``, if there are any."""
    if problems:
        raise DataError(f"{source}: nothing was measured; {list_problems(problems, MAX_LISTED_PROBLEMS)}")


def messages(task: Task, answer: str | None) -> tuple[Message, ...]:
    """The conversation of a task that asks a question, up to and with ``answer``; None leaves it to the model."""
    match task:
        case Conversation(given):
            return given
        case Text():
            return ()
        case _:
            return Message("USER", task.question), Message("ASSISTANT", answer)


def _item(line: int, record: Record, folder: Path) -> Item:
    images = image_names(record)
    found = [name for name in TASK_FIELDS if name in record]
    if len(found) != 1:
        given = ", ".join(found) if found else ", ".join(map(str, record)) or "nothing"
        raise ValueError(
            f"exactly one of the fields {', '.join(TASK_FIELDS)} must say what to measure; got {given}"
            + ("" if found or "answer" not in record else ' (a single answer is a list, too: "answers": ["red"])')
        )
    task = _task(found[0], record, len(images))
    category, name = record.get("category", ""), record.get("id")
    if not isinstance(category, str):
        raise ValueError(f'"category" must be a string, got {category!r}')
    if name is not None and (not isinstance(name, str | int) or isinstance(name, bool)):
        raise ValueError(f'"id" must be a string or a whole number, got {name!r}')
    return Item(line, task, tuple(folder / image for image in images), category, name)


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
        case "conversations":
            turns = conversation(record, images)
            if not any(turn.role == "ASSISTANT" and turn.text for turn in turns):
                raise ValueError('"conversations" has no turn from "gpt" with a text to measure')
            return Conversation(turns)
        case _:
            text = record["text"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f'"text" must be a non-empty string, got {text!r}')
            if images:
                raise ValueError('"text" cannot have an "image"; use "conversations" for both')
            return Text(valid_text(text))


def _choice(record: Record, images: int) -> Choice:
    choices, answer = _texts(record, "choices"), record.get("answer")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f'"choices" must be at least two different strings, got {list(choices)!r}')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" must be one of the choices or its index from 0, got {answer!r}')
    return Choice(_asked(record, images), choices, answer)


def _asked(record: Record, images: int, default: str = "") -> str:
    question = record.get("question", default)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'"question" must be a non-empty string, got {question!r}')
    return with_images(valid_text(question), images)


def _texts(record: Record, name: str) -> tuple[str, ...]:
    given = record[name]
    if not isinstance(given, list) or not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError(f'"{name}" must be a list of non-empty strings, got {given!r}')
    if any(IMAGE_TOKEN in text for text in given):
        raise ValueError(f'"{name}" must not contain {IMAGE_TOKEN}')
    return tuple(valid_text(text) for text in given)
