"""The int8 K/V cache in an export: faults are found, and its cost is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from owl2 import ConfigError, Owl2
from owl2.export import pipeline
from owl2.export.checks import kv_int8
from owl2.export.config import ExportConfig
from owl2.export.graph import kv_int8 as graph
from owl2.export.pipeline import export_bundle
from owl2.quant.kv import KvRange, KvScales
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import DecoderConfig
from owl2.runtime.errors import ParityError


@pytest.mark.slow
class TestExport:
    def planted(self, golden: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(ParityError, match=rf"decoder\.kv_int8\.onnx {message}"):
            export_bundle(ExportConfig(golden / "a1_base_bin" / "model", tmp_path / "bundle", weights="fp32"))
        assert list(tmp_path.iterdir()) == []

    def test_heads_exchanged(self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = graph.padded_scales
        monkeypatch.setattr(graph, "padded_scales", lambda steps, config: original(steps, config)[:, ::-1].copy())
        self.planted(golden, tmp_path, r"does not round keys as torch does: \d+\.\d% of the codes in the first layer")

    def test_values_a_little_off(self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

        def write(source: Path, target: Path, config: DecoderConfig, scales: list[KvScales]) -> None:
            graph.write_int8_kv_graph(
                source, target, config, [KvScales(entry.keys, entry.values * 1.05) for entry in scales]
            )

        monkeypatch.setattr(pipeline, "write_int8_kv_graph", write)
        self.planted(golden, tmp_path, "does not round values as torch does")

    def test_far_too_wide_steps_in_later_layers(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        def write(source: Path, target: Path, config: DecoderConfig, scales: list[KvScales]) -> None:
            wide = [KvScales(entry.keys * 8, entry.values * 8) for entry in scales[1:]]
            graph.write_int8_kv_graph(source, target, config, [scales[0], *wide])

        monkeypatch.setattr(pipeline, "write_int8_kv_graph", write)
        self.planted(golden, tmp_path, "does not compute what torch computes with keys and values rounded")

    def test_nothing_is_written_that_cannot_be_checked(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kv_int8, "MINIMUM_ONNXRUNTIME", "99.1")
        report = export_bundle(ExportConfig(golden / "a1_base_bin" / "model", tmp_path / "bundle", weights="fp32"))
        assert report.kv_int8 is None
        assert Bundle.open(tmp_path / "bundle").manifest.kv_cache == {"fp32": "1.22"}
        assert not (tmp_path / "bundle" / "decoder.kv_int8.onnx").exists()
        with pytest.raises(ConfigError, match="offers fp32; choose"):
            Owl2.load(tmp_path / "bundle", kv_cache="int8", backend="onnxruntime")

    def test_the_report_tells_loss_and_memory(self, sample_bundle: Path) -> None:
        report = json.loads((sample_bundle / "report.json").read_text())
        loss, accuracy = report["kv_int8"], report["accuracy"]
        assert loss["positions"] == accuracy["positions"]
        assert loss["scales_from"] == "calibration"
        assert 0 < loss["kl_text"] < 0.1 * accuracy["kl_text"]
        assert 0 < loss["kl_image"] < accuracy["kl_image"]
        assert loss["agreement"] > 0.95
        assert loss["torch_difference"] < 0.1
        assert loss["bytes_per_position"] == 2 * 5 * 256
        assert loss["bytes_per_position_fp16"] == 2 * loss["bytes_per_position"]
        assert loss["bytes_per_position_fp32"] == 4 * loss["bytes_per_position"]

    def test_no_more_logits_are_kept_than_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept, modality = kv_int8.FloatLogits(), np.zeros(4, np.int64)
        monkeypatch.setattr(kv_int8, "MAX_KEPT_BYTES", 1000)
        for count in (10, 20, 5):  # 400, 800 and 200 bytes
            kept.offer(np.zeros((count, 3), np.float32), modality, np.zeros((count, 10), np.float32))
        assert [len(logits) for _, _, logits in kept.prompts] == [10, 5]

    def test_both_modalities_and_the_calibration_are_looked_at(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With calibration the scales come only from it, so that the held-out prompts stay unseen."""
        seen: list[int] = []
        original = KvRange.add

        def counted(self: KvRange, keys: torch.Tensor, values: torch.Tensor) -> None:
            seen.append(keys.shape[2])
            original(self, keys, values)

        monkeypatch.setattr(KvRange, "add", counted)
        for index in range(16):
            Image.new("RGB", (20, 20), (index * 15, 40, 90)).save(tmp_path / f"{index:02}.png")
        report = export_bundle(
            ExportConfig(golden / "a1_base_bin" / "model", tmp_path / "out" / "bundle", calibration=tmp_path)
        )
        calibrated = report.calibration.text_rows + report.calibration.image_rows
        assert report.calibration.image_rows > 0
        assert sum(seen[-report.calibration.samples :]) == calibrated
