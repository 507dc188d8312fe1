"""Pieces of graphs that both dialects write in the same way."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from owl2.export.graph.builder import ELEMENTS, GraphBuilder
from owl2.export.graph.dialect import Linear
from owl2.export.graph.weights import DenseWeight


def dense(graph: GraphBuilder, name: str, weight: DenseWeight) -> str:
    """A plain matrix [K, N] in the activation type, perhaps from a narrower one in the file."""
    matrix = np.ascontiguousarray(weight.values.numpy().T)
    if weight.dtype == graph.activations:
        return graph.floats(name + ".weight", matrix)
    stored = matrix.astype(np.float16 if weight.dtype == "fp16" else np.float32)
    return graph.op("Cast", graph.constant(name + ".weight", stored), to=ELEMENTS[graph.activations])


def biased(graph: GraphBuilder, y: str, linear: Linear) -> str:
    """y, plus the layer's bias if it has one."""
    if linear.bias is None:
        return y
    return graph.op("Add", y, graph.floats(linear.name + ".bias", linear.bias.numpy()))


def gathered(graph: GraphBuilder, x: str, columns: Tensor) -> str:
    """The columns of x [M, K] in another order; linear layers that share input and order share the result."""
    order = columns.numpy()
    # Named by content: layers quantized on the same inputs have the same order.
    name = f"columns_{hashlib.sha256(order.tobytes()).hexdigest()[:16]}"
    return graph.shared("Gather", x, graph.constant(name, order), axis=1)
