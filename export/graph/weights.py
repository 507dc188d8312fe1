"""Linear layers of a graph, and the forms in which their weights are stored; each writes itself through the dialect."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from owl2.export.graph.builder import DTYPES, GraphBuilder
from owl2.export.graph.dialect import Dialect
from owl2.quant.grid import QuantizedWeight
from owl2.runtime.errors import ExportError
from owl2.runtime.spec import FloatType

# x86 processors with AVX2 but no VNNI add two products of uint8 activations and int8 weights in 16 bits, which
# saturate: with codes up to 127 the image rows were off by many times what int8 costs elsewhere (emulated
# Haswell); with codes up to 63, which cannot overflow, they are what they are on other processors.
MAX_CHANNEL_CODE = 63
IN_BUNDLE = "store it as fp32 in a bundle (--weights, --vision, --activations)"


def check_float16(name: str, values: Tensor, advice: str = IN_BUNDLE) -> None:
    """Refuse finite numbers that float16 would store as infinite ones; ``advice`` says what to do instead.

    Raises:
        ExportError: with the name and the largest number.
    """
    largest = float(values.detach().abs().max()) if values.numel() else 0.0
    if not math.isfinite(float(torch.tensor(largest).half())):
        raise ExportError(
            f"{name} holds values up to {largest:.3g}, and fp16, in which it would be stored, ends at 65504; {advice}"
        )


class LinearWeight(Protocol):
    """A weight [N, K], output by input features, in the form in which a graph stores it."""

    @property
    def rows(self) -> int:
        """N."""

    def dequantize(self) -> Tensor:
        """The matrix that the graph multiplies by: float32 [N, K]."""

    def part(self, rows: slice) -> LinearWeight:
        """Some of the outputs."""

    def multiply(self, ops: Dialect, x: str, name: str, bias: Tensor | None) -> str:
        """Append x · weightᵀ + bias to the graph of ``ops``: [M, K] -> [M, N].

        Args:
            ops: writes the operators; those of the ONNX standard can be written to ``ops.graph`` directly.
            x: input rows, in the graph's activation type, as the result.
            name: of the layer; names of constants begin with it.
            bias: float32 [N]; :func:`add_bias` adds it.

        Raises:
            ExportError: the dialect has no operators for this form.
        """


@dataclass(frozen=True)
class Linear:
    """A linear layer of a graph: a name for its tensors, its weight and its bias (float32 [N] or None)."""

    name: str
    weight: LinearWeight
    bias: Tensor | None = None

    def apply(self, ops: Dialect, x: str) -> str:
        """Append the layer to the graph of ``ops``: [M, K] -> [M, N]."""
        return self.weight.multiply(ops, x, self.name, self.bias)


@dataclass(frozen=True)
class DenseWeight:
    """A plain matrix.

    Attributes:
        values: float32 [N, K].
        dtype: type in the file; fp16 halves the file, arithmetic stays float32 on CPU.
    """

    values: Tensor
    dtype: FloatType

    @classmethod
    def of(cls, name: str, values: Tensor, dtype: FloatType) -> DenseWeight:
        """The weight called ``name``; raises as :func:`check_float16` where that is its type."""
        if dtype == "fp16":
            check_float16(name, values)
        return cls(values, dtype)

    @property
    def rows(self) -> int:
        return len(self.values)

    def dequantize(self) -> Tensor:
        return self.values if self.dtype == "fp32" else self.values.half().float()

    def part(self, rows: slice) -> DenseWeight:
        return replace(self, values=self.values[rows])

    def multiply(self, ops: Dialect, x: str, name: str, bias: Tensor | None) -> str:
        graph, matrix = ops.graph, np.ascontiguousarray(self.values.numpy().T)
        stored = graph.constant(name + ".weight", matrix.astype(DTYPES[self.dtype]))
        if self.dtype != graph.activations:
            stored = graph.op("Cast", stored, to=graph.element)
        return add_bias(graph, graph.op("MatMul", x, stored), name, bias)


@dataclass(frozen=True)
class ChannelInt8Weight:
    """int8 codes with one scale per output channel, for int8 activations quantized on the fly.

    Attributes:
        codes: int8 [N, K], symmetric, within ±63 (see :data:`MAX_CHANNEL_CODE`).
        scales: float32 [N].
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> ChannelInt8Weight:
        """Round a float32 [N, K] matrix to the nearest codes."""
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / MAX_CHANNEL_CODE
        codes = (weight / scales[:, None]).round().clamp(-MAX_CHANNEL_CODE, MAX_CHANNEL_CODE).to(torch.int8)
        return cls(codes, scales)

    @property
    def rows(self) -> int:
        return len(self.codes)

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scales[:, None]

    def part(self, rows: slice) -> ChannelInt8Weight:
        return ChannelInt8Weight(self.codes[rows], self.scales[rows])

    def multiply(self, ops: Dialect, x: str, name: str, bias: Tensor | None) -> str:
        return ops.dynamic_int8_matmul(x, name, self.codes, self.scales, bias)


@dataclass(frozen=True)
class IntegerWeight:
    """Integers with a scale per group of columns, for floating-point activations."""

    integers: QuantizedWeight

    @property
    def rows(self) -> int:
        return len(self.integers.codes)

    def dequantize(self) -> Tensor:
        return self.integers.dequantize()

    def part(self, rows: slice) -> IntegerWeight:
        whole = self.integers
        zeros = None if whole.zero_points is None else whole.zero_points[rows]
        return IntegerWeight(replace(whole, codes=whole.codes[rows], scales=whole.scales[rows], zero_points=zeros))

    def multiply(self, ops: Dialect, x: str, name: str, bias: Tensor | None) -> str:
        graph = ops.graph
        if self.integers.columns is not None:
            order = self.integers.columns.numpy()
            # Named by content: layers quantized on the same inputs have the same order and share the result.
            constant = graph.constant(f"columns_{hashlib.sha256(order.tobytes()).hexdigest()[:16]}", order)
            x = graph.shared("Gather", x, constant, axis=1)
        return add_bias(graph, ops.integer_matmul(x, name, self.integers), name, bias)


def add_bias(graph: GraphBuilder, y: str, name: str, bias: Tensor | None) -> str:
    """y [M, N], plus the bias (float32 [N]) of the layer ``name`` if it has one."""
    return y if bias is None else graph.op("Add", y, graph.floats(name + ".bias", bias.numpy()))


def dequantized_blocks(weight: LinearWeight, rows: int) -> Iterator[Tensor]:
    """``weight.dequantize()`` in blocks of at most ``rows`` outputs, each float32 [n, K]."""
    for start in range(0, weight.rows, rows):
        yield weight.part(slice(start, start + rows)).dequantize()
