"""The module that builds engines and the GPU they are for, with checks that refuse a hopeless build at once."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from owl2.runtime.backends.tensorrt.module import import_tensorrt
from owl2.runtime.cli.table import table
from owl2.runtime.errors import BackendUnavailableError, ConfigError
from owl2.runtime.fit.machine import this_gpu
from owl2.runtime.fit.products import PRODUCTS, Product, find_product
from owl2.runtime.foreign import shorten
from owl2.runtime.placement import EngineKind


@dataclass(frozen=True)
class BuildTarget:
    """The module that builds engines, and the GPU they are for.

    Attributes:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        compute: compute capability, times ten.
        here: whether it is the GPU of this machine, so that TensorRT need not be told which.
    """

    kind: EngineKind
    module: ModuleType
    device: Product
    compute: int
    here: bool


def choose_target(kind: EngineKind, device: Product, dialect: str, weights: str, *, here: bool) -> BuildTarget:
    """Check that engines of a bundle can be built for ``device``, and import the module that builds them.

    Raises:
        ConfigError: the device does not run such engines or they must be built elsewhere; says what is possible.
        BackendUnavailableError: the module is not installed or does not load.
    """
    if dialect != "onnx":
        raise ConfigError(
            f"engines are built from graphs of the dialect onnx, this bundle has the dialect {dialect}; export the "
            "checkpoint again with --dialect onnx"
        )
    if kind not in device.engines or device.compute is None:
        instead = " or ".join(device.engines)
        raise ConfigError(
            f"{device.product} (SM{device.compute}) does not run {kind} engines; "
            + (f"it runs {instead} engines" if instead else "no TensorRT engines can be built for it here")
        )
    if kind == "tensorrt" and not here:
        raise ConfigError(
            f"{kind} engines are built on the GPU that runs them: copy the bundle to the {device.product} and run "
            "owl2-export engine BUNDLE there"
        )
    if weights == "int4" and not device.int4_engines:
        raise ConfigError(
            f"{device.product} (SM{device.compute}) has no TensorRT engines with int4 weights: these need compute "
            "capability 8.0 (Ampere) or newer; export with --weights fp16, or run a bundle of the dialect ort there"
        )
    return BuildTarget(kind, import_tensorrt(kind), device, device.compute, here)


def find_gpu(name: str | None) -> tuple[Product, bool]:
    """The GPU of this name (``sm86`` for the first of that compute capability), and whether it is this machine's.

    Raises:
        ConfigError: no GPU has that name.
        BackendUnavailableError: this machine's was asked for (by None or ``this``), and it has none.
    """
    if name is None or name == "this":
        found = this_gpu()
        if found is None:
            raise BackendUnavailableError(
                "no NVIDIA GPU is found on this machine; name the one that the engines are for, such as --gpu rtx3060 "
                "(--gpu list shows all)"
            )
        return found.device, True
    name = name.lower()
    if not name.startswith("sm"):
        return find_product(name), False
    first = next((device for device in PRODUCTS.values() if f"sm{device.compute}" == name), None)
    if first is None:
        known = sorted({f"sm{device.compute}" for device in PRODUCTS.values()}, key=lambda sm: int(sm[2:]))
        raise ConfigError(f"gpu {shorten(name)} is not known; known: {', '.join(known)}")
    return first, False


def gpu_table() -> str:
    """All GPUs with the engines that they can have, for people."""
    rows = [("name", "SM", "memory", "engines", "int4")]
    for device in PRODUCTS.values():
        engines = ", ".join(device.engines) or "none"
        int4 = "yes" if device.int4_engines else "no"
        rows.append((device.name, str(device.compute), f"{device.memory >> 30} GiB", engines, int4))
    return table(rows)
