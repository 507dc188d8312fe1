"""The dialect of ONNX Runtime: its fused contrib operators."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from owl2.export.graph import matmul_nbits
from owl2.export.graph.builder import CONTRIB, GraphBuilder
from owl2.export.graph.dialect import Linear
from owl2.export.graph.parts import biased, dense, gathered
from owl2.export.graph.weights import ChannelInt8Weight, DenseWeight, PermutedWeight
from owl2.quant.grid import QuantizedWeight
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig
from owl2.runtime.spec import DialectName

# The lowest version that has every operator used here with the attributes used here.
MINIMUM_ONNXRUNTIME = "1.22"
# int8 activations inside MatMulNBits: the fast kernel (4-6 times the float one on AVX-512 VNNI).
INT8_ACTIVATIONS = 4


class OrtDialect:
    """MatMulNBits, GroupQueryAttention, MultiHeadAttention, SkipSimplifiedLayerNormalization, QuickGelu."""

    name: DialectName = "ort"

    def linear(self, graph: GraphBuilder, x: str, linear: Linear) -> str:
        """[M, K] -> [M, N]."""
        weight = linear.weight
        if isinstance(weight, ChannelInt8Weight):
            return self._dynamic_int8(graph, x, linear.name, weight, linear)
        if isinstance(weight, PermutedWeight):
            x, weight = gathered(graph, x, weight.columns), weight.weight
        y = (
            graph.op("MatMul", x, dense(graph, linear.name, weight))
            if isinstance(weight, DenseWeight)
            else self._n_bits(graph, x, linear.name, weight)
        )
        return biased(graph, y, linear)

    def _n_bits(self, graph: GraphBuilder, x: str, name: str, weight: QuantizedWeight) -> str:
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

    def _dynamic_int8(self, graph: GraphBuilder, x: str, name: str, weight: ChannelInt8Weight, linear: Linear) -> str:
        inputs = [
            x,
            graph.constant(name + ".codes", np.ascontiguousarray(weight.codes.numpy().T)),
            graph.constant(name + ".scales", weight.scales.numpy()),
        ]
        if linear.bias is not None:
            inputs += ["", graph.constant(name + ".bias", linear.bias.numpy())]
        return graph.op("DynamicQuantizeMatMul", *inputs, domain=CONTRIB)

    def _ones(self, graph: GraphBuilder, width: int) -> str:
        return graph.floats(f"ones_{width}", np.ones(width, dtype=np.float32))

    def rms_norm(self, graph: GraphBuilder, x: str, width: int, eps: float) -> str:
        """[M, C] -> [M, C]."""
        return graph.op("SimplifiedLayerNormalization", x, self._ones(graph, width), axis=-1, epsilon=eps)

    def add_rms_norm(self, graph: GraphBuilder, residual: str, x: str, width: int, eps: float) -> tuple[str, str]:
        """-> (normalised, sum)."""
        outputs = graph.node(
            "SkipSimplifiedLayerNormalization",
            [residual, x, self._ones(graph, width)],
            outputs=[f"{x}.normed", "", "", f"{x}.sum"],
            domain=CONTRIB,
            epsilon=eps,
        )
        return outputs[0], outputs[3]

    def silu(self, graph: GraphBuilder, x: str) -> str:
        """QuickGelu with alpha 1 is SiLU, in one vectorised operator."""
        return graph.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)

    def activation(self, graph: GraphBuilder, x: str, name: str) -> str:
        """quick_gelu or gelu."""
        if name == "quick_gelu":
            return graph.op("QuickGelu", x, domain=CONTRIB, alpha=1.702)
        return graph.op("Gelu", x, approximate="none")

    def declare_cache(self, graph: GraphBuilder, config: DecoderConfig) -> None:
        """Inputs of GroupQueryAttention."""
        graph.input(spec.LENGTHS, TensorProto.INT32, ["B"])
        graph.input(spec.TOTAL_LENGTH, TensorProto.INT32, [])
        for name in (spec.ROTARY_COS, spec.ROTARY_SIN):
            graph.input(name, graph.element, ["P", spec.padded_head_dim(config) // 2])
        for layer in range(config.num_hidden_layers):
            for name in spec.past_names(layer):
                graph.input(name, graph.element, _cache_shape(config))
        _sequence(graph)  # here, so that its place does not depend on the first layer written

    def declare_present(self, graph: GraphBuilder, config: DecoderConfig) -> None:
        """Outputs of GroupQueryAttention."""
        for layer in range(config.num_hidden_layers):
            for name in spec.present_names(layer):
                graph.output(name, graph.element, _cache_shape(config))

    def causal_attention(
        self, graph: GraphBuilder, qkv: tuple[str, str, str], layer: int, config: DecoderConfig
    ) -> str:
        """GroupQueryAttention, rotary inside; past and present may be one buffer."""
        heads, present = config.num_attention_heads, spec.present_names(layer)
        outputs = graph.node(
            "GroupQueryAttention",
            [
                *(_sequence_of_heads(graph, rows, config) for rows in qkv),
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
        return _rows_of_heads(graph, outputs[0], config)

    def full_attention(self, graph: GraphBuilder, qkv: tuple[str, str, str], heads: int, width: int) -> str:
        """[N, Q, C] -> [N, Q, C]."""
        return graph.op("MultiHeadAttention", *qkv, domain=CONTRIB, num_heads=heads)


def _cache_shape(config: DecoderConfig) -> list[int | str]:
    return ["B", config.num_attention_heads, "S", spec.padded_head_dim(config)]


def _sequence(graph: GraphBuilder) -> str:
    """[B, T, -1] for any row width: attention alone sees the sequence."""
    shape = graph.shared("Shape", spec.EMBEDS, start=0, end=2)
    return graph.shared("Concat", shape, graph.indices(-1), axis=0)


def _sequence_of_heads(graph: GraphBuilder, rows: str, config: DecoderConfig) -> str:
    """[M, C] -> [B, T, H · padded D]."""
    padding = (spec.padded_head_dim(config) - config.head_dim) // 2
    if padding:
        halves = graph.op("Reshape", rows, graph.indices(-1, 2, config.head_dim // 2))
        rows = graph.op("Pad", halves, graph.indices(0, 0, 0, 0, 0, padding))
    return graph.op("Reshape", rows, _sequence(graph))


def _rows_of_heads(graph: GraphBuilder, x: str, config: DecoderConfig) -> str:
    """[B, T, H · padded D] -> [M, C]."""
    width, half = spec.padded_head_dim(config), config.head_dim // 2
    if width != config.head_dim:
        halves = graph.op("Reshape", x, graph.indices(-1, width // 2))
        x = graph.op("Slice", halves, graph.indices(0), graph.indices(half), graph.indices(1))
    return graph.op("Reshape", x, graph.indices(-1, config.hidden_size))
