"""Faults that an export must notice, planted."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from folders import names
from torch import Tensor

from owl2.export.config import ExportConfig
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.ort_dialect import OrtDialect
from owl2.export.graph.weights import Linear
from owl2.export.pipeline import export_bundle
from owl2.runtime.backends.ort.engine import OrtDecoder
from owl2.runtime.errors import ParityError

Gains = Mapping[str, tuple[Tensor, Tensor]]


def planted(a1: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        export_bundle(ExportConfig(a1, tmp_path / "bundle", weights="fp32"))
    assert names(tmp_path) == []


def test_a_wrong_activation(a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        OrtDialect, "silu", lambda ops, x: ops.graph.op("QuickGelu", x, domain="com.microsoft", alpha=1.01)
    )
    planted(a1, tmp_path, r"vision.onnx does not compute .* largest difference 0\.\d+ of the RMS, at most")


def test_branches_exchanged(a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DecoderGraph.layer

    def exchanged(graph: DecoderGraph, linears: Mapping[str, Linear], gains: Gains) -> None:
        original(graph, linears, {name: (image, text) for name, (text, image) in gains.items()})

    monkeypatch.setattr(DecoderGraph, "layer", exchanged)
    planted(a1, tmp_path, "decoder.onnx does not compute")


def test_a_wrong_position_in_cached_steps(a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OrtDecoder.decode
    monkeypatch.setattr(OrtDecoder, "decode", lambda self, rows, past, kv: original(self, rows, past - 1, kv))
    planted(a1, tmp_path, "decoder.onnx does not compute")
