"""Rows that calibrate a layer."""

from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from owl2.export import decoder
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.quant.config import QuantConfig
from owl2.quant.layer import QuantizedLinear, quantize_layer
from owl2.quant.models.mplug_owl2 import DecoderLayer
from owl2.quant.stream import Calibration, Stream


@pytest.mark.slow
def test_calibration_passes_through_the_quantized_layers(
    a1: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 is calibrated with the outputs of the stored layer 0, not with those of the original one."""
    seen: list[Stream] = []
    exact: list[Stream] = []
    layers: list[DecoderLayer] = []

    def watched(
        layer: DecoderLayer,
        unchanged: DecoderLayer,
        calibration: Calibration,
        config: QuantConfig,
        name: str,
        kept: Collection[str],
    ) -> dict[str, QuantizedLinear]:
        seen.append(calibration.quantized.copy())
        exact.append(calibration.original.copy())
        layers.append(layer)
        return quantize_layer(layer, unchanged, calibration, config, name, kept)

    monkeypatch.setattr(decoder, "quantize_layer", watched)
    export_bundle(ExportConfig(a1, tmp_path / "bundle", calibration=photos, group_size=32))
    with Checkpoint(a1) as checkpoint:
        before = DecoderLayer(checkpoint.config.decoder)
        checkpoint.load_into(before, "model.layers.0.")
    rows = [sequence.rows for sequence in seen[1].sequences]
    for given, stored, unquantized, other in zip(
        rows, seen[0].outputs(layers[0]), seen[0].outputs(before), exact[1].sequences
    ):
        torch.testing.assert_close(given, stored)
        torch.testing.assert_close(other.rows, unquantized)
        assert float((given - unquantized).abs().max()) > 1e-3
