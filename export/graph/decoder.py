"""The decoder graph: one graph for text decode, image prefill and mixed prefill.

Rows are routed, not computed twice: text rows and image rows are gathered by index, each goes through its own
key/value projections, and the result is put back in order. While decoding there are no image rows, so the image
branch's weights are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto
from torch import Tensor

from owl2.export.graph.builder import BuilderState, GraphBuilder
from owl2.export.graph.dialect import AttentionInputs, Dialect, Linear
from owl2.export.weights import LinearWeight
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig


@dataclass(frozen=True)
class DecoderState:
    """Where the next layer of a decoder graph goes on.

    Attributes:
        builder: the nodes so far.
        residual: tensor that holds the residual stream.
        pending: tensor not yet added to it; empty before the first layer.
        layers: how many are written.
    """

    builder: BuilderState
    residual: str
    pending: str
    layers: int


class DecoderGraph:
    """Writes the decoder layer by layer; call :meth:`layer` for each, then :meth:`finish`."""

    def __init__(self, graph: GraphBuilder, dialect: Dialect, config: DecoderConfig) -> None:
        self.graph, self.dialect, self.config = graph, dialect, config
        self.head_dim = spec.padded_head_dim(config)
        self._declare_inputs()
        flat = graph.op("Reshape", spec.EMBEDS, graph.indices(-1, config.hidden_size))
        self._residual, self._pending = flat, ""
        self._index = 0

    def _declare_inputs(self) -> None:
        graph, config = self.graph, self.config
        graph.input(spec.EMBEDS, TensorProto.FLOAT, ["B", "T", config.hidden_size])
        graph.input(spec.MODALITY, TensorProto.INT64, ["M"])
        graph.input(spec.TEXT_ROWS, TensorProto.INT64, ["text"])
        graph.input(spec.IMAGE_ROW_INDEX, TensorProto.INT64, ["image"])
        graph.input(spec.ROW_ORDER, TensorProto.INT64, ["M"])
        graph.input(spec.LOGIT_ROWS, TensorProto.INT64, ["R"])
        graph.input(spec.LENGTHS, TensorProto.INT32, ["B"])
        graph.input(spec.TOTAL_LENGTH, TensorProto.INT32, [])
        for name in (spec.ROTARY_COS, spec.ROTARY_SIN):
            graph.input(name, TensorProto.FLOAT, ["P", self.head_dim // 2])
        for layer in range(config.num_hidden_layers):
            for name in spec.past_names(layer):
                graph.input(name, TensorProto.FLOAT, self._cache_shape())
        # [B, T, ·] for any row width: attention alone sees the sequence.
        shape = graph.op("Shape", spec.EMBEDS, start=0, end=2)
        self._sequence = graph.node("Concat", [shape, graph.indices(-1)], axis=0)[0]

    def _cache_shape(self) -> list[int | str]:
        return ["B", self.config.num_attention_heads, "S", self.head_dim]

    def state(self) -> DecoderState:
        """Where the next layer goes on; the weights so far are on the disk when this returns."""
        return DecoderState(self.graph.state(), self._residual, self._pending, self._index)

    def restore(self, state: DecoderState) -> None:
        """Go on from ``state``; the builder was opened to be resumed."""
        self.graph.restore(state.builder)
        self._residual, self._pending, self._index = state.residual, state.pending, state.layers

    def layer(self, linears: Mapping[str, Linear], gains: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Append one layer.

        Args:
            linears: one per name of :data:`owl2.quant.layer.LINEARS`.
            gains: text and image gain, float32 [C] each, of ``input_layernorm`` and ``post_attention_layernorm``.
        """
        graph, dialect = self.graph, self.dialect
        rows = self._norm(gains["input_layernorm"], "input_layernorm")
        attention = self._attention(rows, linears)
        self._pending = dialect.linear(graph, attention, linears["self_attn.o_proj"])
        rows = self._norm(gains["post_attention_layernorm"], "post_attention_layernorm")
        gate = dialect.silu(graph, dialect.linear(graph, rows, linears["mlp.gate_proj"]))
        up = dialect.linear(graph, rows, linears["mlp.up_proj"])
        self._pending = dialect.linear(graph, graph.op("Mul", gate, up), linears["mlp.down_proj"])
        self._index += 1

    def _normalised(self) -> str:
        """Add what the last block produced to the residual stream and normalise it."""
        width, eps = self.config.hidden_size, self.config.rms_norm_eps
        if not self._pending:
            return self.dialect.rms_norm(self.graph, self._residual, width, eps)
        normed, self._residual = self.dialect.add_rms_norm(self.graph, self._residual, self._pending, width, eps)
        return normed

    def _norm(self, gains: tuple[Tensor, Tensor], name: str) -> str:
        table = np.stack([gain.numpy() for gain in gains])
        constant = self.graph.constant(f"layers.{self._index}.{name}.gains", table)
        return self.graph.op("Mul", self._normalised(), self.graph.op("Gather", constant, spec.MODALITY))

    def _attention(self, rows: str, linears: Mapping[str, Linear]) -> str:
        graph, config = self.graph, self.config
        text = graph.op("Gather", rows, spec.TEXT_ROWS)
        image = graph.op("Gather", rows, spec.IMAGE_ROW_INDEX)

        def routed(name: str) -> str:
            branches = [
                self.dialect.linear(graph, branch, linears[f"self_attn.{name}.multiway.{index}"])
                for index, branch in enumerate((text, image))
            ]
            joined = graph.node("Concat", branches, axis=0)[0]
            return graph.op("Gather", joined, spec.ROW_ORDER)

        q = self.dialect.linear(graph, rows, linears["self_attn.q_proj"])
        q, k, v = (self._sequence_of_heads(x) for x in (q, routed("k_proj"), routed("v_proj")))
        attention = self.dialect.causal_attention(
            graph,
            (q, k, v),
            spec.past_names(self._index),
            spec.present_names(self._index),
            config.num_attention_heads,
            config.head_dim,
            AttentionInputs(spec.LENGTHS, spec.TOTAL_LENGTH, spec.ROTARY_COS, spec.ROTARY_SIN),
        )
        return self._rows_of_heads(attention)

    def _sequence_of_heads(self, rows: str) -> str:
        """[M, C] -> [B, T, H · padded D]."""
        padding = (self.head_dim - self.config.head_dim) // 2
        if padding:
            halves = self.graph.op("Reshape", rows, self.graph.indices(-1, 2, self.config.head_dim // 2))
            rows = self.graph.op("Pad", halves, self.graph.indices(0, 0, 0, 0, 0, padding))
        return self.graph.op("Reshape", rows, self._sequence)

    def _rows_of_heads(self, x: str) -> str:
        """[B, T, H · padded D] -> [M, C]."""
        graph, half = self.graph, self.config.head_dim // 2
        if self.head_dim != self.config.head_dim:
            halves = graph.op("Reshape", x, graph.indices(-1, self.head_dim // 2))
            x = graph.op("Slice", halves, graph.indices(0), graph.indices(half), graph.indices(1))
        return graph.op("Reshape", x, graph.indices(-1, self.config.hidden_size))

    def finish(self, norm: Tensor, head: LinearWeight) -> None:
        """Append final norm (float32 [C]) and head, whose rows are those asked for; write the graph file."""
        graph, config = self.graph, self.config
        total = graph.op("Add", self._residual, self._pending)
        wanted = graph.op("Gather", total, spec.LOGIT_ROWS)
        normed = self.dialect.rms_norm(graph, wanted, config.hidden_size, config.rms_norm_eps)
        scaled = graph.op("Mul", normed, graph.constant("norm.weight", norm.numpy()))
        logits = self.dialect.linear(graph, scaled, Linear("lm_head", head))
        graph.node("Identity", [logits], outputs=[spec.LOGITS])
        graph.output(spec.LOGITS, TensorProto.FLOAT, ["R", config.vocab_size])
        for layer in range(config.num_hidden_layers):
            for name in spec.present_names(layer):
                graph.output(name, TensorProto.FLOAT, self._cache_shape())
        graph.save()
