"""How a linear layer's weight is stored in a bundle, and the float32 matrix it stands for."""

from __future__ import annotations

from dataclasses import dataclass
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


LinearWeight = DenseWeight | ChannelInt8Weight | QuantizedWeight
"""Every form of weight; all answer ``dequantize()``."""
