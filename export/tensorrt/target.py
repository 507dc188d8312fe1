"""What an engine is built with and for; refused before anything long begins where that cannot be."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from owl2.runtime.errors import BackendUnavailableError, ConfigError
from owl2.runtime.fit.machine import driver_version, this_gpu
from owl2.runtime.fit.products import PRODUCTS, Product, find_product
from owl2.runtime.placement import EngineKind

MODULES: dict[EngineKind, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
BRINGS = {
    "tensorrt": "on a Jetson it comes with JetPack (use a virtual environment made with --system-site-packages), on a "
    "server with NVIDIA's packages",
    "tensorrt-rtx": "pip install 'owl2[tensorrt-rtx]'",
}


@dataclass(frozen=True)
class BuildTarget:
    """What to build with and for.

    Attributes:
        kind: of engine.
        module: that builds it.
        device: the GPU to build for.
        compute: its compute capability, times ten.
        here: whether it is the GPU of this machine, so that TensorRT need not be told which.
        driver: version of this machine's driver; None where there is none.
    """

    kind: EngineKind
    module: ModuleType
    device: Product
    compute: int
    here: bool
    driver: str | None


def choose(kind: EngineKind, device: Product, dialect: str, weights: str, *, here: bool) -> BuildTarget:
    """Check that engines of a bundle can be built for ``device``, and import what builds them.

    Args:
        kind: of engine.
        device: the GPU that is to run them.
        dialect, weights: of the bundle and its decoder, as the manifest has them.
        here: whether ``device`` is the GPU of this machine.

    Raises:
        ConfigError: the device cannot run engines of this kind, or not these weights.
        BackendUnavailableError: the module is not installed or does not load.
    """
    check_dialect(dialect)
    check_device(kind, device, here=here)
    assert device.compute is not None  # has engines, so it has one
    if weights == "int4" and not device.int4_engines:
        raise ConfigError(
            f"{device.product} (SM{device.compute}) has no TensorRT engines with int4 weights: these need compute "
            "capability 8.0 (Ampere) or newer; export with --weights fp16, or run a bundle of the dialect ort there"
        )
    return BuildTarget(kind, load_module(kind), device, device.compute, here, driver_version() if here else None)


def check_dialect(dialect: str) -> None:
    """Refuse a bundle whose graphs are ONNX Runtime's.

    Raises:
        ConfigError: it is one.
    """
    if dialect != "onnx":
        raise ConfigError(
            f"engines are built from graphs of the dialect onnx, this bundle has the dialect {dialect}; export the "
            "checkpoint again with --dialect onnx"
        )


def check_device(kind: EngineKind, device: Product, *, here: bool) -> None:
    """Refuse a GPU that cannot run engines of this kind, or for which they must be built elsewhere.

    Raises:
        ConfigError: saying which kind or place is right.
    """
    if kind not in device.engines:
        instead = " or ".join(device.engines)
        raise ConfigError(
            f"{device.product} (SM{device.compute}) does not run {kind} engines; "
            + (f"it runs {instead} engines" if instead else "it runs no TensorRT engine that is built here")
        )
    if kind == "tensorrt" and not here:
        raise ConfigError(
            f"{kind} engines are built on the GPU that runs them: copy the bundle to the {device.product} and run "
            "owl2-export engine BUNDLE there"
        )


def load_module(kind: EngineKind) -> ModuleType:
    """Import TensorRT.

    Raises:
        BackendUnavailableError: it is not installed, or one of its libraries does not load.
    """
    name = MODULES[kind]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise BackendUnavailableError(f"{name} is not installed; {BRINGS[kind]}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(f"{name} is installed but does not load: {error}") from error


def find_gpu(name: str | None) -> tuple[Product, bool]:
    """The GPU of this name (``sm86`` for the first of that compute capability), and whether it is that of this machine.

    Raises:
        ConfigError: there is none of that name.
        BackendUnavailableError: that of this machine was asked for (by None or ``this``), and none is found.
    """
    if name is None or name == "this":
        found = this_gpu()
        if found is None:
            raise BackendUnavailableError(
                "no NVIDIA GPU is found on this machine; name the one that the engines are for: --gpu rtx3060, for "
                "example (--gpu list shows all)"
            )
        return found.device, True
    name = name.lower()
    if name.startswith("sm"):
        of_that = next((device for device in PRODUCTS.values() if f"sm{device.compute}" == name), None)
        if of_that is None:
            known = sorted({f"sm{device.compute}" for device in PRODUCTS.values()}, key=lambda sm: int(sm[2:]))
            raise ConfigError(f"gpu {name!r} is not known; known: {', '.join(known)}")
        return of_that, False
    return find_product(name), False


def table() -> str:
    """All GPUs with what they can have, for people."""
    rows = [("name", "SM", "memory", "engines", "int4")]
    for device in PRODUCTS.values():
        engines = ", ".join(device.engines) or "none"
        int4 = "yes" if device.int4_engines else "no"
        rows.append((device.name, str(device.compute), f"{device.memory >> 30} GiB", engines, int4))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
