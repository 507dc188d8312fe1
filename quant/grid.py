"""The integer grid: scales, rounding, and the weight they make.

A code ``q`` is a signed integer of -2^(bits-1) .. 2^(bits-1)-1 and stands for ``q * scale``. A scale belongs to one
row and one group of ``group_size`` consecutive columns; the last group is shorter where the row's length is not a
multiple of it. Weights quantized here are symmetric and keep the order of their columns; those quantized by other
programs may have zero points, stand for ``(q - zero) * scale``, and have their columns sorted by group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from owl2.quant.config import QuantConfig, ScaleType
from owl2.runtime.errors import QuantizationError

# With a few inputs twenty times as strong as the rest, a search down to 0.25 leaves 3 % less error than one
# down to 0.4; elsewhere both are equal. At 4 bits, twice as many steps gain less than 1.5 %.
MIN_SHRINK = 0.25
SHRINK_STEPS = 30


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight as integers and scales.

    Attributes:
        codes: [N, K] int8, signed.
        scales: [N, G] float32, G = ceil(K / group_size).
        bits: 4 or 8.
        group_size: columns per scale.
        zero_points: [N, G] int8, signed as the codes are; None where all are zero.
        columns: [K] int64, a permutation: the input feature of each column; None for columns in the inputs' order.

    Raises:
        QuantizationError: the tensors do not fit together.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    zero_points: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.codes.shape
        expected = (rows, -(-width // self.group_size))
        if self.codes.dtype != torch.int8 or self.scales.dtype != torch.float32:
            raise QuantizationError(
                f"codes must be int8 and scales float32, got {self.codes.dtype} and {self.scales.dtype}"
            )
        if self.scales.shape != expected:
            raise QuantizationError(
                f"codes {rows}x{width} in groups of {self.group_size} need scales of shape {expected}, "
                f"got {tuple(self.scales.shape)}"
            )
        zeros = self.zero_points
        if zeros is not None and (zeros.dtype != torch.int8 or zeros.shape != expected):
            raise QuantizationError(
                f"zero points must be int8 of shape {expected}, got {zeros.dtype} of shape {tuple(zeros.shape)}"
            )

    def dequantize(self) -> Tensor:
        """The weight these integers stand for, columns in the inputs' order: [N, K] float32."""

        def by_column(values: Tensor) -> Tensor:
            return values.repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]

        codes = self.codes if self.zero_points is None else self.codes.float() - by_column(self.zero_points)
        weight = codes * by_column(self.scales)
        return weight if self.columns is None else weight[:, self.columns.argsort()]


def check_weight(weight: Tensor) -> None:
    """Raise QuantizationError for a weight that is not a matrix, is empty or has values that are not finite."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise QuantizationError(f"a weight must be a matrix out x in, got shape {tuple(weight.shape)}")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise QuantizationError(
            f"{bad} of the weight's {weight.numel()} values are NaN or infinite; the checkpoint is damaged "
            "or was converted to a dtype too narrow for it"
        )


def compute_scales(group: Tensor, config: QuantConfig, importance: Tensor | None = None) -> Tensor:
    """The scale of each row of one group.

    Args:
        group: [N, g] float, the weights of one group of columns.
        config: bits, clip_search, signed_scales and scale_dtype are read.
        importance: [g] float, weight of each column's squared error in the clip search; None for equal.

    Returns:
        [N] of the dtype of ``group``, each value exact in ``scale_dtype``; 1 for rows that are zero.

    Raises:
        QuantizationError: weights so large that ``scale_dtype`` does not hold their scale.
    """
    levels = 2 ** (config.bits - 1)
    peak = group.gather(1, group.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    if not config.clip_search:
        return _storable(-peak / levels if config.signed_scales else peak.abs() / (levels - 1), config.scale_dtype)
    widest = (-peak if config.signed_scales else peak.abs()) / (levels - 1)
    best = _storable(widest, config.scale_dtype)
    least = _rounding_error(group, best, config.bits, importance)
    for step in range(1, SHRINK_STEPS):
        scale = _storable(widest * (1.0 - (1.0 - MIN_SHRINK) * step / (SHRINK_STEPS - 1)), config.scale_dtype)
        error = _rounding_error(group, scale, config.bits, importance)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def round_to_grid(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes of ``values``, clamped to the grid; ``scale`` broadcasts. Dtype of ``values``."""
    levels = 2 ** (bits - 1)
    return (values / scale).round_().clamp_(-levels, levels - 1)


def rtn(weight: Tensor, config: QuantConfig, importance: Tensor | None = None) -> QuantizedWeight:
    """Round a weight to nearest.

    Args:
        weight: [N, K] float of any width.
        config: bits, group_size, clip_search, signed_scales and scale_dtype are read.
        importance: [K] float, weight of each column in the clip search; None for equal.
    """
    check_weight(weight)
    if weight.dtype.itemsize < 4:
        weight = weight.float()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    for start in range(0, weight.shape[1], config.group_size):
        columns = slice(start, start + config.group_size)
        group = weight[:, columns]
        scale = compute_scales(group, config, None if importance is None else importance[columns])
        codes[:, columns] = round_to_grid(group, scale[:, None], config.bits).to(torch.int8)
        scales.append(scale.float())
    return QuantizedWeight(codes, torch.stack(scales, dim=1), config.bits, config.group_size)


def _rounding_error(group: Tensor, scale: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    squares = (group - round_to_grid(group, scale[:, None], bits) * scale[:, None]).square_()
    return squares.sum(dim=1) if importance is None else squares @ importance


def _storable(scale: Tensor, dtype: ScaleType) -> Tensor:
    """Round to ``dtype``; 1 instead of a scale that is zero or too small to divide by."""
    rounded = (scale.half() if dtype == "fp16" else scale).float()
    if not bool(rounded.isfinite().all()):
        raise QuantizationError(
            f"weights up to {float(scale.abs().max()):.3g} times the largest code need scales that {dtype} does not "
            "hold; store the scales as fp32 or look for a damaged checkpoint"
        )
    usable = rounded.abs() >= torch.finfo(torch.float32).tiny
    return torch.where(usable, rounded, 1.0).to(scale.dtype)
