"""The decoder graph: one graph for text decode, image prefill and mixed prefill.

Text rows and image rows are gathered by index, each for its own key/value projections, and put back in order. While
decoding there are no image rows, so the image branch's weights are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto
from torch import Tensor

from owl2.export.graph.builder import BuilderState
from owl2.export.graph.dialect import Dialect
from owl2.export.graph.weights import Linear, LinearWeight
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig


@dataclass(frozen=True)
class DecoderState:
    """A decoder graph between two layers.

    Attributes:
        residual: tensor that holds the residual stream.
        pending: tensor not yet added to it; empty before the first layer.
        layers: number of layers written.
    """

    builder: BuilderState
    residual: str
    pending: str
    layers: int


class DecoderGraph:
    """Writes the decoder layer by layer; call :meth:`layer` for each, then :meth:`finish`."""

    def __init__(self, ops: Dialect, config: DecoderConfig) -> None:
        self.ops, self.graph, self.config = ops, ops.graph, config
        graph = self.graph
        graph.input(spec.EMBEDS, graph.element, ["B", "T", config.hidden_size])
        graph.input(spec.MODALITY, TensorProto.INT64, ["M"])
        graph.input(spec.TEXT_ROWS, TensorProto.INT64, ["text"])
        graph.input(spec.IMAGE_ROW_INDEX, TensorProto.INT64, ["image"])
        graph.input(spec.ROW_ORDER, TensorProto.INT64, ["M"])
        graph.input(spec.LOGIT_ROWS, TensorProto.INT64, ["R"])
        ops.declare_cache(config)
        self._residual = graph.op("Reshape", spec.EMBEDS, graph.indices(-1, config.hidden_size))
        self._pending = ""
        self._index = 0

    def state(self) -> DecoderState:
        """The graph so far; its weights are on the disk when this returns."""
        return DecoderState(self.graph.state(), self._residual, self._pending, self._index)

    def restore(self, state: DecoderState) -> None:
        """Continue from ``state``; the builder was opened to be resumed."""
        self.graph.restore(state.builder)
        self._residual, self._pending, self._index = state.residual, state.pending, state.layers

    def layer(self, linears: Mapping[str, Linear], gains: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Append one layer.

        Args:
            linears: one per name of :data:`owl2.quant.layer.LINEARS`.
            gains: text and image gain, float32 [C] each, of ``input_layernorm`` and ``post_attention_layernorm``.
        """
        ops = self.ops
        rows = self._norm(gains["input_layernorm"], "input_layernorm")
        self._pending = linears["self_attn.o_proj"].apply(ops, self._attention(rows, linears))
        rows = self._norm(gains["post_attention_layernorm"], "post_attention_layernorm")
        gate = ops.silu(linears["mlp.gate_proj"].apply(ops, rows))
        up = linears["mlp.up_proj"].apply(ops, rows)
        self._pending = linears["mlp.down_proj"].apply(ops, self.graph.op("Mul", gate, up))
        self._index += 1

    def _norm(self, gains: tuple[Tensor, Tensor], name: str) -> str:
        """Add the last block's result to the residual stream, normalise it, and apply the gain of each row."""
        table = np.stack([gain.numpy() for gain in gains])
        constant = self.graph.floats(f"layers.{self._index}.{name}.gains", table)
        width, eps = self.config.hidden_size, self.config.rms_norm_eps
        if self._pending:
            normed, self._residual = self.ops.add_rms_norm(self._residual, self._pending, width, eps)
        else:
            normed = self.ops.rms_norm(self._residual, width, eps)
        return self.graph.op("Mul", normed, self.graph.op("Gather", constant, spec.MODALITY))

    def _attention(self, rows: str, linears: Mapping[str, Linear]) -> str:
        graph, ops = self.graph, self.ops
        text = graph.op("Gather", rows, spec.TEXT_ROWS)
        image = graph.op("Gather", rows, spec.IMAGE_ROW_INDEX)

        def routed(name: str) -> str:
            branches = [
                linears[f"self_attn.{name}.multiway.{index}"].apply(ops, branch)
                for index, branch in enumerate((text, image))
            ]
            joined = graph.node("Concat", branches, axis=0)[0]
            return graph.op("Gather", joined, spec.ROW_ORDER)

        q = linears["self_attn.q_proj"].apply(ops, rows)
        return ops.causal_attention((q, routed("k_proj"), routed("v_proj")), self._index, self.config)

    def finish(self, norm: Tensor, head: LinearWeight) -> None:
        """Append the final norm (float32 [C]) and the head on the requested rows; write the graph file."""
        graph, ops, config = self.graph, self.ops, self.config
        total = graph.op("Add", self._residual, self._pending)
        requested = graph.op("Gather", total, spec.LOGIT_ROWS)
        normed = ops.rms_norm(requested, config.hidden_size, config.rms_norm_eps)
        scaled = graph.op("Mul", normed, graph.floats("norm.weight", norm.numpy()))
        logits = Linear("lm_head", head).apply(ops, scaled)
        graph.node("Identity", [graph.cast(logits, TensorProto.FLOAT)], outputs=[spec.LOGITS])
        graph.output(spec.LOGITS, TensorProto.FLOAT, ["R", config.vocab_size])
        ops.declare_present(config)
        graph.save()
