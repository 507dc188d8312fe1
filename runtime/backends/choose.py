"""The only place that decides which backend runs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

from owl2.runtime.backends.native.support import KV_TYPES, NOT_INSTALLED, default_kv_type, is_installed, reason_against
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.config import require
from owl2.runtime.engine import BackendName, Engine, EngineOptions
from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.foreign import shorten
from owl2.runtime.placement import BACKEND_ENTRY_POINTS, Placement
from owl2.runtime.spec import DialectName

OpenEngine = Callable[[Bundle], Engine]
"""Loads the graphs or engines of a verified bundle."""
Backend = Callable[[Path, Manifest, EngineOptions], OpenEngine]
"""Prepares a bundle (folder, manifest, options) for loading: checks that the device is available and can run it.

Nothing large is read, and the files of the bundle need not have been verified. May raise BackendUnavailableError,
BackendError, BundleError and ConfigError.
"""


def resolve_options(manifest: Manifest, options: EngineOptions) -> EngineOptions:
    """The options with the backend of the CPU and the type of the K/V cache decided.

    Raises:
        ConfigError: the bundle does not offer that type of K/V cache.
    """
    if not options.device.on_host:
        return replace(options, kv_cache=manifest.kv_type(options.kv_cache))
    backend = options.backend or ("native" if reason_against(manifest) is None else "onnxruntime")
    if backend == "onnxruntime":
        return replace(options, backend=backend, kv_cache=manifest.kv_type(options.kv_cache))
    kv_cache = options.kv_cache or default_kv_type(manifest)
    require(
        kv_cache in KV_TYPES,
        f"kv_cache {shorten(kv_cache)}: the native core offers {', '.join(KV_TYPES)}; choose one of these",
    )
    return replace(options, backend=backend, kv_cache=kv_cache)


def find_backend(device: Placement, dialect: DialectName, backend: BackendName | None = None) -> Backend:
    """The backend that runs graphs of a dialect on a device.

    TensorRT takes the dialect onnx, in engines built from it; on the CPU, the native core or ONNX Runtime run it, as
    :func:`resolve_options` decided; ONNX Runtime takes everything else. Backends of other packages register the kind
    of device they run on as an entry point.

    Raises:
        BackendUnavailableError: a package that the backend needs is not installed or cannot be imported.
    """
    if device.kind == "tensorrt" or (device.kind == "tensorrt-rtx" and dialect == "onnx"):
        from owl2.runtime.backends.tensorrt.engine import prepare

        return prepare
    if backend == "native":
        if not is_installed():
            raise BackendUnavailableError(f"{NOT_INSTALLED}; leave the backend out, or build owl2 with a C++ compiler")
        from owl2.runtime.backends.native.engine import prepare as prepare_native

        return prepare_native
    if device.kind in ("cpu", "cuda", "tensorrt-rtx"):
        from owl2.runtime.backends.ort.installation import needs_onnxruntime

        with needs_onnxruntime():
            from owl2.runtime.backends.ort.engine import prepare as prepare_ort
        return prepare_ort
    found = list(entry_points(group=BACKEND_ENTRY_POINTS, name=device.kind))
    if not found:
        raise BackendUnavailableError(f"device {device}: no installed package has a backend for {device.kind}")
    try:
        registered: Backend = found[0].load()
    except Exception as error:  # other people's modules
        raise BackendUnavailableError(f"device {device}: {found[0].value} cannot be imported: {error}") from error
    return registered
