"""Devices by short name: memory, bandwidth, and the engines that can be built for them.

Memory and bandwidth are NVIDIA's, from the data sheets of the Jetson modules and data-centre GPUs and the product
pages and architecture papers of the GeForce series; compute capabilities from NVIDIA's list of CUDA GPUs. Where a
product comes in several forms the figure is the highest (A100 and H100 as SXM, Orin Nano with the clocks of JetPack
6.1, 68 GB/s before). They are peaks that nothing reaches. Memory is nominal; :mod:`owl2.runtime.fit.machine` subtracts
what firmware, system and error correction take of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import shorten
from owl2.runtime.placement import EngineKind

Family = Literal["cpu", "jetson", "datacenter", "geforce"]

GIB = 1 << 30
GB_PER_SECOND = 10**9

TENSORRT_RTX = frozenset({75, 80, 86, 89, 120, 121})
"""Compute capabilities that TensorRT for RTX builds for."""
FIRST_WITH_INT4 = 80
"""Lowest compute capability for which TensorRT and TensorRT for RTX take int4 weights."""


@dataclass(frozen=True, slots=True)
class Product:
    """A processor and the memory that it computes in.

    Attributes:
        name: short name, as commands take it.
        product: full name.
        compute: CUDA compute capability times ten (SM): 87 for Orin; None for a CPU.
        memory: bytes.
        bandwidth: of that memory, bytes per second; None where it is not known.
    """

    name: str
    product: str
    family: Family
    compute: int | None
    memory: int
    bandwidth: float | None

    @property
    def shared(self) -> bool:
        """Whether the CPU works in the same memory."""
        return self.family in ("cpu", "jetson")

    @property
    def engines(self) -> tuple[EngineKind, ...]:
        """Kinds of TensorRT engine that it runs, the preferred one first."""
        standard: tuple[EngineKind, ...] = ("tensorrt",) if self.family in ("jetson", "datacenter") else ()
        rtx: tuple[EngineKind, ...] = ("tensorrt-rtx",) if self.compute in TENSORRT_RTX else ()
        return standard + rtx

    @property
    def int4_engines(self) -> bool:
        """Whether its engines may have int4 weights."""
        return bool(self.engines) and self.compute is not None and self.compute >= FIRST_WITH_INT4

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"shared": self.shared, "engines": list(self.engines), "int4_engines": self.int4_engines}


# Name, product, family, compute capability, memory in GiB, bandwidth in GB/s.
_TABLE: tuple[tuple[str, str, Family, int, int, float], ...] = (
    ("orin-nano-4gb", "NVIDIA Jetson Orin Nano 4GB", "jetson", 87, 4, 51),
    ("orin-nano-8gb", "NVIDIA Jetson Orin Nano 8GB", "jetson", 87, 8, 102),
    ("orin-nx-8gb", "NVIDIA Jetson Orin NX 8GB", "jetson", 87, 8, 102.4),
    ("orin-nx-16gb", "NVIDIA Jetson Orin NX 16GB", "jetson", 87, 16, 102.4),
    ("agx-orin-32gb", "NVIDIA Jetson AGX Orin 32GB", "jetson", 87, 32, 204.8),
    ("agx-orin-64gb", "NVIDIA Jetson AGX Orin 64GB", "jetson", 87, 64, 204.8),
    # SM110 since CUDA 13, which JetPack 7 has; CUDA 12 called the same chip SM101.
    ("thor-128gb", "NVIDIA Jetson AGX Thor (T5000)", "jetson", 110, 128, 273),
    ("t4", "NVIDIA T4", "datacenter", 75, 16, 320),
    ("a100-40gb", "NVIDIA A100 40GB", "datacenter", 80, 40, 1555),
    ("a100-80gb", "NVIDIA A100 80GB", "datacenter", 80, 80, 2039),
    ("a10", "NVIDIA A10", "datacenter", 86, 24, 600),
    ("l4", "NVIDIA L4", "datacenter", 89, 24, 300),
    ("l40s", "NVIDIA L40S", "datacenter", 89, 48, 864),
    ("h100", "NVIDIA H100", "datacenter", 90, 80, 3350),
    ("rtx2060", "NVIDIA GeForce RTX 2060", "geforce", 75, 6, 336),
    ("rtx2080ti", "NVIDIA GeForce RTX 2080 Ti", "geforce", 75, 11, 616),
    ("rtx3050", "NVIDIA GeForce RTX 3050", "geforce", 86, 8, 224),
    ("rtx3060", "NVIDIA GeForce RTX 3060", "geforce", 86, 12, 360),
    ("rtx3070", "NVIDIA GeForce RTX 3070", "geforce", 86, 8, 448),
    ("rtx3080", "NVIDIA GeForce RTX 3080", "geforce", 86, 10, 760),
    ("rtx3090", "NVIDIA GeForce RTX 3090", "geforce", 86, 24, 936),
    ("rtx4060", "NVIDIA GeForce RTX 4060", "geforce", 89, 8, 272),
    ("rtx4060ti-16gb", "NVIDIA GeForce RTX 4060 Ti", "geforce", 89, 16, 288),
    ("rtx4070", "NVIDIA GeForce RTX 4070", "geforce", 89, 12, 504),
    ("rtx4080", "NVIDIA GeForce RTX 4080", "geforce", 89, 16, 716.8),
    ("rtx4090", "NVIDIA GeForce RTX 4090", "geforce", 89, 24, 1008),
    ("rtx5060", "NVIDIA GeForce RTX 5060", "geforce", 120, 8, 448),
    ("rtx5060ti-16gb", "NVIDIA GeForce RTX 5060 Ti", "geforce", 120, 16, 448),
    ("rtx5070", "NVIDIA GeForce RTX 5070", "geforce", 120, 12, 672),
    ("rtx5080", "NVIDIA GeForce RTX 5080", "geforce", 120, 16, 960),
    ("rtx5090", "NVIDIA GeForce RTX 5090", "geforce", 120, 32, 1792),
)

PRODUCTS = MappingProxyType(
    {
        name: Product(name, product, family, compute, memory * GIB, bandwidth * GB_PER_SECOND)
        for name, product, family, compute, memory, bandwidth in _TABLE
    }
)
"""Every named device by its short name, Jetson modules first."""


def find_product(name: str) -> Product:
    """The device of that short name; raises ConfigError with all names if it is not known."""
    if name not in PRODUCTS:
        raise ConfigError(f"device {shorten(name)} is not known; known: {', '.join(PRODUCTS)}")
    return PRODUCTS[name]
