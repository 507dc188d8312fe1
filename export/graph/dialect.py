"""Operator sets: what the graph builders ask of one, and the table of those that exist."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.onnx_dialect import OnnxDialect
from owl2.export.graph.ort_dialect import OrtDialect
from owl2.quant.grid import QuantizedWeight
from owl2.runtime.config import DecoderConfig
from owl2.runtime.spec import DialectName


class Dialect(Protocol):
    """An operator set, bound to the graph that it writes.

    Methods append nodes to the graph and return tensor names. Rows are [M, C]; floating-point tensors are in the
    graph's activation type.

    Attributes:
        interface: the inputs and outputs of its decoder graphs, by the name that tells the runtime how to feed them.
        MINIMUM_ONNXRUNTIME: the lowest version that has every operator used, with the attributes used.
    """

    interface: ClassVar[DialectName]
    MINIMUM_ONNXRUNTIME: ClassVar[str]
    graph: GraphBuilder

    def __init__(self, graph: GraphBuilder) -> None: ...

    def integer_matmul(self, x: str, name: str, weight: QuantizedWeight) -> str:
        """Multiply by the transpose of integers in groups, whose columns are in the order of x: [M, K] -> [M, N].

        Raises:
            ExportError: integers that this operator set does not have.
        """

    def dynamic_int8_matmul(self, x: str, name: str, codes: Tensor, scales: Tensor, bias: Tensor | None) -> str:
        """Round x to uint8 while running, multiply it by int8 codes [N, K] · scales [N], add a bias [N]: -> [M, N].

        Raises:
            ExportError: this operator set has no such product.
        """

    def rms_norm(self, x: str, width: int, eps: float) -> str:
        """RMSNorm without a gain: [M, C] -> [M, C]."""

    def add_rms_norm(self, residual: str, x: str, width: int, eps: float) -> tuple[str, str]:
        """residual + x, and its RMSNorm without a gain: -> (normalised, sum), both [M, C]."""

    def silu(self, x: str) -> str:
        """x · sigmoid(x)."""

    def activation(self, x: str, name: str) -> str:
        """quick_gelu, x · sigmoid(1.702 x), or gelu, x / 2 · (1 + erf(x / √2))."""

    def declare_cache(self, config: DecoderConfig) -> None:
        """Declare the inputs that attention and K/V cache of a decoder need in addition to its rows."""

    def declare_present(self, config: DecoderConfig) -> None:
        """Declare the outputs of the K/V cache."""

    def causal_attention(self, qkv: tuple[str, str, str], layer: int, config: DecoderConfig) -> str:
        """Rows q, k and v of this layer -> rows, rotary inside; writes the layer's part of the K/V cache."""

    def full_attention(self, qkv: tuple[str, str, str], heads: int, width: int) -> str:
        """q [N, Q, C], k and v [N, S, C] with C = width -> [N, Q, C], no mask."""


DIALECTS: dict[str, type[Dialect]] = {"ort": OrtDialect, "onnx": OnnxDialect}
"""The dialects by the name that an export is asked for."""
