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
from owl2.export.graph.dialect import Dialect, Linear
from owl2.export.graph.weights import LinearWeight
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
        self._declare_inputs()
        flat = graph.op("Reshape", spec.EMBEDS, graph.indices(-1, config.hidden_size))
        self._residual, self._pending = flat, ""
        self._index = 0

    def _declare_inputs(self) -> None:
        graph, config = self.graph, self.config
        graph.input(spec.EMBEDS, graph.element, ["B", "T", config.hidden_size])
        graph.input(spec.MODALITY, TensorProto.INT64, ["M"])
        graph.input(spec.TEXT_ROWS, TensorProto.INT64, ["text"])
        graph.input(spec.IMAGE_ROW_INDEX, TensorProto.INT64, ["image"])
        graph.input(spec.ROW_ORDER, TensorProto.INT64, ["M"])
        graph.input(spec.LOGIT_ROWS, TensorProto.INT64, ["R"])
        self.dialect.declare_cache(graph, config)

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
        constant = self.graph.floats(f"layers.{self._index}.{name}.gains", table)
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
        return self.dialect.causal_attention(graph, (q, routed("k_proj"), routed("v_proj")), self._index, config)

    def finish(self, norm: Tensor, head: LinearWeight) -> None:
        """Append final norm (float32 [C]) and head, whose rows are those asked for; write the graph file."""
        graph, config = self.graph, self.config
        total = graph.op("Add", self._residual, self._pending)
        wanted = graph.op("Gather", total, spec.LOGIT_ROWS)
        normed = self.dialect.rms_norm(graph, wanted, config.hidden_size, config.rms_norm_eps)
        scaled = graph.op("Mul", normed, graph.floats("norm.weight", norm.numpy()))
        logits = self.dialect.linear(graph, scaled, Linear("lm_head", head))
        graph.node("Identity", [graph.cast(logits, TensorProto.FLOAT)], outputs=[spec.LOGITS])
        graph.output(spec.LOGITS, TensorProto.FLOAT, ["R", config.vocab_size])
        self.dialect.declare_present(graph, config)
        graph.save()
