"""Every form of weight: what a graph computes with it, its parts, and what a dialect refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from owl2.export.checks.parity import with_float_activations
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.dialect import DIALECTS
from owl2.export.graph.onnx_dialect import OnnxDialect
from owl2.export.graph.weights import (
    ChannelInt8Weight,
    DenseWeight,
    IntegerWeight,
    Linear,
    LinearWeight,
    dequantized_blocks,
)
from owl2.quant.config import QuantConfig
from owl2.quant.grid import QuantizedWeight, rtn
from owl2.runtime.backends.ort.session import OrtOptions, open_session
from owl2.runtime.errors import ExportError

Array = NDArray[Any]


def integers(bits: int, width: int, seed: int, columns: torch.Tensor | None = None) -> IntegerWeight:
    """Random integers [24, width] with zero points, as other programs write them."""
    generator = torch.Generator().manual_seed(seed)
    low, high, groups = -(2 ** (bits - 1)), 2 ** (bits - 1), -(-width // 32)
    return IntegerWeight(
        QuantizedWeight(
            torch.randint(low, high, (24, width), generator=generator, dtype=torch.int8),
            torch.rand(24, groups, generator=generator),
            bits,
            32,
            torch.randint(low, high, (24, groups), generator=generator, dtype=torch.int8),
            columns,
        )
    )


def random_matrix(rows: int = 24, width: int = 64) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


WEIGHTS: dict[str, LinearWeight] = {
    "fp32": DenseWeight(random_matrix(), "fp32"),
    "fp16": DenseWeight(random_matrix(), "fp16"),
    "channel int8": ChannelInt8Weight.quantize(random_matrix()),
    "int4": IntegerWeight(rtn(random_matrix(), QuantConfig(group_size=32, method="rtn"))),
    "zero points": integers(4, 64, 0),
    "order": integers(8, 64, 1, torch.randperm(64, generator=torch.Generator().manual_seed(1))),
}


def run(path: Path, dialect: str, layers: Mapping[str, Linear], x: Array) -> list[Array]:
    """The outputs of linear layers on rows x, with float activations."""
    with GraphBuilder(path) as graph:
        ops, rows = DIALECTS[dialect](graph), graph.input("x", TensorProto.FLOAT, ["M", x.shape[1]])
        for name, layer in layers.items():
            graph.node("Identity", [layer.apply(ops, rows)], outputs=[f"{name}.y"])
            graph.output(f"{name}.y", TensorProto.FLOAT, ["M", layer.weight.rows])
        graph.save()
    with with_float_activations(path) as variant:
        outputs: list[Array] = open_session(variant, OrtOptions(exact=True)).run(None, {"x": x})
    return outputs


def check(y: Array, x: Array, layer: Linear) -> None:
    expected = x.astype(np.float64) @ layer.weight.dequantize().double().numpy().T
    if layer.bias is not None:
        expected += layer.bias.numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 24)], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("dialect", "form"), [*(("ort", form) for form in WEIGHTS), *(("onnx", form) for form in ("fp32", "fp16", "int4"))]
)
def test_a_graph_multiplies_by_the_dequantized_weight(
    tmp_path: Path, dialect: str, form: str, bias: torch.Tensor | None
) -> None:
    x, layer = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32), Linear("w", WEIGHTS[form], bias)
    (y,) = run(tmp_path / "linear.onnx", dialect, {"w": layer}, x)
    check(y, x, layer)


@pytest.mark.parametrize("form", WEIGHTS)
def test_parts_are_blocks_of_outputs(form: str) -> None:
    weight = WEIGHTS[form]
    blocks = list(dequantized_blocks(weight, 10))
    assert [len(block) for block in blocks] == [10, 10, 4]
    assert torch.equal(torch.cat(blocks), weight.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 96, 80])
def test_zero_points_and_order(tmp_path: Path, bits: int, width: int) -> None:
    """Both come from other programs."""
    x = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    layers = {
        "plain": Linear("plain", integers(bits, width, 0)),
        "one": Linear("one", integers(bits, width, 0, order)),
        "two": Linear("two", integers(bits, width, 1, order.clone())),
        "three": Linear("three", integers(bits, width, 2, order.flip(0))),
    }
    for layer, y in zip(layers.values(), run(tmp_path / "linear.onnx", "ort", layers, x)):
        check(y, x, layer)
    nodes = onnx.load(tmp_path / "linear.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "Gather" for node in nodes) == 2  # one for each order


def test_columns_in_another_order() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = x[:, order] @ integers(4, 64, 3).dequantize().double().T
    torch.testing.assert_close(x @ integers(4, 64, 3, order).dequantize().double().T, expected)


def test_int4_is_packed_as_onnx_reads_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = rtn(torch.randn(6, 64, generator=generator), QuantConfig(group_size=32, method="rtn", scale_dtype="fp16"))
    with GraphBuilder(tmp_path / "w.onnx", "fp16") as graph:
        graph.input("x", TensorProto.FLOAT16, ["M", 64])
        y = Linear("w", IntegerWeight(weight)).apply(OnnxDialect(graph), "x")
        graph.node("Identity", [y], outputs=["y"])
        graph.output("y", TensorProto.FLOAT16, ["M", 6])
        graph.save()
    model = onnx.load(tmp_path / "w.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(tensors["w.codes"].astype(np.int8), weight.codes.numpy().T)
    np.testing.assert_array_equal(tensors["w.scales"].astype(np.float32), weight.scales.numpy().T)


ONES = torch.ones(4, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (IntegerWeight(QuantizedWeight(ONES, torch.ones(4, 1), 8, 32)), "8 bits"),
        (IntegerWeight(QuantizedWeight(ONES, torch.ones(4, 1), 4, 32, ONES[:, :1])), "zero points"),
        (IntegerWeight(QuantizedWeight(ONES, -torch.ones(4, 1), 4, 32)), "not positive"),
        (
            IntegerWeight(QuantizedWeight(torch.ones(4, 40, dtype=torch.int8), torch.ones(4, 2), 4, 32)),
            "40 columns, which is not a multiple",
        ),
        (ChannelInt8Weight(ONES, torch.ones(4)), "int8 activations"),
    ],
)
def test_integers_that_tensorrt_does_not_take_are_refused(tmp_path: Path, weight: LinearWeight, message: str) -> None:
    with GraphBuilder(tmp_path / "w.onnx") as graph, pytest.raises(ExportError, match=message):
        Linear("w", weight).apply(OnnxDialect(graph), "x")
