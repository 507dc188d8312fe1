"""Slow and obvious versions of what the code computes fast; tests compare the two."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
