"""Messages as other libraries have them, and the turns of a conversation that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import ContextOverflowError, PromptError
from owl2.runtime.families.mplug_owl2.template import Message, render, with_images
from owl2.runtime.foreign import shorten
from owl2.runtime.image_files import held
from owl2.runtime.images import GivenImage, PreparedImage
from owl2.runtime.load import Loaded
from owl2.runtime.preprocess import UPRIGHT, ImageReading

ChatMessage = Mapping[str, Any]
"""A message as in transformers: ``role`` is ``user`` or ``assistant``, ``content`` a text or a list of parts.

A part is ``{"type": "text", "text": …}`` or ``{"type": "image", "image": …}`` with an :data:`ImageInput`; an image part
may have ``"preprocess": "pad"`` (or another mode) and the fields of :class:`ImageReading`: ``"orientation": "stored"``,
``"background": "black"`` (or None).
"""

READING = tuple(field.name for field in fields(ImageReading))


@dataclass(frozen=True)
class Turn:
    """A question with its images, and the answer.

    Attributes:
        question: text with one ``<|image|>`` per image.
        parts: the images as parts of a message.
        images: the same, preprocessed.
        answer: text.
    """

    question: str
    parts: tuple[ChatMessage, ...]
    images: tuple[PreparedImage, ...]
    answer: str

    def messages(self) -> list[dict[str, Any]]:
        """The two messages of this turn; :func:`read_turns` is the inverse."""
        content: str | list[ChatMessage] = self.question
        if self.parts:
            content = []
            for text, image in zip(self.question.split(IMAGE_TOKEN), (*self.parts, None)):
                content += [{"type": "text", "text": text}] if text else []
                content += [dict(image)] if image is not None else []
        return [{"role": "user", "content": content}, {"role": "assistant", "content": self.answer}]


def render_turns(turns: Sequence[Turn], question: str, begun: str = "") -> str:
    """The prompt that asks a question after finished turns, or goes on with an answer that was begun."""
    said = [
        message for turn in turns for message in (Message("USER", turn.question), Message("ASSISTANT", turn.answer))
    ]
    return render([*said, Message("USER", question), Message("ASSISTANT")]) + (f" {begun}" if begun else "")


def image_part(image: GivenImage, preprocess: str | None, reading: ImageReading | None) -> ChatMessage:
    """An image as part of a message, with the settings that are not the default."""
    # A copy: the caller may draw on it again.
    own = image.copy() if isinstance(image, np.ndarray | Image.Image) else image
    part: dict[str, Any] = {"type": "image", "image": own}
    part |= {} if preprocess is None else {"preprocess": preprocess}
    usual = asdict(UPRIGHT)
    return part | {name: value for name, value in asdict(reading or UPRIGHT).items() if value != usual[name]}


def read_turns(model: Loaded, messages: Sequence[ChatMessage]) -> list[Turn]:
    """The turns of a conversation that a caller gives.

    Raises:
        PromptError: the messages are not user and assistant in turn, or one has content that cannot be used.
        ImageError: an image cannot be read.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise PromptError(f"messages must be a list of {{'role': …, 'content': …}}, got {type(messages).__name__}")
    read, count = [], 0
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        where = f"message {index}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise PromptError(f"{where} is {shorten(message)}, expected {{'role': …, 'content': …}}")
        if message["role"] != expected:
            raise PromptError(
                f"{where} has the role {shorten(message['role'])}, expected {expected!r}: user and assistant take "
                "turns, and this model has no system message"
            )
    if len(messages) % 2:
        raise PromptError("the last message is the user's; leave it out and ask it: chat.ask(question, images)")
    for index in range(0, len(messages), 2):
        question, parts = _read_content(messages[index]["content"], f"message {index}")
        answer, more = _read_content(messages[index + 1]["content"], f"message {index + 1}")
        if more or IMAGE_TOKEN in answer:
            raise PromptError(f"message {index + 1} has an image; only the user's messages may")
        if not question:
            raise PromptError(f"message {index} is empty; give at least one character or image")
        count += len(parts)
        read.append((with_images(question, len(parts)), parts, answer))
    if count * model.config.rows_per_image >= model.context:  # before any image is decoded
        positions, hint = count * model.config.rows_per_image + 1, "leave out the messages with the first images"
        raise ContextOverflowError(0, positions, model.context, hint)
    return [
        Turn(question, parts=tuple(map(_own_part, parts)), images=images, answer=answer)
        for question, parts, answer in read
        for images in [tuple(_prepared(model, part) for part in parts)]  # first: it checks what decoding takes
    ]


def _prepared(model: Loaded, part: ChatMessage) -> PreparedImage:
    [image] = model.prepare([part["image"]], part.get("preprocess"), _reading(part))
    return image


def _reading(part: ChatMessage) -> ImageReading:
    return ImageReading(**{name: part[name] for name in READING if name in part})


def _own_part(part: ChatMessage) -> ChatMessage:
    return image_part(part["image"], part.get("preprocess"), _reading(part))


def _read_content(content: object, where: str) -> tuple[str, list[ChatMessage]]:
    """Text with a placeholder for each image, and the image parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"the content of {where} must be a text or a list of parts, got {type(content).__name__}")
    text = ""
    images: list[ChatMessage] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(words)}:
                text += words
            case {"type": "image", "image": image} if part.keys() <= {"type", "image", "preprocess", *READING}:
                text += IMAGE_TOKEN
                images.append({**part, "image": held(image)})
            case _:
                raise PromptError(
                    f"{where} has the part {shorten(part)}, expected {{'type': 'text', 'text': …}} or "
                    f"{{'type': 'image', 'image': …}} (and perhaps {', '.join(('preprocess', *READING))})"
                )
    return text, images
