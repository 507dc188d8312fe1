"""A bundle to build engines for."""

from pathlib import Path

import pytest

from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Path:
    """The sample model for TensorRT: int4 decoder, fp16 elsewhere."""
    target = tmp_path_factory.mktemp("engines") / "bundle"
    export_bundle(ExportConfig(sample_checkpoint, target, method="rtn", dialect="onnx", samples=4))
    return target
