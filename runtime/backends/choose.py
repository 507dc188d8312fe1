"""Which backend runs a bundle, and how long a conversation that allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from owl2.runtime.backends.ort.installation import needs_onnxruntime
from owl2.runtime.backends.tensorrt.context import import_tensorrt
from owl2.runtime.backends.tensorrt.cuda import open_gpu
from owl2.runtime.backends.tensorrt.engine import TensorRtEngine, TensorRtOptions
from owl2.runtime.backends.tensorrt.records import find_record
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.config import DecoderConfig, require, resolve_context
from owl2.runtime.engine import Engine
from owl2.runtime.placement import EngineKind, Placement
from owl2.runtime.spec import KvType


@dataclass(frozen=True)
class Backend:
    """What can be had on this machine.

    Attributes:
        open: loads the graphs or engines of a verified bundle.
        onnxruntime: whether that is ONNX Runtime's work.
    """

    open: Callable[[Bundle], Engine]
    onnxruntime: bool


def choose_backend(
    device: Placement,
    folder: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    kv_cache: KvType | None = None,
    context: int | None = None,
) -> Backend:
    """Check that a device can be had and can run a bundle, before anything large is read.

    Args:
        device: ``tensorrt`` runs the engines of a bundle, and so does ``tensorrt-rtx`` if it is of the dialect onnx;
            ONNX Runtime does all else.
        folder, manifest: of the bundle, whose files need not have been verified.
        threads, kv_cache, context: as in :meth:`owl2.runtime.Owl2.load`.

    Raises:
        BackendUnavailableError: the device cannot be had, says what is missing; or the engines are for another one.
        BackendError: the device cannot run graphs of this dialect.
        BundleError: there are no engines, or their record cannot be used.
        ConfigError: settings that the device or the engines do not have.
    """
    dialect = manifest.dialect
    if device.kind == "tensorrt" or (device.kind == "tensorrt-rtx" and dialect == "onnx"):
        require(
            dialect == "onnx",
            f"device {device} runs engines that are built from graphs of the dialect onnx, this bundle has the dialect "
            f"{dialect}; export the checkpoint again with --dialect onnx",
        )
        require(threads is None, f"threads {threads}: device {device} has none to set; leave them out")
        return _native(device.kind, device.index, folder, manifest, context)
    with needs_onnxruntime():
        from owl2.runtime.backends.ort.engine import OrtEngine, OrtOptions, check_dialect
        from owl2.runtime.backends.ort.session import prepare
    check_dialect(folder, dialect, device)
    options = OrtOptions(str(device), threads, kv_cache)
    prepare(device)
    return Backend(lambda bundle: OrtEngine(bundle, options), onnxruntime=True)


def _native(kind: EngineKind, index: int, folder: Path, manifest: Manifest, context: int | None) -> Backend:
    options = TensorRtOptions(kind)
    device, trt = open_gpu(index), import_tensorrt(kind)
    record = find_record(folder, manifest, kind, device.name, device.compute_capability, str(trt.__version__))
    _check_context(record.context, context)
    return Backend(lambda bundle: TensorRtEngine(bundle, options, trt, device), onnxruntime=False)


def fitting_context(engine: Engine, decoder: DecoderConfig, context: int | None) -> int:
    """Positions of a conversation: as :func:`resolve_context`, and no more than engines of TensorRT were built for.

    Raises:
        ConfigError: more were asked for, or as :func:`resolve_context`.
    """
    resolved = resolve_context(decoder, context)
    if not isinstance(engine, TensorRtEngine):
        return resolved
    _check_context(engine.context, context)
    return min(resolved, engine.context)


def _check_context(longest: int, context: int | None) -> None:
    require(
        context is None or context <= longest,
        f"context {context} exceeds the {longest} positions that this bundle's engines were built for; choose a "
        "smaller one or build them again with a larger --context",
    )
