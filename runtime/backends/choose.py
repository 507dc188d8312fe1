"""The only place that decides which backend runs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.engine import Engine, EngineOptions
from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.placement import BACKEND_ENTRY_POINTS, Placement
from owl2.runtime.spec import DialectName

OpenEngine = Callable[[Bundle], Engine]
"""Loads the graphs or engines of a verified bundle."""
Backend = Callable[[Path, Manifest, EngineOptions], OpenEngine]
"""Prepares a bundle (folder, manifest, options) for loading: checks that the device is available and can run it.

Nothing large is read, and the files of the bundle need not have been verified. May raise BackendUnavailableError,
BackendError, BundleError and ConfigError.
"""


def find_backend(device: Placement, dialect: DialectName) -> Backend:
    """The backend that runs graphs of a dialect on a device.

    TensorRT takes the dialect onnx, in engines built from it; ONNX Runtime takes everything else. Backends of other
    packages register the kind of device they run on as an entry point.

    Raises:
        BackendUnavailableError: a package that the backend needs is not installed or cannot be imported.
    """
    if device.kind == "tensorrt" or (device.kind == "tensorrt-rtx" and dialect == "onnx"):
        from owl2.runtime.backends.tensorrt.engine import prepare

        return prepare
    if device.kind in ("cpu", "cuda", "tensorrt-rtx"):
        from owl2.runtime.backends.ort.installation import needs_onnxruntime

        with needs_onnxruntime():
            from owl2.runtime.backends.ort.engine import prepare as prepare_ort
        return prepare_ort
    found = list(entry_points(group=BACKEND_ENTRY_POINTS, name=device.kind))
    if not found:
        raise BackendUnavailableError(f"device {device}: no installed package has a backend for {device.kind}")
    try:
        backend: Backend = found[0].load()
    except Exception as error:  # other people's modules
        raise BackendUnavailableError(f"device {device}: {found[0].value} cannot be imported: {error}") from error
    return backend
