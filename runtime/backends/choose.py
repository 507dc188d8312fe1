"""Which backend runs a bundle."""

from __future__ import annotations

from owl2.runtime.backends.ort import OrtEngine, OrtOptions
from owl2.runtime.backends.tensorrt import TensorRtEngine, TensorRtOptions, open_engine
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import require
from owl2.runtime.engine import Engine
from owl2.runtime.engines import ENGINE_KINDS


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
    return OrtEngine(bundle, options)


def longest_context(engine: Engine) -> int | None:
    """Positions that an engine can take at most; None where it sets no limit."""
    return engine.context if isinstance(engine, TensorRtEngine) else None
