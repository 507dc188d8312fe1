"""Which backend runs a bundle, and how long a conversation that allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from owl2.runtime.backends.cuda_memory import open_device
from owl2.runtime.backends.installation import needs_onnxruntime
from owl2.runtime.backends.tensorrt import TensorRtEngine, TensorRtOptions
from owl2.runtime.backends.tensorrt_context import import_tensorrt
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import DecoderConfig, require, resolve_context
from owl2.runtime.devices import EngineKind
from owl2.runtime.engine import Engine
from owl2.runtime.placement import Placement
from owl2.runtime.spec import DialectName, KvType


@dataclass(frozen=True)
class Backend:
    """What can be had on this machine.

    Attributes:
        open: loads the graphs or engines of a verified bundle.
        onnxruntime: whether that is ONNX Runtime's work.
    """

    open: Callable[[Bundle], Engine]
    onnxruntime: bool


def choose_backend(place: Placement, dialect: DialectName, threads: int | None, kv_cache: KvType | None) -> Backend:
    """Check that a device can be had, before anything is loaded.

    Args:
        place: ``tensorrt`` runs the engines of a bundle, and so does ``tensorrt-rtx`` if it is of the dialect onnx;
            ONNX Runtime does all else.
        dialect: of the bundle.
        threads, kv_cache: as in :meth:`owl2.runtime.Owl2.load`.

    Raises:
        BackendUnavailableError: the device cannot be had; says what is missing.
        ConfigError: settings that it does not have.
    """
    if place.kind == "tensorrt" or (place.kind == "tensorrt-rtx" and dialect == "onnx"):
        require(
            dialect == "onnx",
            f"device {place} runs engines that are built from graphs of the dialect onnx, this bundle has the dialect "
            f"{dialect}; export the checkpoint again with --dialect onnx",
        )
        require(threads is None, f"threads {threads}: device {place} has none to set; leave them out")
        return _native(place.kind, place.index)
    with needs_onnxruntime():
        from owl2.runtime.backends.ort import OrtEngine, OrtOptions
        from owl2.runtime.backends.providers import prepare
    options = OrtOptions(str(place), threads, kv_cache)
    prepare(place)
    return Backend(lambda bundle: OrtEngine(bundle, options), onnxruntime=True)


def _native(kind: EngineKind, index: int) -> Backend:
    options = TensorRtOptions(kind)
    device, trt = open_device(index), import_tensorrt(kind)
    return Backend(lambda bundle: TensorRtEngine(bundle, options, trt, device), onnxruntime=False)


def fitting_context(engine: Engine, decoder: DecoderConfig, context: int | None) -> int:
    """Positions of a conversation: as :func:`resolve_context`, and no more than engines of TensorRT were built for.

    Raises:
        ConfigError: more were asked for, or as :func:`resolve_context`.
    """
    resolved = resolve_context(decoder, context)
    if not isinstance(engine, TensorRtEngine):
        return resolved
    longest = engine.context
    require(
        context is None or context <= longest,
        f"context {context} exceeds the {longest} positions that this bundle's engines were built for; choose a "
        "smaller one or build them again with a larger --context",
    )
    return min(resolved, longest)
