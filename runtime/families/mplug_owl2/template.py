"""The conversation template "mplug_owl2" and the rules about image placeholders.

The template has no system text. Image placeholders are part of a message's text; a question usually starts
with them: ``USER: <|image|>What is this? ASSISTANT:``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import PromptError

Role = Literal["USER", "ASSISTANT"]

SEPARATORS = (" ", "</s>")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        text: what is said, verbatim; None where the model's answer is to follow.
    """

    role: Role
    text: str | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise PromptError(f"unknown role {self.role!r} of a message; use one of {', '.join(get_args(Role))}")


def render(messages: Sequence[Message]) -> str:
    """Write a conversation as the one string the model was trained on.

    Texts are not trimmed. The separator depends on the position in the list, not on the role. A message
    without text (None or empty) leaves its role and a colon, which asks the model to go on from there.
    """
    return "".join(_render_one(message, SEPARATORS[i % 2]) for i, message in enumerate(messages))


def with_images(question: str, count: int) -> str:
    """Put ``count`` image placeholders in front of a question, unless it already places them itself.

    Raises:
        PromptError: the question has placeholders, but not ``count`` of them.
    """
    if IMAGE_TOKEN not in question:
        return IMAGE_TOKEN * count + question
    check_placeholders(question, count)
    return question


def check_placeholders(prompt: str, count: int) -> None:
    """Check that a prompt has one image placeholder per image.

    Raises:
        PromptError: it has more or fewer than ``count``.
    """
    placed = prompt.count(IMAGE_TOKEN)
    if placed > count:
        raise PromptError(
            f"the prompt has {_count(placed, f'{IMAGE_TOKEN} placeholder')}, but {_count(count, 'image')} given; "
            "give the missing images or remove placeholders"
        )
    if placed < count:
        raise PromptError(
            f"{_count(count, 'image')} given, but the prompt has {_count(placed, f'{IMAGE_TOKEN} placeholder')}; "
            "write one placeholder where each image belongs or give fewer images"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _render_one(message: Message, separator: str) -> str:
    return f"{message.role}: {message.text}{separator}" if message.text else f"{message.role}:"
