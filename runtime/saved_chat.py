"""Conversations in files: messages, rows of images, keys and values, and what they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.encoded import EncodedImage, record_of
from owl2.runtime.errors import SavedChatError
from owl2.runtime.foreign import ForeignError, reading
from owl2.runtime.images import NO_PIXELS, PreparedImage
from owl2.runtime.kv_cache import KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.messages import Turn
from owl2.runtime.saved_cache import restore_cache, stored_cache
from owl2.runtime.stored import Array, Stored, read_description, read_stored, write_stored
from owl2.runtime.version import __version__

KIND = "conversation"
SUFFIX = ".owl2chat"
ADVICE = "owl2.saved_messages(path) may still give its text"


def save_chat(path: Path, model: Loaded, turns: Sequence[Turn], cache: KvCache) -> None:
    """Write a conversation as a whole or not at all.

    Args:
        path: of the file, which may exist.
        model: that holds the conversation.
        turns: finished.
        cache: of the conversation; what a device cannot give is left out, and computed again when it goes on.

    Raises:
        OSError: it cannot be written.
        BackendError: an image that is not encoded any more cannot be.
    """
    images = {image.digest: image for turn in turns for image in turn.images}
    numbers = {digest: number for number, digest in enumerate(images)}
    rows, _ = model.encoder.rows(list(images.values()))
    arrays: dict[str, Array] = {f"rows.{number}": rows[digest] for digest, number in numbers.items()}
    description: dict[str, Any] = {
        "owl2": __version__,
        "bundle": model.fingerprint,
        "vision": model.vision,
        "turns": [
            {
                "question": turn.question,
                "images": [numbers[image.digest] for image in turn.images],
                "answer": turn.answer,
            }
            for turn in turns
        ],
        "images": [{"digest": image.digest, "record": asdict(image.record)} for image in images.values()],
    }
    description["cache"], held = stored_cache(model, cache, numbers)
    arrays |= held
    write_stored(path, KIND, Stored(description, arrays))


def load_chat(path: Path, model: Loaded, cache: KvCache) -> list[Turn]:
    """Read a conversation and put its keys and values into ``cache``, which is empty.

    Raises:
        SavedChatError: the file is damaged, something else, or of another bundle; ``cache`` is unchanged.
        BackendError: the K/V cache is of another type.
    """
    with reading(path, SavedChatError, ADVICE):
        stored = read_stored(path, KIND)
        if stored.description.get("bundle") != model.fingerprint:
            raise ForeignError("it was saved with another bundle, whose keys and values mean nothing to this one")
        images = _images(stored, model)
        turns = [_turn(turn, images) for turn in _list(stored.description, "turns")]
        if "keys" in stored.arrays:
            restore_cache(stored, [image.digest for image in images], model, cache)
        return turns


def saved_messages(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The texts of a saved conversation, as :meth:`Owl2.chat` takes them; needs no model.

    Images are left out. Works too where keys and values are damaged or of another bundle.

    Raises:
        SavedChatError: the file is something else, or its texts are damaged.
    """
    with reading(path, SavedChatError, "there is no other copy of its text"):
        description = read_description(Path(path), KIND)
        turns = [_turn(turn, None) for turn in _list(description, "turns")]
    texts = (replace(turn, question=turn.question.replace(IMAGE_TOKEN, "") or "(an image)") for turn in turns)
    return [message for turn in texts for message in turn.messages()]


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list):
        raise ForeignError(f"it has no list of {name}")
    return value


def _images(stored: Stored, model: Loaded) -> list[PreparedImage]:
    expected = (model.config.rows_per_image, model.config.decoder.hidden_size)
    images = []
    for number, image in enumerate(_list(stored.description, "images")):
        rows = stored.arrays.get(f"rows.{number}")
        match image:
            case {"digest": str(digest), "record": record} if rows is not None and rows.shape == expected:
                given = EncodedImage(rows.astype(np.float32), digest, model.vision, record_of(record))
                images.append(PreparedImage(digest, NO_PIXELS, given.record, given))
            case _:
                raise ForeignError(f"its image {number} is not whole")
    return images


def _turn(turn: object, images: Sequence[PreparedImage] | None) -> Turn:
    match turn:
        case {"question": str(question), "images": list(numbers), "answer": str(answer)}:
            if images is None:
                return Turn(question, (), (), answer)
            if question.count(IMAGE_TOKEN) == len(numbers) and all(number in range(len(images)) for number in numbers):
                shown = tuple(images[number] for number in numbers)
                parts = tuple({"type": "image", "image": image.encoded} for image in shown)
                return Turn(question, parts, shown, answer)
    raise ForeignError("one of its turns is not whole")
