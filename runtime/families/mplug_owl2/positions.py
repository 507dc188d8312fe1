"""Merging text and images into one sequence of decoder positions.

A position is named by a key: a token id, or (digest, row) for a row of an image. Keys decide everything
about a position but its place, so they also tell what a KV cache holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from owl2.runtime.config import IMAGE_TOKEN_ID
from owl2.runtime.engine import Floats, Ints
from owl2.runtime.errors import PromptError
from owl2.runtime.families.mplug_owl2.template import check_placeholders
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import PreparedImage
from owl2.runtime.kv_cache import Key
from owl2.runtime.token_table import TokenTable


@dataclass(frozen=True)
class Prompt:
    """A prompt as positions.

    Attributes:
        keys: what each position holds.
        images: by digest, all that ``keys`` refer to.
    """

    keys: list[Key]
    images: Mapping[str, PreparedImage]


def encode_prompt(text: str, images: Sequence[PreparedImage], tokenizer: Tokenizer, rows_per_image: int) -> Prompt:
    """Tokenize a prompt and put its images' rows in place of the placeholders.

    Raises:
        PromptError: the prompt is empty, or placeholders and images do not agree.
    """
    check_placeholders(text, len(images))
    ids = tokenizer.encode_prompt(text)
    if not ids:
        raise PromptError("the prompt is empty; give at least one character or image")
    digests = [image.digest for image in images]
    return Prompt(merge(ids, digests, rows_per_image), dict(zip(digests, images)))


def merge(ids: Sequence[int], digests: Sequence[str], rows_per_image: int) -> list[Key]:
    """Replace each placeholder id by its image's rows, in order of appearance.

    Args:
        ids: token ids with -200 per image.
        digests: one per placeholder.
        rows_per_image: decoder positions of one image.
    """
    images = iter(digests)
    keys: list[Key] = []
    for token in ids:
        if token == IMAGE_TOKEN_ID:
            digest = next(images)
            keys.extend((digest, row) for row in range(rows_per_image))
        else:
            keys.append(token)
    return keys


def digests_of(keys: Sequence[Key]) -> list[str]:
    """The images that ``keys`` need, each once, in order of appearance."""
    return list(dict.fromkeys(key[0] for key in keys if isinstance(key, tuple)))


def embed(keys: Sequence[Key], table: TokenTable, image_rows: Mapping[str, Floats]) -> tuple[Floats, Ints]:
    """Embeddings and modality of positions.

    Args:
        keys: T positions.
        table: token embeddings [V, C].
        image_rows: per digest, float32 [rows_per_image, C].

    Returns:
        float32 [T, C], and int64 [T] that is 1 at image rows (the end-of-image row included).
    """
    texts = table.rows([key for key in keys if isinstance(key, int)])
    modality = np.zeros(len(keys), dtype=np.int64)
    if len(texts) == len(keys):  # every step of an answer
        return texts, modality
    embeds = np.empty((len(keys), table.width), dtype=np.float32)
    for position, key in enumerate(keys):
        if isinstance(key, tuple):
            digest, row = key
            embeds[position] = image_rows[digest][row]
            modality[position] = 1
    embeds[modality == 0] = texts
    return embeds, modality
