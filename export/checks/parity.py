"""Comparing exported graphs with torch, as part of every export.

With float32 activations (:func:`with_float_activations`) a graph must compute what torch does on the stored weights.
What the int8 activations of the fast kernels add is bounded loosely and reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from owl2.export.graph.builder import CONTRIB
from owl2.export.job.contents import FLOAT_SUFFIX
from owl2.export.report import Parity
from owl2.runtime.engine import Floats
from owl2.runtime.errors import ParityError
from owl2.runtime.spec import FloatType

# Relative to the RMS of what torch computes. float32 graphs of the full-size shapes stay below 1e-4.
EXACT_LIMIT = 1e-3
# int8 activations: RMS of the difference over RMS. Broken graphs are near 1.4.
ACTIVATION_LIMIT = 0.25
ACTIVATIONS: dict[FloatType, tuple[str, str]] = {
    "fp32": ("int8", "use fp16 or fp32 weights for this part"),
    "fp16": ("fp16", "values may leave the range of float16 (65504); use --activations fp32"),
}
"""The type to which a graph rounds activations while it runs, and what to do if that costs too much."""


def compare(
    graph: str, *, exact: Floats, actual: Floats, quantized: Floats, original: Floats, activations: FloatType
) -> Parity:
    """Measure and judge.

    Args:
        graph: name for messages.
        exact: the graph's values with float32 activations.
        actual: the graph's values as it runs.
        quantized: torch's values on the stored weights.
        original: torch's values on the checkpoint's weights. All four arrays have one shape.
        activations: type in which the graph computes.

    Raises:
        ParityError: the graph does not compute what torch computes, with the numbers.
    """
    scale = rms(original) or 1.0
    parity = Parity(
        graph=graph,
        values=original.size,
        exact=float(np.max(np.abs(exact - quantized))) / scale,
        limit=EXACT_LIMIT,
        activations=rms(actual - exact) / scale,
        weights=rms(quantized - original) / scale,
        total=rms(actual - original) / scale,
    )
    # Written so that NaN fails.
    if not parity.exact <= EXACT_LIMIT:
        raise ParityError(
            f"{graph} does not compute what torch computes on the same weights: largest difference {parity.exact:.3g} "
            f"of the RMS, at most {EXACT_LIMIT:g} is allowed ({parity.values} values compared). Nothing was written; "
            "please report this with your config.json"
        )
    if not parity.activations <= ACTIVATION_LIMIT:
        rounded, remedy = ACTIVATIONS[activations]
        raise ParityError(
            f"{graph}: {rounded} activations change the result by {parity.activations:.3g} of its RMS, at most "
            f"{ACTIVATION_LIMIT:g} is allowed. Nothing was written; {remedy}"
        )
    return parity


def rms(values: Floats) -> float:
    """Root of the mean square, summed in float64."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@contextlib.contextmanager
def with_float_activations(path: Path) -> Iterator[Path]:
    """A graph like the one at ``path``, on the same weights, that keeps activations in float32.

    It exists next to it while the context lasts and shares its external data.
    """
    model = onnx.load(path, load_external_data=False)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            next(attribute for attribute in node.attribute if attribute.name == "accuracy_level").i = 0
        fused = node.op_type == "DynamicQuantizeMatMul" and node.domain == CONTRIB
        nodes.extend(_dequantized(node) if fused else [node])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _widen(model.graph)
    variant = path.with_suffix(FLOAT_SUFFIX)
    variant.write_bytes(model.SerializeToString())
    try:
        yield variant
    finally:
        variant.unlink(missing_ok=True)


def _widen(graph: onnx.GraphProto) -> None:
    """Let a graph with float16 activations compute in float32, on the same weights; others stay as they are."""
    values = [v for v in (*graph.input, *graph.output) if v.type.tensor_type.elem_type == TensorProto.FLOAT16]
    casts = [a for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.i == TensorProto.FLOAT16]
    if not values and not casts:
        return
    for value in values:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for attribute in casts:
        attribute.i = TensorProto.FLOAT
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in halves:
                node.input[index] = f"{name}.wide"
    for name in halves:
        graph.node.insert(0, helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT))


def _dequantized(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x · dequantized weight (+ bias) instead of an int8 product.

    Cast and Mul, since ONNX Runtime would fuse DequantizeLinear and MatMul back into an int8 product.
    """
    x, codes, scales, *rest = node.input
    bias = rest[1] if len(rest) > 1 else ""
    weight, product, output = f"{node.name}.weight", f"{node.name}.product", node.output[0]
    nodes = [
        helper.make_node("Cast", [codes], [f"{node.name}.codes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{node.name}.codes", scales], [weight]),
        helper.make_node("MatMul", [x, weight], [product if bias else output]),
    ]
    return [*nodes, helper.make_node("Add", [product, bias], [output])] if bias else nodes
