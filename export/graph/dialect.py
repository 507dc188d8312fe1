"""What the graph builders ask of an operator set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from owl2.export.graph.builder import GraphBuilder
from owl2.export.weights import LinearWeight


@dataclass(frozen=True)
class Linear:
    """A linear layer of a graph: a name for its tensors, its weight and its bias (float32 [N] or None)."""

    name: str
    weight: LinearWeight
    bias: Tensor | None = None


@dataclass(frozen=True)
class AttentionInputs:
    """Graph tensors shared by the attention of all layers; see :mod:`owl2.runtime.spec`."""

    lengths: str
    total_length: str
    rotary_cos: str
    rotary_sin: str


class Dialect(Protocol):
    """One operator set. Methods append nodes to ``graph`` and return tensor names; rows are [M, C]."""

    name: str

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

    def causal_attention(
        self,
        graph: GraphBuilder,
        qkv: tuple[str, str, str],
        past: tuple[str, str],
        present: tuple[str, str],
        heads: int,
        head_dim: int,
        shared: AttentionInputs,
    ) -> str:
        """q, k, v [B, T, C] with rotary inside, past [B, H, S, D] -> [B, T, C]; writes ``present``."""

    def full_attention(self, graph: GraphBuilder, q: str, k: str, v: str, heads: int) -> str:
        """q [N, Q, C], k and v [N, S, C] -> [N, Q, C], no mask."""
