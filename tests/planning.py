"""Bundles of 7B shapes that are nothing but a manifest, and machines that are nothing but a few files."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from owl2 import ConfigError
from owl2.export.config import ExportConfig
from owl2.runtime import spec
from owl2.runtime.bundle import Manifest, WeightFormat
from owl2.runtime.config import AbstractorConfig, DecoderConfig, ModelConfig, PreprocessConfig, VisionConfig
from owl2.runtime.fit.footprint import decoder_bytes
from owl2.runtime.fit.machine import MemoryBudget
from owl2.runtime.fit.plan import Plan
from owl2.runtime.fit.products import GIB, PRODUCTS, Product
from owl2.runtime.spec import BYTES_PER_VALUE, DialectName, FloatType, WeightType
from owl2.runtime.verification import FileEntry

MODEL = ModelConfig(VisionConfig(), AbstractorConfig(), DecoderConfig(), PreprocessConfig())
VISION_WEIGHTS = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 6 * (4 * 1024**2 + 3 * 1024 * 2816) + 1024 * 4096
"""In the linear layers of tower and abstractor."""
WEIGHTS: tuple[WeightType, ...] = ("int4", "int8", "fp16", "fp32")
FORMS: tuple[tuple[DialectName, FloatType], ...] = (("ort", "fp32"), ("ort", "fp16"), ("onnx", "fp16"))
"""Dialect and activations."""


def manifest(
    weights: WeightType = "int4", dialect: DialectName = "ort", activations: FloatType = "fp32", **decoder: Any
) -> Manifest:
    """A 7B bundle as owl2-export makes it with these options, its files of the sizes that the weights take."""
    config = ExportConfig(Path("in"), Path("out"), weights=weights, dialect=dialect, activations=activations)
    group = 0 if config.quant is None else config.group_size
    plain = (dialect, activations) == ("ort", "fp32")
    made = Manifest(
        format=spec.FORMAT_VERSION,
        producer="owl2 test",
        dialect=dialect,
        activations=activations,
        minimum_onnxruntime="1.22",
        kv_cache={"fp32": "1.22", "int8": "1.27"} if plain else {activations: "1.22"},
        family="mplug_owl2",
        preset="",
        weights=WeightFormat(weights, config.types.head, config.types.vision, config.types.embeddings, "rtn", group),
        model=replace(MODEL, decoder=replace(MODEL.decoder, **decoder)),
        files={},
        engines={},
    )
    sizes = {
        "decoder.onnx.data": int(sum(decoder_bytes(made))),
        "vision.onnx.data": int(BYTES_PER_VALUE[config.types.vision] * VISION_WEIGHTS),
        "embeddings.bin": 32000 * 4096 * 2,
    }
    return replace(made, files={name: FileEntry(size, "0" * 64) for name, size in sizes.items()})


def can_be_exported(weights: WeightType, dialect: DialectName, activations: FloatType) -> bool:
    """Whether owl2-export takes these options together."""
    try:
        ExportConfig(Path("in"), Path("out"), weights=weights, dialect=dialect, activations=activations)
    except ConfigError:
        return False
    return True


def cpu(gibibytes: float) -> MemoryBudget:
    """The CPU of a machine with this much memory available."""
    memory = int(gibibytes * GIB)
    return MemoryBudget(Product("cpu", "CPU of this machine", "cpu", None, memory, None), memory, memory, here=True)


def device(name: str) -> MemoryBudget:
    """A named product."""
    return MemoryBudget.of_product(PRODUCTS[name])


def cases() -> Iterator[Plan]:
    """Every product with every sort of bundle, and CPUs of three sizes."""
    budgets = [*map(device, PRODUCTS), cpu(3), cpu(8), cpu(32)]
    for budget, weights, (dialect, activations) in product(budgets, WEIGHTS, FORMS):
        if can_be_exported(weights, dialect, activations):
            yield Plan(manifest(weights, dialect, activations), budget, 2048, activations)


def write(root: Path, name: str, content: object) -> None:
    """Write a file of a machine's system."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}")


def machine(root: Path, total: int, available: int) -> Path:
    """A machine with this much memory, in KiB."""
    write(root, "proc/meminfo", f"MemTotal: {total} kB\nMemFree: 187000 kB\nMemAvailable: {available} kB\n")
    return root


def nvidia_smi(folder: Path, *lines: str) -> None:
    """A program of that name that answers what the real one answered."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
