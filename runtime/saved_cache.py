"""A KV cache in a file: which positions it holds, their keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from owl2.runtime.engine import KvContent
from owl2.runtime.errors import Owl2Error
from owl2.runtime.foreign import ForeignError
from owl2.runtime.kv_cache import Key, KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.stored import Array, Stored

TEXT = -1
"""In place of an image's number, at positions that hold a token."""


def stored_cache(
    model: Loaded, cache: KvCache, numbers: Mapping[str, int]
) -> tuple[dict[str, Any] | None, dict[str, Array]]:
    """Description and arrays of a cache; None and none where it is empty or the device cannot give it.

    Args:
        model: of the cache.
        cache: up to the first position of an image without a number.
        numbers: of the images, by digest.
    """
    keys = _known(cache.keys, numbers) if model.engine.kv_transfer is not None else []
    if not keys:
        return None, {}
    content = cache.content(len(keys))
    parts = {f"kv.{name}": part for name, part in content.parts.items()}
    return {"form": content.form, "longest": cache.longest}, {"keys": np.array(keys, np.int32), **parts}


def _known(keys: Sequence[Key], numbers: Mapping[str, int]) -> list[tuple[int, int]]:
    """Positions as (token, TEXT) or (row, image), up to the first of an image that the conversation does not have."""
    known = []
    for key in keys:
        match key:
            case int():
                known.append((key, TEXT))
            case (digest, row) if digest in numbers:
                known.append((row, numbers[digest]))
            case _:
                break
    return known


def named_keys(keys: Array, digests: Sequence[str]) -> list[Key]:
    """The inverse, for an array [P, 2]."""
    return [int(value) if owner == TEXT else (digests[owner], int(value)) for value, owner in keys.tolist()]


def restore_cache(stored: Stored, digests: Sequence[str], model: Loaded, cache: KvCache) -> None:
    """Put the stored keys and values into ``cache``, which is empty and stays so if they make no sense.

    Args:
        stored: with the description and arrays of :func:`stored_cache`.
        digests: of the images, by number.
        model: of the cache.
        cache: to fill.

    Raises:
        ForeignError: they make no sense.
        BackendError: the K/V cache is of another type.
    """
    keys, rows = stored.arrays["keys"], model.config.rows_per_image
    state = stored.description.get("cache")
    parts = {name.removeprefix("kv."): part for name, part in stored.arrays.items() if name.startswith("kv.")}
    match state:
        case {"form": str(form), "longest": int(longest)} if longest >= len(keys):
            pass
        case _:
            raise ForeignError("it does not say what its keys and values are")
    if keys.dtype != np.int32 or keys.ndim != 2 or keys.shape[1] != 2 or not 0 < len(keys) <= cache.context:
        raise ForeignError(f"it has {len(keys)} positions; the context holds {cache.context}")
    values, owners = keys[:, 0], keys[:, 1]
    limits = np.where(owners == TEXT, model.config.decoder.vocab_size, rows)
    if ((values < 0) | (values >= limits) | (owners < TEXT) | (owners >= len(digests))).any():
        raise ForeignError("one of its positions holds neither a token nor a row of its images")
    named = named_keys(keys, digests)
    try:
        cache.restore(named, KvContent(form, len(named), parts), longest)
    except ValueError as error:
        if isinstance(error, Owl2Error):
            raise
        raise ForeignError(f"its keys and values do not fit this model ({error})") from error
