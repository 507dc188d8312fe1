"""A weight format and a dialect that this file adds from outside the package; it changes nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from owl2 import ConfigError, Owl2
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.dialect import DIALECTS, Dialect
from owl2.export.graph.onnx_dialect import OnnxDialect
from owl2.export.graph.weights import Linear, LinearWeight, add_bias
from owl2.export.pipeline import export_bundle
from owl2.quant.layer import LINEARS
from owl2.quant.models.mplug_owl2 import DecoderLayer, Owl2Model
from owl2.runtime.backends.ort.engine import open_decoder
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import IMAGE_TOKEN


@dataclass(frozen=True)
class TernaryWeight:
    """-1, 0 or 1 times one scale per output: codes int8 [N, K], scales float32 [N]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> TernaryWeight:
        scales = weight.abs().mean(dim=1)
        return cls((weight / scales[:, None]).round().clamp(-1, 1).to(torch.int8), scales)

    @property
    def rows(self) -> int:
        return len(self.codes)

    def dequantize(self) -> Tensor:
        return self.codes * self.scales[:, None]

    def part(self, rows: slice) -> TernaryWeight:
        return TernaryWeight(self.codes[rows], self.scales[rows])

    def multiply(self, ops: Dialect, x: str, name: str, bias: Tensor | None) -> str:
        graph = ops.graph
        codes = graph.constant(name + ".codes", np.ascontiguousarray(self.codes.numpy().T))
        product = graph.op("MatMul", x, graph.op("Cast", codes, to=graph.element))
        return add_bias(
            graph, graph.op("Mul", product, graph.floats(name + ".scales", self.scales.numpy())), name, bias
        )


def make_ternary(layer: DecoderLayer, name: str) -> dict[str, Linear]:
    """Give the layer ternary weights; its linear layers as a decoder graph takes them."""
    linears = {}
    for linear in LINEARS:
        parameter = layer.get_parameter(f"{linear}.weight")
        weight: LinearWeight = TernaryWeight.quantize(parameter)
        parameter.copy_(weight.dequantize())
        linears[linear] = Linear(f"{name}.{linear}", weight)
    return linears


def gains_of(layer: DecoderLayer) -> dict[str, tuple[Tensor, Tensor]]:
    def gain(norm: str, branch: int) -> Tensor:
        return layer.get_parameter(f"{norm}.multiway.{branch}.weight").detach()

    return {norm: (gain(norm, 0), gain(norm, 1)) for norm in ("input_layernorm", "post_attention_layernorm")}


@pytest.mark.parametrize("dialect", ["ort", "onnx"])
def test_a_weight_format_is_one_class(
    request: pytest.FixtureRequest, golden: Path, tmp_path: Path, dialect: str
) -> None:
    bundle = Bundle.open(request.getfixturevalue({"ort": "bundle_a1", "onnx": "bundle_a1_onnx"}[dialect]))
    with Checkpoint(golden / "a1_base_bin" / "model") as checkpoint:
        model = Owl2Model(checkpoint.config).requires_grad_(False)
        checkpoint.load_into(model, "")
    head = TernaryWeight.quantize(model.lm_head.weight)
    with GraphBuilder(tmp_path / "decoder.onnx") as graph:
        writer = DecoderGraph(DIALECTS[dialect](graph), model.config.decoder)
        for index, layer in enumerate(model.model.layers):
            assert isinstance(layer, DecoderLayer)
            writer.layer(make_ternary(layer, f"layers.{index}"), gains_of(layer))
        writer.finish(model.model.norm.weight.detach(), head)
    embeds = torch.randn(1, 20, model.config.decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    modality = (torch.arange(20) % 3 == 0).long()
    hidden, _ = model.decode(embeds, modality[None])
    expected = (hidden[0] @ head.dequantize().T).numpy()
    decoder = open_decoder(tmp_path / "decoder.onnx", bundle.manifest, OrtOptions(exact=True))
    made = decoder.prefill(embeds[0].numpy(), modality.numpy(), 0, decoder.allocate(32, None), np.arange(20))
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4 * expected.std())


class ExpDialect(OnnxDialect):
    """SiLU by its formula, x / (1 + exp(-x))."""

    def silu(self, x: str) -> str:
        graph = self.graph
        one = graph.floats("one", np.ones(1))
        return graph.op("Div", x, graph.op("Add", graph.op("Exp", graph.op("Neg", x)), one))


def test_a_dialect_is_one_class_and_its_name(
    monkeypatch: pytest.MonkeyPatch, golden: Path, tmp_path: Path, bundle_a1_onnx: Path
) -> None:
    checkpoint = golden / "a1_base_bin" / "model"
    with pytest.raises(ConfigError, match=r"dialect 'exp': use one of ort, onnx$"):
        ExportConfig(checkpoint, tmp_path / "bundle", dialect="exp")
    monkeypatch.setitem(DIALECTS, "exp", ExpDialect)
    report = export_bundle(ExportConfig(checkpoint, tmp_path / "bundle", weights="fp32", dialect="exp"))
    assert [parity.exact < 1e-4 for parity in report.parity] == [True, True]
    opened = Bundle.open(tmp_path / "bundle")
    nodes = onnx.load(opened.decoder_graph(), load_external_data=False).graph.node
    assert sum(node.op_type == "Exp" for node in nodes) == opened.manifest.model.decoder.num_hidden_layers
    image = golden / "images" / "00_rgb_landscape_97x61.png"
    made, expected = (
        Owl2.load(folder).logits(f"USER: {IMAGE_TOKEN}What? ASSISTANT:", images=[image])
        for folder in (tmp_path / "bundle", bundle_a1_onnx)
    )
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4 * expected.std())
