"""What a decoder graph is fed at a step, beside rows and K/V: the same for every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import Ints
from owl2.runtime.rope import rotary_tables


def row_inputs(modality: Ints, logit_rows: Ints) -> dict[str, Ints]:
    """Where each of T rows goes, by name of the input; see :mod:`owl2.runtime.spec`.

    Args:
        modality: int64 [T], 1 at image rows.
        logit_rows: int64 [R].
    """
    text, image = np.flatnonzero(modality == 0), np.flatnonzero(modality)
    return {
        spec.MODALITY: modality,
        spec.TEXT_ROWS: text,
        spec.IMAGE_ROW_INDEX: image,
        spec.ROW_ORDER: np.argsort(np.concatenate([text, image]), kind="stable"),
        spec.LOGIT_ROWS: logit_rows,
    }


def onnx_inputs(
    config: DecoderConfig, modality: Ints, past: int, cached: int, logit_rows: Ints, dtype: DTypeLike
) -> dict[str, NDArray[Any]]:
    """Inputs of the dialect onnx for T positions, by name.

    Args:
        config: of the model.
        modality: int64 [T], 1 at image rows.
        past: positions in the K/V cache.
        cached: S, rows of the K/V cache that the graph is given; at least ``past`` and 1, those beyond are masked.
        logit_rows: int64 [R].
        dtype: of the activations.
    """
    tokens = len(modality)
    cos, sin = rotary_tables(config, past + tokens, config.head_dim, dtype)
    return {
        **row_inputs(modality, logit_rows),
        spec.ATTENTION_MASK: attention_mask(tokens, past, cached).astype(dtype),
        spec.ROTARY_COS: cos[past : past + tokens],
        spec.ROTARY_SIN: sin[past : past + tokens],
    }


def attention_mask(tokens: int, past: int, cached: int) -> NDArray[np.float32]:
    """What is added to the scores of T new positions: 0 or :data:`owl2.runtime.spec.MASKED`, [T, cached + T].

    A new position sees the first ``past`` of the cached rows, itself, and the new positions before it.
    """
    mask = np.zeros((tokens, cached + tokens), dtype=np.float32)
    mask[:, past:cached] = spec.MASKED
    mask[:, cached:][np.triu_indices(tokens, 1)] = spec.MASKED
    return mask
