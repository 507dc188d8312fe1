"""Which backend runs a bundle, and how long a conversation that allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from owl2.runtime.backends.tensorrt import TensorRtEngine, TensorRtOptions, open_engine
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import DecoderConfig, require, resolve_context
from owl2.runtime.devices import EngineKind
from owl2.runtime.engine import Engine

if TYPE_CHECKING:
    from owl2.runtime.backends.ort import OrtOptions

ENGINE_KINDS: tuple[EngineKind, ...] = get_args(EngineKind)


def open_backend(bundle: Bundle, options: OrtOptions) -> Engine:
    """Load a bundle's graphs or engines: ``tensorrt`` and ``tensorrt-rtx``, as in ``tensorrt:1``, run engines.

    Raises:
        BackendError, BundleError, ConfigError: as the backend's engine.
    """
    name, colon, index = options.provider.partition(":")
    for kind in ENGINE_KINDS:
        if name == kind:
            require(not colon or index.isdecimal(), f"device {options.provider!r}: give a number, as in {kind}:1")
            return open_engine(bundle, TensorRtOptions(kind, int(index or 0), options.kv_cache))
    from owl2.runtime.backends.ort import OrtEngine

    return OrtEngine(bundle, options)


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
