"""Memory of devices: the CPU and the GPUs of this machine, and named products.

Detection is best effort: a file or program that is missing, or that cannot be understood, leaves the answer None or
empty and raises nothing. Parsing is separate from reading, so that it can be tested on recorded text.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from owl2.runtime.fit.products import GB_PER_SECOND, GIB, PRODUCTS, Family, Product
from owl2.runtime.memory import ROOT, control_groups, headroom, host_memory, read_state

NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
SMI_SECONDS = 10
MIB = 1 << 20
READ_BYTES = 256 * MIB  # more than every cache but those of a few servers
READ_SECONDS = 0.3

# Assumed.
JETSON_SYSTEM = int(1.1 * GIB)  # firmware, kernel, services
JETSON_DESKTOP = int(0.8 * GIB)
GEFORCE_SYSTEM = int(0.3 * GIB)  # driver
GEFORCE_DESKTOP = int(0.5 * GIB)
DATACENTER_RESERVED = 0.065  # error correction and driver, of the nominal memory


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """A device and the memory that a model may take there, bytes.

    Attributes:
        available: what a new process can take now on this machine; assumed for a named product.
        host: available in the CPU's memory, where engines are built; None where it is not known.
        here: whether it is this machine.
        limited: whether closing programs would not add to it: in a container with a limit, on a named data-centre GPU.
    """

    device: Product
    available: int
    host: int | None
    here: bool
    limited: bool = False

    @classmethod
    def of_product(cls, device: Product) -> MemoryBudget:
        """A named product with its system and a desktop running; data-centre GPUs have no desktop."""
        if device.family == "datacenter":
            available = int(device.memory * (1 - DATACENTER_RESERVED))
            return cls(device, available, None, here=False, limited=True)
        taken = JETSON_SYSTEM + JETSON_DESKTOP if device.shared else GEFORCE_SYSTEM + GEFORCE_DESKTOP
        available = device.memory - taken
        return cls(device, available, available if device.shared else None, here=False)

    @property
    def closable(self) -> int:
        """Bytes that closing the desktop, and on this machine other programs, would add at most."""
        system = JETSON_SYSTEM if self.device.shared else GEFORCE_SYSTEM
        return 0 if self.limited else max(0, self.device.memory - system - self.available)


def this_cpu(root: Path = ROOT) -> MemoryBudget | None:
    """The CPU of this machine, or of the container that this process runs in; None where its memory is not known."""
    memory = host_memory(root)
    if memory is None:
        return None
    name = "CPU of this machine" + (", in a group with a memory limit" if memory.limited else "")
    device = Product("cpu", name, "cpu", None, memory.total, None)
    return MemoryBudget(device, memory.available, memory.available, here=True, limited=memory.limited)


def free_swap(root: Path = ROOT) -> int:
    """Bytes of unused swap on disks; 0 where it is not known.

    Control groups of version 2 limit swap separately; without that limit's file there is none. Those of version 1 limit
    the sum, so that swap does not count in a group with a limit.
    """
    cpu, folders = this_cpu(root), [folder for version, folder in control_groups(root) if version == "v2"]
    separate = any((folder / "memory.swap.max").exists() for folder in folders)
    if cpu is None or (cpu.limited and not separate):
        return 0
    limits = [headroom(folder, "swap.max", "swap.current") for folder in folders]
    return max(0, min([parse_swaps(read_state(root / "proc/swaps")), *(left for left in limits if left is not None)]))


def parse_swaps(text: str) -> int:
    """Read ``/proc/swaps``. zram does not count: it is in the same memory, and weights do not compress."""
    rows = [line.split() for line in text.splitlines()[1:]]
    sizes = [(row[2], row[3]) for row in rows if len(row) >= 4 and not row[0].startswith("/dev/zram")]
    return sum(1024 * (int(size) - int(used)) for size, used in sizes if size.isdigit() and used.isdigit())


def this_gpu(root: Path = ROOT) -> MemoryBudget | None:
    """The GPU of this machine, the first of several."""
    return next(iter(gpus(root)), None)


def gpus(root: Path = ROOT) -> list[MemoryBudget]:
    """The GPUs of this machine: a Jetson's by its device tree, others by nvidia-smi and in its order.

    CUDA_VISIBLE_DEVICES has no effect.
    """
    # The first is a link to the second; containers hide the one and not always the other.
    model = read_state(root / "proc/device-tree/model") or read_state(root / "sys/firmware/devicetree/base/model")
    cpu = this_cpu(root)
    if cpu is not None and (jetson := parse_jetson_model(model, cpu.device.memory)) is not None:
        return [replace(cpu, device=jetson)]
    try:
        listing = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=SMI_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    host = None if cpu is None else cpu.available
    return [MemoryBudget(device, free, host, here=True) for device, free in parse_nvidia_smi(listing)]


def driver_version(root: Path = ROOT) -> str | None:
    """Version of NVIDIA's kernel driver; None where it is not known."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", read_state(root / "proc/driver/nvidia/version"))
    return found[1] if found else None


def parse_jetson_model(text: str, memory: int) -> Product | None:
    """The Jetson module that a device tree names.

    Args:
        text: of ``/proc/device-tree/model``: the development kit's name, which does not say how much memory it has.
        memory: total bytes that Linux sees, always less than the nominal size.
    """
    for series in ("AGX Orin", "Orin NX", "Orin Nano"):
        if series in text:
            sizes = [device for device in PRODUCTS.values() if f"Jetson {series} " in device.product]
            fitting = [device for device in sizes if device.memory >= memory]
            return min(fitting or sizes, key=lambda device: abs(device.memory - memory))
    return PRODUCTS["thor-128gb"] if "Thor" in text else None


def parse_nvidia_smi(text: str) -> list[tuple[Product, int]]:
    """Read the lines with numbers: name, total and free MiB, and compute capability. Returns GPUs and free bytes."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[1].isdigit() and fields[2].isdigit() and re.fullmatch(r"\d+\.\d", fields[3]):
            total, free = (int(field) * MIB for field in fields[1:3])
            found.append((_gpu(fields[0], total, int(fields[3].replace(".", ""))), free))
    return found


def _gpu(name: str, memory: int, compute: int) -> Product:
    """A GPU by its product name, with the table's bandwidth where the table has this product in this size."""
    for device in PRODUCTS.values():
        # Drivers leave "NVIDIA" or "GeForce" out of some names and append the form (PCIe, SXM) to others.
        words = device.product.removeprefix("NVIDIA ").removesuffix(" 40GB").removesuffix(" 80GB")
        same = re.search(rf"\b{re.escape(words)}(?! (Ti|SUPER|Laptop))\b", name) is not None
        if same and device.compute == compute and 0.85 < memory / device.memory < 1.05:
            return Product("gpu", name, device.family, compute, memory, device.bandwidth)
    family: Family = "geforce" if "RTX" in name or "GTX" in name else "datacenter"
    return Product("gpu", name, family, compute, memory, None)


def read_bandwidth() -> float:
    """Measure how fast all cores together read memory, bytes per second; takes about half a second and 256 MiB."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    part = READ_BYTES // 8 // workers
    arrays = [np.ones(part, dtype=np.int64) for _ in range(workers)]
    best = 0.0
    with ThreadPoolExecutor(workers) as pool:
        end = time.perf_counter() + READ_SECONDS
        while time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(np.max, arrays))  # releases the interpreter's lock
            best = max(best, 8 * part * workers / (time.perf_counter() - began))
    return max(best, GB_PER_SECOND / 10)
