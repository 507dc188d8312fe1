"""The dialect of TensorRT: only operators of the ONNX standard, as of opset 21.

TensorRT's limits decide the forms here: int4 weights are an INT4 initializer followed by a blocked DequantizeLinear,
symmetric, with positive scales in the activation type; masks are explicit; norms are spelled out, in float32, since
sums of squares leave the range of float16. No operator is newer than the TensorRT 10.3 of JetPack 6.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from onnx import TensorProto
from torch import Tensor

from owl2.export.graph.builder import GraphBuilder
from owl2.quant.grid import QuantizedWeight
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig
from owl2.runtime.errors import ExportError
from owl2.runtime.spec import DialectName


class OnnxDialect:
    """A :class:`owl2.export.graph.dialect.Dialect` of DequantizeLinear, MatMul and primitive operators."""

    interface: ClassVar[DialectName] = "onnx"
    # For the DequantizeLinear for blocks of INT4.
    MINIMUM_ONNXRUNTIME: ClassVar[str] = "1.22"

    def __init__(self, graph: GraphBuilder) -> None:
        self.graph = graph

    def integer_matmul(self, x: str, name: str, weight: QuantizedWeight) -> str:
        graph, positive, columns = self.graph, bool((weight.scales > 0).all()), weight.codes.shape[1]
        if weight.bits != 4 or weight.zero_points is not None or not positive:
            raise ExportError(
                f"{name}: TensorRT takes 4-bit integers without zero points and with positive scales; this weight has "
                f"{weight.bits} bits{', zero points' if weight.zero_points is not None else ''}"
                f"{'' if positive else ', scales that are not positive'}; use the dialect ort for it, or convert the "
                "original checkpoint"
            )
        if columns % weight.group_size:
            raise ExportError(
                f"{name} has {columns} columns, which is not a multiple of its groups of {weight.group_size}, as "
                "TensorRT needs it; choose another --group-size, or the dialect ort"
            )
        codes = graph.int4(name + ".codes", np.ascontiguousarray(weight.codes.numpy().T))
        scales = graph.floats(name + ".scales", np.ascontiguousarray(weight.scales.numpy().T))
        matrix = graph.op("DequantizeLinear", codes, scales, axis=0, block_size=weight.group_size)
        return graph.op("MatMul", x, matrix)

    def dynamic_int8_matmul(self, x: str, name: str, codes: Tensor, scales: Tensor, bias: Tensor | None) -> str:
        raise ExportError(f"{name}: the dialect onnx has no products of int8 activations; use fp16")

    def rms_norm(self, x: str, width: int, eps: float) -> str:
        graph = self.graph
        wide = graph.cast(x, TensorProto.FLOAT)
        mean = graph.op("ReduceMean", graph.op("Mul", wide, wide), graph.indices(-1), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(f"eps_{eps}", np.array(eps, dtype=np.float32))))
        return graph.from_float32(graph.op("Div", wide, root))

    def add_rms_norm(self, residual: str, x: str, width: int, eps: float) -> tuple[str, str]:
        total = self.graph.op("Add", residual, x)
        return self.rms_norm(total, width, eps), total

    def silu(self, x: str) -> str:
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def activation(self, x: str, name: str) -> str:
        graph = self.graph
        if name == "quick_gelu":
            return graph.op("Mul", x, graph.op("Sigmoid", graph.op("Mul", x, self._scalar(1.702))))
        erf = graph.op("Erf", graph.op("Mul", x, self._scalar(math.sqrt(0.5))))
        return graph.op("Mul", graph.op("Mul", x, self._scalar(0.5)), graph.op("Add", erf, self._scalar(1.0)))

    def declare_cache(self, config: DecoderConfig) -> None:
        graph = self.graph
        graph.input(spec.ATTENTION_MASK, graph.element, ["T", "S_T"])
        for name in (spec.ROTARY_COS, spec.ROTARY_SIN):
            graph.input(name, graph.element, ["T", config.head_dim // 2])
            graph.shared("Unsqueeze", name, graph.indices(1))
        for layer in range(config.num_hidden_layers):
            for name in spec.past_names(layer):
                graph.input(name, graph.element, ["S", spec.kv_row_width(config)])
        # These here, so that their place does not depend on the first layer written.
        self._cached()
        self._scalar(config.head_dim**-0.5)

    def declare_present(self, config: DecoderConfig) -> None:
        for layer in range(config.num_hidden_layers):
            for name in spec.present_names(layer):
                self.graph.output(name, self.graph.element, ["T", spec.kv_row_width(config)])

    def causal_attention(self, qkv: tuple[str, str, str], layer: int, config: DecoderConfig) -> str:
        """Scores of cached and new positions, joined before the softmax, so that the cached rows are never copied."""
        graph, heads, dim = self.graph, config.num_attention_heads, config.head_dim
        q, k, v = (graph.op("Reshape", rows, graph.indices(-1, heads, dim)) for rows in qkv)
        q, k = self._rotated(q, dim), self._rotated(k, dim)
        for new, name in zip((k, v), spec.present_names(layer)):
            self._write_rows(new, name, config)
        past = [self._read_rows(name, config) for name in spec.past_names(layer)]
        q = graph.op("Transpose", graph.op("Mul", q, self._scalar(dim**-0.5)), perm=[1, 0, 2])
        parts = [graph.op("MatMul", q, graph.op("Transpose", keys, perm=[1, 2, 0])) for keys in (past[0], k)]
        scores = graph.op("Add", graph.node("Concat", parts, axis=-1)[0], spec.ATTENTION_MASK)
        shares = graph.op("Softmax", scores, axis=-1)
        cached, end, last = self._cached(), graph.indices(np.iinfo(np.int64).max), graph.indices(-1)
        spans = ((graph.indices(0), cached), (cached, end))
        weighted = [
            graph.op("MatMul", graph.op("Slice", shares, *span, last), graph.op("Transpose", values, perm=[1, 0, 2]))
            for span, values in zip(spans, (past[1], v))
        ]
        joined = graph.op("Transpose", graph.op("Add", *weighted), perm=[1, 0, 2])
        return graph.op("Reshape", joined, graph.indices(-1, config.hidden_size))

    def full_attention(self, qkv: tuple[str, str, str], heads: int, width: int) -> str:
        graph, (q, k, v), dim = self.graph, qkv, width // heads

        def by_head(x: str, perm: list[int]) -> str:
            return graph.op("Transpose", graph.op("Reshape", x, graph.indices(0, -1, heads, dim)), perm=perm)

        scaled = graph.op("Mul", q, self._scalar(dim**-0.5))
        scores = graph.op("MatMul", by_head(scaled, [0, 2, 1, 3]), by_head(k, [0, 2, 3, 1]))
        mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), by_head(v, [0, 2, 1, 3]))
        joined = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.op("Reshape", joined, graph.indices(0, -1, width))

    def _scalar(self, value: float) -> str:
        """A number in the activation type, stored in float32 so that a check can compute in that."""
        graph = self.graph
        stored = graph.constant(f"scalar_{value}", np.array(value, dtype=np.float32))
        return stored if graph.activations == "fp32" else graph.shared("Cast", stored, to=graph.element)

    def _cached(self) -> str:
        """S as int64 [1]."""
        return self.graph.shared("Shape", spec.past_names(0)[0], start=0, end=1)

    def _rotated(self, x: str, dim: int) -> str:
        """Rotary embedding of [T, H, D], whose halves rotate against each other."""
        graph = self.graph
        cos, sin = (graph.shared("Unsqueeze", name, graph.indices(1)) for name in (spec.ROTARY_COS, spec.ROTARY_SIN))
        first, second = graph.node("Split", [x, graph.indices(dim // 2, dim // 2)], outputs=2, axis=-1)
        halves = [
            graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin)),
            graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin)),
        ]
        return graph.node("Concat", halves, axis=-1)[0]

    def _write_rows(self, new: str, name: str, config: DecoderConfig) -> None:
        """New keys or values [T, H, D] -> output rows [T, W]."""
        graph, padding = self.graph, spec.kv_row_width(config) - config.hidden_size
        if padding:
            rows = graph.op("Reshape", new, graph.indices(-1, config.hidden_size))
            graph.node("Pad", [rows, graph.indices(0, 0, 0, padding)], outputs=[name])
        else:
            graph.node("Reshape", [new, graph.indices(-1, config.hidden_size)], outputs=[name])

    def _read_rows(self, name: str, config: DecoderConfig) -> str:
        """Cached rows [S, W] -> [S, H, D]."""
        graph, rows = self.graph, name
        if spec.kv_row_width(config) != config.hidden_size:
            rows = graph.op("Slice", rows, graph.indices(0), graph.indices(config.hidden_size), graph.indices(1))
        return graph.op("Reshape", rows, graph.indices(-1, config.num_attention_heads, config.head_dim))
