"""How a linear layer's weight is stored in a bundle, and the float32 matrix it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from owl2.quant.grid import QuantizedWeight

# x86 processors with AVX2 but no VNNI add two products of uint8 activations and int8 weights in 16 bits, which
# saturate: with codes up to 127 the image rows were off by many times what int8 costs elsewhere (emulated
# Haswell); with codes up to 63, which cannot overflow, they are what they are on other processors.
MOST = 63


@dataclass(frozen=True)
class DenseWeight:
    """A plain matrix.

    Attributes:
        values: float32 [N, K].
        dtype: what is stored; fp16 halves the file, arithmetic stays float32 on CPU.
    """

    values: Tensor
    dtype: Literal["fp32", "fp16"]

    def dequantize(self) -> Tensor:
        """The matrix the graph multiplies with: float32 [N, K]."""
        return self.values if self.dtype == "fp32" else self.values.half().float()


@dataclass(frozen=True)
class ChannelInt8Weight:
    """int8 codes with one scale per output channel, for int8 activations quantized on the fly.

    Attributes:
        codes: int8 [N, K], symmetric, within ±63 (see :data:`MOST`).
        scales: float32 [N].
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> ChannelInt8Weight:
        """Round a float32 [N, K] matrix to the nearest codes."""
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / MOST
        codes = (weight / scales[:, None]).round().clamp(-MOST, MOST).to(torch.int8)
        return cls(codes, scales)

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.codes.float() * self.scales[:, None]


@dataclass(frozen=True)
class PermutedWeight:
    """Integers whose groups are no runs of columns: the columns were sorted by group, the input has to follow.

    Attributes:
        weight: [N, K], column i belongs to input ``columns[i]``.
        columns: int64 [K], a permutation.
    """

    weight: QuantizedWeight
    columns: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K], for inputs in their own order."""
        matrix = torch.empty(self.weight.codes.shape)
        matrix[:, self.columns] = self.weight.dequantize()
        return matrix


LinearWeight = DenseWeight | ChannelInt8Weight | QuantizedWeight | PermutedWeight
"""Every form of weight; all answer ``dequantize()``."""


def dequantized_blocks(weight: LinearWeight, rows: int) -> Iterator[Tensor]:
    """``weight.dequantize()`` in blocks of at most ``rows`` outputs, each float32 [n, K]."""
    for start in range(0, _outputs(weight), rows):
        yield _part(weight, slice(start, start + rows)).dequantize()


def _outputs(weight: LinearWeight) -> int:
    if isinstance(weight, PermutedWeight):
        return _outputs(weight.weight)
    return len(weight.values if isinstance(weight, DenseWeight) else weight.codes)


def _part(weight: LinearWeight, part: slice) -> LinearWeight:
    """Some of the outputs."""
    if isinstance(weight, DenseWeight):
        return replace(weight, values=weight.values[part])
    if isinstance(weight, ChannelInt8Weight):
        return replace(weight, codes=weight.codes[part], scales=weight.scales[part])
    if isinstance(weight, PermutedWeight):
        inner = _part(weight.weight, part)
        assert isinstance(inner, QuantizedWeight)
        return replace(weight, weight=inner)
    zeros = None if weight.zero_points is None else weight.zero_points[part]
    return replace(weight, codes=weight.codes[part], scales=weight.scales[part], zero_points=zeros)
