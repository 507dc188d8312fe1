"""What the graph builders ask of an operator set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.weights import LinearWeight
from owl2.runtime.config import DecoderConfig
from owl2.runtime.spec import DialectName


@dataclass(frozen=True)
class Linear:
    """A linear layer of a graph: a name for its tensors, its weight and its bias (float32 [N] or None)."""

    name: str
    weight: LinearWeight
    bias: Tensor | None = None


class Dialect(Protocol):
    """One operator set. Methods append nodes to ``graph`` and return tensor names; rows are [M, C].

    Floating-point tensors are in the graph's activation type.
    """

    name: DialectName

    def linear(self, graph: GraphBuilder, x: str, linear: Linear) -> str:
        """[M, K] -> [M, N]."""

    def rms_norm(self, graph: GraphBuilder, x: str, width: int, eps: float) -> str:
        """RMSNorm without a gain: [M, C] -> [M, C]."""

    def add_rms_norm(self, graph: GraphBuilder, residual: str, x: str, width: int, eps: float) -> tuple[str, str]:
        """residual + x, and its RMSNorm without a gain: -> (normalised, sum), both [M, C]."""

    def silu(self, graph: GraphBuilder, x: str) -> str:
        """x · sigmoid(x)."""

    def activation(self, graph: GraphBuilder, x: str, name: str) -> str:
        """quick_gelu or gelu."""

    def declare_cache(self, graph: GraphBuilder, config: DecoderConfig) -> None:
        """Declare the inputs that attention and K/V cache of a decoder need beside its rows."""

    def declare_present(self, graph: GraphBuilder, config: DecoderConfig) -> None:
        """Declare the outputs of the K/V cache."""

    def causal_attention(
        self, graph: GraphBuilder, qkv: tuple[str, str, str], layer: int, config: DecoderConfig
    ) -> str:
        """Rows q, k and v of this layer -> rows, rotary inside; writes the layer's part of the K/V cache."""

    def full_attention(self, graph: GraphBuilder, qkv: tuple[str, str, str], heads: int, width: int) -> str:
        """q [N, Q, C], k and v [N, S, C] with C = width -> [N, Q, C], no mask."""
