"""The dialect of ONNX Runtime: its fused contrib operators."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from owl2.export.graph.builder import CONTRIB, GraphBuilder
from owl2.export.graph.dialect import AttentionInputs, Linear
from owl2.export.weights import ChannelInt8Weight, DenseWeight, PermutedWeight
from owl2.quant.grid import QuantizedWeight
from owl2.runtime import int4

# The lowest version that has every operator used here with the attributes used here.
MINIMUM_ONNXRUNTIME = "1.22"
# int8 activations inside MatMulNBits: the fast kernel (4-6 times the float one on AVX-512 VNNI).
INT8_ACTIVATIONS = 4


class OrtDialect:
    """MatMulNBits, GroupQueryAttention, MultiHeadAttention, SkipSimplifiedLayerNormalization, QuickGelu."""

    name = "ort"

    def linear(self, graph: GraphBuilder, x: str, linear: Linear) -> str:
        """[M, K] -> [M, N]."""
        weight = linear.weight
        if isinstance(weight, ChannelInt8Weight):
            return self._dynamic_int8(graph, x, linear.name, weight, linear)
        if isinstance(weight, PermutedWeight):
            x, weight = _gathered(graph, x, weight.columns), weight.weight
        y = (
            self._dense(graph, x, linear.name, weight)
            if isinstance(weight, DenseWeight)
            else self._n_bits(graph, x, linear.name, weight)
        )
        if linear.bias is None:
            return y
        return graph.op("Add", y, graph.constant(linear.name + ".bias", linear.bias.numpy()))

    def _dense(self, graph: GraphBuilder, x: str, name: str, weight: DenseWeight) -> str:
        matrix = np.ascontiguousarray(weight.values.numpy().T)
        if weight.dtype == "fp16":
            half = graph.constant(name + ".weight", matrix.astype(np.float16))
            return graph.op("MatMul", x, graph.op("Cast", half, to=1))
        return graph.op("MatMul", x, graph.constant(name + ".weight", matrix))

    def _n_bits(self, graph: GraphBuilder, x: str, name: str, weight: QuantizedWeight) -> str:
        packed = int4.pack(weight.codes.numpy(), weight.bits, weight.group_size)
        rows, columns = weight.codes.shape
        inputs = [
            x,
            graph.constant(name + ".codes", packed),
            graph.constant(name + ".scales", weight.scales.numpy()),
        ]
        if weight.zero_points is not None:
            zeros = int4.pack_zero_points(weight.zero_points.numpy(), weight.bits)
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
        return graph.constant(f"ones_{width}", np.ones(width, dtype=np.float32))

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
        """GroupQueryAttention, rotary inside; past and present may be one buffer."""
        q, k, v = qkv
        outputs = graph.node(
            "GroupQueryAttention",
            [q, k, v, *past, shared.lengths, shared.total_length, shared.rotary_cos, shared.rotary_sin],
            outputs=[f"{present[0]}.attention", *present],
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=heads,
            do_rotary=1,
            scale=head_dim**-0.5,
        )
        return outputs[0]

    def full_attention(self, graph: GraphBuilder, q: str, k: str, v: str, heads: int) -> str:
        """[N, Q, C] -> [N, Q, C]."""
        return graph.op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=heads)


def _gathered(graph: GraphBuilder, x: str, columns: Tensor) -> str:
    """The columns of x [M, K] in another order; linear layers that share input and order share the result."""
    order = columns.numpy()
    # Named by content: layers quantized on the same inputs have the same order.
    name = f"columns_{hashlib.sha256(order.tobytes()).hexdigest()[:16]}"
    return graph.shared("Gather", x, graph.constant(name, order), axis=1)
