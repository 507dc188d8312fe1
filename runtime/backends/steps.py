"""Inputs of a decoder step next to the rows themselves: the same for every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import Ints
from owl2.runtime.rope import rotary_tables

StepInputs = dict[str, NDArray[Any]]
"""Arrays by name of the graph's input."""


def row_inputs(modality: Ints, logit_rows: Ints) -> StepInputs:
    """Inputs that say which weights each of T rows goes through, and which rows' logits are wanted.

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


TEXT_STEP = row_inputs(np.zeros(1, np.int64), np.zeros(1, np.int64))
"""Those of a step of one text row. They are constants: a device gets them once."""
for _constant in TEXT_STEP.values():
    _constant.setflags(write=False)


def position_inputs(
    config: DecoderConfig, past: int, tokens: int, cached: int, dtype: DTypeLike, total: int | None = None
) -> StepInputs:
    """Mask and rotary angles of the dialect onnx for T new positions.

    Args:
        config: of the model.
        past: positions in the K/V cache.
        tokens: T.
        cached: S, rows of the K/V cache that the graph reads; at least ``past`` and 1, the rest is masked.
        dtype: of the activations.
        total: positions at the end of the step that these are a block of, which the angles may depend on; None for
            ``past + tokens``.
    """
    cos, sin = rotary_tables(config, total or past + tokens, config.head_dim, dtype)
    return {
        spec.ATTENTION_MASK: attention_mask(tokens, past, cached).astype(dtype),
        spec.ROTARY_COS: cos[past : past + tokens],
        spec.ROTARY_SIN: sin[past : past + tokens],
    }


def attention_mask(tokens: int, past: int, cached: int) -> NDArray[np.float32]:
    """Addends to the scores of T new positions, 0 or :data:`owl2.runtime.spec.MASKED`: [T, cached + T].

    A new position sees the first ``past`` of the cached rows, itself, and the new positions before it.
    """
    mask = np.zeros((tokens, cached + tokens), dtype=np.float32)
    mask[:, past:cached] = spec.MASKED
    mask[:, cached:][np.triu_indices(tokens, 1)] = spec.MASKED
    return mask


def cache_names(config: DecoderConfig) -> list[tuple[str, str]]:
    """Names of the input and the output of each K/V tensor: keys and values of each layer in turn."""
    layers = range(config.num_hidden_layers)
    return [pair for layer in layers for pair in zip(spec.past_names(layer), spec.present_names(layer))]
