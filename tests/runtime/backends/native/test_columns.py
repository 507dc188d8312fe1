"""Integers whose columns are in another order than the activations, as a GPTQ checkpoint may have them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import NEEDS_NATIVE, rehash
from onnx import numpy_helper

from owl2 import BundleCorruptError, Owl2
from owl2.export import random_bundle
from owl2.quant.grid import QuantizedWeight
from owl2.runtime.bundle import Bundle

PROMPT = "hello there"


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in which inputs of the same width have one order for q, k and v and another for the rest."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("ordered") / "bundle"
    made = random_bundle._integers
    generator = torch.Generator().manual_seed(0)
    orders = {width: torch.randperm(width, generator=generator) for width in (128, 256)}

    def with_order(rows: int, columns: int, bits: int, random: np.random.Generator) -> QuantizedWeight:
        weight = made(rows, columns, bits, random)
        return weight if bits == 8 else replace(weight, columns=orders[columns])

    patch.setattr(random_bundle, "_integers", with_order)
    random_bundle.write_shape("small", folder, lambda done, total: None)
    patch.undo()
    return folder


def test_the_order_is_found_in_the_graph(ordered: Path) -> None:
    tensors = Bundle.open(ordered).tensors("decoder.onnx")
    named = [name for name in tensors if name.endswith(".columns")]
    assert len(named) == 2 * 9
    assert len({tensors[name].name for name in named}) == 2
    assert {tensors[name].type for name in named} == {"int64"}


@NEEDS_NATIVE
def test_logits_are_those_of_onnxruntime(ordered: Path) -> None:
    ours, theirs = (Owl2.load(ordered, backend=name).logits(PROMPT) for name in ("native", "onnxruntime"))
    assert np.sqrt(((ours - theirs) ** 2).mean()) < 0.03 * theirs.std()


@NEEDS_NATIVE
def test_an_index_that_no_column_has_is_refused(ordered: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(ordered, tmp_path / "bundle"))
    model: Any = onnx.load(copy / "decoder.onnx", load_external_data=False)
    order = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("columns_"))
    values = numpy_helper.to_array(order).copy()
    values[3] = len(values)
    order.CopyFrom(numpy_helper.from_array(values, order.name))
    onnx.save(model, copy / "decoder.onnx")
    rehash(copy, "decoder.onnx")
    with pytest.raises(BundleCorruptError, match=r"columns has the index (128|256)"):
        Owl2.load(copy, backend="native")
