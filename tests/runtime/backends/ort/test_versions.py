"""The installed ONNX Runtime is compared with what a bundle needs."""

import sys
from pathlib import Path

import pytest

from owl2.runtime.backends.ort.installation import check_onnxruntime
from owl2.runtime.errors import BackendUnavailableError


def test_an_older_onnxruntime_than_needed() -> None:
    with pytest.raises(BackendUnavailableError, match=r"needs onnxruntime 99\.1 or newer, .* upgrade it"):
        check_onnxruntime("99.1")
    check_onnxruntime("1.2")


def test_the_wheel_that_is_installed_is_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would overwrite its files."""
    with pytest.raises(BackendUnavailableError, match=r"upgrade it \(pip install -U onnxruntime\)"):
        check_onnxruntime("99.1")
    info = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    (info / "RECORD").write_text("onnxruntime/__init__.py,sha256=x,1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendUnavailableError, match=r"upgrade it \(pip install -U onnxruntime-gpu\)"):
        check_onnxruntime("99.1")
