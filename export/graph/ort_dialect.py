"""The dialect of ONNX Runtime: its fused contrib operators."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import TensorProto
from torch import Tensor

from owl2.export.graph import matmul_nbits
from owl2.export.graph.builder import CONTRIB, GraphBuilder
from owl2.quant.grid import QuantizedWeight
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig
from owl2.runtime.spec import DialectName

# int8 activations inside MatMulNBits: the fast kernel (4-6 times the float one on AVX-512 VNNI).
INT8_ACTIVATIONS = 4


class OrtDialect:
    """A :class:`owl2.export.graph.dialect.Dialect` of fused operators."""

    interface: ClassVar[DialectName] = "ort"
    MINIMUM_ONNXRUNTIME: ClassVar[str] = "1.22"

    def __init__(self, graph: GraphBuilder) -> None:
        self.graph = graph

    def integer_matmul(self, x: str, name: str, weight: QuantizedWeight) -> str:
        graph = self.graph
        packed = matmul_nbits.pack(weight.codes.numpy(), weight.bits, weight.group_size)
        rows, columns = weight.codes.shape
        inputs = [
            x,
            graph.constant(name + ".codes", packed),
            graph.floats(name + ".scales", weight.scales.numpy()),
        ]
        if weight.zero_points is not None:
            zeros = matmul_nbits.pack_zero_points(weight.zero_points.numpy(), weight.bits)
            inputs.append(graph.constant(name + ".zero_points", zeros.reshape(-1)))
        return graph.op(
            "MatMulNBits",
            *inputs,
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=weight.bits,
            block_size=weight.group_size,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def dynamic_int8_matmul(self, x: str, name: str, codes: Tensor, scales: Tensor, bias: Tensor | None) -> str:
        inputs = [
            x,
            self.graph.constant(name + ".codes", np.ascontiguousarray(codes.numpy().T)),
            self.graph.constant(name + ".scales", scales.numpy()),
        ]
        if bias is not None:
            inputs += ["", self.graph.constant(name + ".bias", bias.numpy())]
        return self.graph.op("DynamicQuantizeMatMul", *inputs, domain=CONTRIB)

    def _ones(self, width: int) -> str:
        return self.graph.floats(f"ones_{width}", np.ones(width, dtype=np.float32))

    def rms_norm(self, x: str, width: int, eps: float) -> str:
        return self.graph.op("SimplifiedLayerNormalization", x, self._ones(width), axis=-1, epsilon=eps)

    def add_rms_norm(self, residual: str, x: str, width: int, eps: float) -> tuple[str, str]:
        outputs = self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [residual, x, self._ones(width)],
            outputs=[f"{x}.normed", "", "", f"{x}.sum"],
            domain=CONTRIB,
            epsilon=eps,
        )
        return outputs[0], outputs[3]

    def silu(self, x: str) -> str:
        # With alpha 1 it is SiLU, in one vectorised operator.
        return self.graph.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)

    def activation(self, x: str, name: str) -> str:
        if name == "quick_gelu":
            return self.graph.op("QuickGelu", x, domain=CONTRIB, alpha=1.702)
        return self.graph.op("Gelu", x, approximate="none")

    def declare_cache(self, config: DecoderConfig) -> None:
        graph = self.graph
        graph.input(spec.LENGTHS, TensorProto.INT32, ["B"])
        graph.input(spec.TOTAL_LENGTH, TensorProto.INT32, [])
        for name in (spec.ROTARY_COS, spec.ROTARY_SIN):
            graph.input(name, graph.element, ["P", spec.padded_head_dim(config) // 2])
        for layer in range(config.num_hidden_layers):
            for name in spec.past_names(layer):
                graph.input(name, graph.element, _cache_shape(config))
        self._sequence()  # here, so that its place does not depend on the first layer written

    def declare_present(self, config: DecoderConfig) -> None:
        for layer in range(config.num_hidden_layers):
            for name in spec.present_names(layer):
                self.graph.output(name, self.graph.element, _cache_shape(config))

    def causal_attention(self, qkv: tuple[str, str, str], layer: int, config: DecoderConfig) -> str:
        """GroupQueryAttention, rotary inside; past and present may be one buffer."""
        heads, present = config.num_attention_heads, spec.present_names(layer)
        outputs = self.graph.node(
            "GroupQueryAttention",
            [
                *(self._sequence_of_heads(rows, config) for rows in qkv),
                *spec.past_names(layer),
                spec.LENGTHS,
                spec.TOTAL_LENGTH,
                spec.ROTARY_COS,
                spec.ROTARY_SIN,
            ],
            outputs=[f"{present[0]}.attention", *present],
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=heads,
            do_rotary=1,
            scale=config.head_dim**-0.5,
        )
        return self._rows_of_heads(outputs[0], config)

    def full_attention(self, qkv: tuple[str, str, str], heads: int, width: int) -> str:
        return self.graph.op("MultiHeadAttention", *qkv, domain=CONTRIB, num_heads=heads)

    def _sequence(self) -> str:
        """[B, T, -1] for any row width: only attention sees the sequence."""
        shape = self.graph.shared("Shape", spec.EMBEDS, start=0, end=2)
        return self.graph.shared("Concat", shape, self.graph.indices(-1), axis=0)

    def _sequence_of_heads(self, rows: str, config: DecoderConfig) -> str:
        """[M, C] -> [B, T, H · padded D]."""
        graph, padding = self.graph, (spec.padded_head_dim(config) - config.head_dim) // 2
        if padding:
            halves = graph.op("Reshape", rows, graph.indices(-1, 2, config.head_dim // 2))
            rows = graph.op("Pad", halves, graph.indices(0, 0, 0, 0, 0, padding))
        return graph.op("Reshape", rows, self._sequence())

    def _rows_of_heads(self, x: str, config: DecoderConfig) -> str:
        """[B, T, H · padded D] -> [M, C]."""
        graph, width, half = self.graph, spec.padded_head_dim(config), config.head_dim // 2
        if width != config.head_dim:
            halves = graph.op("Reshape", x, graph.indices(-1, width // 2))
            x = graph.op("Slice", halves, graph.indices(0), graph.indices(half), graph.indices(1))
        return graph.op("Reshape", x, graph.indices(-1, config.hidden_size))


def _cache_shape(config: DecoderConfig) -> list[int | str]:
    return ["B", config.num_attention_heads, "S", spec.padded_head_dim(config)]
