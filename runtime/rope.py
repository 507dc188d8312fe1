"""Rotary position angles, with the two official ways of stretching them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from owl2.runtime.config import DecoderConfig

Table = NDArray[np.floating[Any]]


def rotary_base(config: DecoderConfig, total: int) -> float:
    """theta for a sequence of ``total`` positions.

    ``dynamic`` scaling raises theta once ``total`` exceeds max_position_embeddings ("NTK-aware" scaling:
    theta · (f·L/max - (f-1))^(d/(d-2))).
    """
    scaling, limit, dim = config.rope_scaling, config.steady_limit, config.head_dim
    if scaling is None or limit is None or total <= limit:
        return config.rope_theta
    stretch: float = scaling.factor * total / limit - (scaling.factor - 1)
    return float(config.rope_theta * stretch ** (dim / (dim - 2)))


def rotary_angles(config: DecoderConfig, places: Sequence[int], total: int) -> NDArray[np.float32]:
    """Angles of T places within a sequence of ``total`` positions: -> float32 [T, D/2].

    Frequencies and angles are rounded to float32 where the original rounds them.
    """
    dim = config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (1.0 / np.float32(rotary_base(config, total)) ** exponents).astype(np.float32)
    positions = np.asarray(places, dtype=np.float32)
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        positions = positions / np.float32(config.rope_scaling.factor)
    return np.outer(positions, frequencies).astype(np.float32)


@lru_cache(maxsize=8)
def _tables(config: DecoderConfig, length: int, total: int, width: int, dtype: str) -> tuple[Table, Table]:
    angles = rotary_angles(config, range(length), total)
    angles = np.pad(angles, ((0, 0), (0, (width - config.head_dim) // 2)))
    tables = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    for table in tables:
        table.setflags(write=False)  # they are shared, and a device gets them once
    return tables


def rotary_tables(config: DecoderConfig, total: int, width: int, dtype: DTypeLike) -> tuple[Table, Table]:
    """Cosines and sines for a step that ends at ``total`` positions: each [>= total, width / 2].

    The tables of the whole context are computed once, unless dynamic scaling makes them depend on ``total``.

    Args:
        config: of the model.
        total: cached and new positions.
        width: of a head, at least its own; angles beyond that are 0.
        dtype: of the tables.
    """
    dtype_name = np.dtype(dtype).str
    if config.steady_limit is not None and total > config.steady_limit:
        return _tables(config, total, total, width, dtype_name)
    length = max(total, config.max_position_embeddings)
    return _tables(config, length, config.max_position_embeddings, width, dtype_name)
