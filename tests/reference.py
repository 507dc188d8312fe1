"""Slow and obvious versions of what the code computes fast; tests compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.config import IMAGE_TOKEN_ID

IGNORED_LABEL = -100

Array = NDArray[np.float64]


def round_one(value: float, scale: float, bits: int) -> int:
    """Nearest code of a value on the symmetric grid, halves to even."""
    levels = 2 ** (bits - 1)
    return int(min(max(round(value / scale), -levels), levels - 1))


def search_scale(values: Array, importance: Array, bits: int, clip_search: bool, signed: bool) -> float:
    """Scale of one row of one group: the candidate with the least weighted squared error."""
    levels = 2 ** (bits - 1)
    peak = max(values, key=abs)
    top = -peak if signed else abs(peak)
    if top == 0:
        return 1.0
    if not clip_search:
        return float(np.float32(top / (levels if signed else levels - 1)))
    candidates = [float(np.float32(top / (levels - 1) * shrink)) for shrink in np.linspace(1.0, 0.25, 30)]

    def error(scale: float) -> float:
        rounded = [round_one(value, scale, bits) * scale for value in values]
        return float(np.sum(importance * (values - rounded) ** 2))

    return min(candidates, key=error)


def gptq_by_columns(
    weight: Array,
    hessian: Array,
    groups: list[list[int]],
    bits: int,
    *,
    damping: float = 0.01,
    clip_search: bool = True,
    signed: bool = False,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """GPTQ as derived from optimal brain surgeon (Frantar et al. 2022, section 3, equation 2).

    Rounds one column, then moves **all** remaining columns to their optimum, with a freshly inverted Hessian
    of the remaining columns. ``groups`` lists the columns of each group in the order of rounding. No column
    of ``hessian`` may be zero.

    Returns:
        Codes [N, K] in the original order of columns, scales [N, len(groups)] in the order of ``groups``.
    """
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    order = [column for group in groups for column in group]
    # The weight of column k's squared rounding error: the Schur complement given all later columns.
    importance = {
        column: 1.0 / np.linalg.inv(damped[np.ix_(order[place:], order[place:])])[0, 0]
        for place, column in enumerate(order)
    }
    codes = np.zeros(weight.shape, dtype=np.int8)
    scales = np.zeros((len(weight), len(groups)), dtype=np.float32)
    current = weight.copy()
    for number, group in enumerate(groups):
        group_importance = np.array([importance[column] for column in group])
        for row in range(len(weight)):
            scales[row, number] = search_scale(current[row, group], group_importance, bits, clip_search, signed)
        for column in group:
            remaining = order[order.index(column) :]
            inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
            for row in range(len(weight)):
                scale = float(scales[row, number])
                codes[row, column] = round_one(current[row, column], scale, bits)
                missed = current[row, column] - codes[row, column] * scale
                current[row, remaining] -= missed / inverse[0, 0] * inverse[0]
    return codes, scales


def output_error(weight: Array, rounded: Array, inputs: Array) -> float:
    """Squared error of the layer's output over its energy, from the inputs [n, K] themselves."""
    return float(np.sum((inputs @ (weight - rounded).T) ** 2) / np.sum((inputs @ weight.T) ** 2))


def unpack_nbits(packed: NDArray[np.uint8], bits: int, width: int) -> NDArray[np.int8]:
    """The first signed numbers of each row of bytes [N, ...], two in a byte if of 4 bits, the low half first."""
    codes = np.zeros((len(packed), width), dtype=np.int8)
    for row, stored in enumerate(packed):
        numbers = stored.reshape(-1).tolist()
        halves = [half for byte in numbers for half in (byte % 16, byte // 16)]
        codes[row] = [number - 2 ** (bits - 1) for number in (halves if bits == 4 else numbers)[:width]]
    return codes


def by_column(values: NDArray[Any], group_size: int, width: int) -> NDArray[Any]:
    """One value per group [N, G] -> one per column [N, width]."""
    return np.stack([values[:, column // group_size] for column in range(width)], axis=1)


@dataclass(frozen=True)
class Merged:
    """A batch whose placeholders are replaced by image rows; short sequences are padded on the right.

    Attributes:
        embeds: [B, L, C]; zero at padding.
        modality: int64 [B, L]; 1 at image rows.
        labels: int64 [B, L]; -100 at image rows and padding.
        mask: bool [B, L]; False at padding.
    """

    embeds: Tensor
    modality: Tensor
    labels: Tensor
    mask: Tensor


def merge(
    model: Owl2Model, ids: Tensor, blocks: list[Tensor], labels: Tensor | None = None, mask: Tensor | None = None
) -> Merged:
    """Merge text and images position by position, as the original does in training.

    Args:
        model: has the token table.
        ids: int64 [B, T]; -200 where a block goes.
        blocks: one [rows, C] per placeholder in order of appearance over the batch. A sequence without any
            placeholder still uses up one block.
        labels: int64 [B, T]; None for no loss.
        mask: [B, T], 0 at padding ids; None keeps padding ids as ordinary text.
    """
    labels = torch.full_like(ids, IGNORED_LABEL) if labels is None else labels
    mask = torch.ones_like(ids) if mask is None else mask
    unused, sequences = iter(blocks), []
    for row, row_labels, row_mask in zip(ids, labels, mask):
        if blocks and IMAGE_TOKEN_ID not in row:
            next(unused)
        pieces = []
        for token, label, visible in zip(row, row_labels, row_mask):
            if token == IMAGE_TOKEN_ID:
                block = next(unused)
                image = torch.ones(len(block), dtype=torch.int64)
                pieces.append((block, image, image * IGNORED_LABEL, image.bool()))
            else:
                text = torch.zeros(1, dtype=torch.int64)
                pieces.append((model.embed(token[None]), text, label[None], visible[None].bool()))
        sequences.append([torch.cat(column) for column in zip(*pieces)])
    embeds, modality, merged_labels, merged_mask = zip(*sequences)
    return Merged(
        pad_sequence(list(embeds), batch_first=True),
        pad_sequence(list(modality), batch_first=True),
        pad_sequence(list(merged_labels), batch_first=True, padding_value=IGNORED_LABEL),
        pad_sequence(list(merged_mask), batch_first=True),
    )


def logits(model: Owl2Model, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
    """ids: int64 [B, T] with -200 per image, pixels: [N, 3, R, R] -> logits [B, L, V], in one run of the model."""
    merged = merge(model, ids, [] if pixels is None else list(model.encode_images(pixels)))
    return model.head(model.decode(merged.embeds, merged.modality)[0])
