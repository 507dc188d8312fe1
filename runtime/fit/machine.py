"""What is found on this machine: memory that is free for a model, a GPU, and how fast memory is read.

Everything here is best effort. A file or program that is not there, or says nothing that can be understood, leaves
the answer None; nothing is raised for it. Parsing is apart from reading, so that it is checked on recorded text.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from owl2.runtime.fit.products import GB_PER_SECOND, PRODUCTS, Family, Product

NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
SMI_SECONDS = 10
V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
MIB = 1 << 20
READ_BYTES = 256 * MIB  # beyond every cache but those of a few servers
READ_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class SystemPaths:
    """Where Linux tells of memory and the board; tests give files of their own.

    Attributes:
        meminfo: ``/proc/meminfo``.
        swaps: ``/proc/swaps``.
        cgroup: the control groups of this process.
        cgroups: where they are mounted.
        model: name of the board, on those with a device tree.
        driver: what NVIDIA's kernel driver says of itself.
        firmware: where the device tree is too, for ``/proc/device-tree`` is a link to it.
    """

    meminfo: Path = Path("/proc/meminfo")
    swaps: Path = Path("/proc/swaps")
    cgroup: Path = Path("/proc/self/cgroup")
    cgroups: Path = Path("/sys/fs/cgroup")
    model: Path = Path("/proc/device-tree/model")
    driver: Path = Path("/proc/driver/nvidia/version")
    firmware: Path = Path("/sys/firmware/devicetree/base/model")


SYSTEM = SystemPaths()


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the CPU, bytes.

    Attributes:
        total: what is built in, less what the kernel keeps for itself.
        available: what a new process can take without anything being swapped out or killed; a container's limit counts.
        limited: whether that limit is what counts.
    """

    total: int
    available: int
    limited: bool = False


@dataclass(frozen=True, slots=True)
class DetectedDevice:
    """A device of this machine.

    Attributes:
        device: what it is.
        available: bytes that are free in its memory now.
    """

    device: Product
    available: int


def host_memory(paths: SystemPaths = SYSTEM) -> Memory | None:
    """Memory of this machine, or of the container this process runs in; None where the system does not tell."""
    text = _read(paths.meminfo)
    memory = None if text is None else parse_meminfo(text)
    if memory is None:
        return None
    headrooms = list(_cgroup_headrooms(paths))
    if headrooms and min(headrooms) < memory.available:
        return Memory(memory.total, max(0, min(headrooms)), limited=True)
    return memory


def parse_meminfo(text: str) -> Memory | None:
    """Read ``/proc/meminfo``; page cache that can be dropped counts as available, as the kernel estimates it."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    if "MemTotal" not in values or "MemAvailable" not in values:
        return None
    return Memory(int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024)


def free_swap(paths: SystemPaths = SYSTEM) -> int:
    """Bytes of swap on disks that are not in use; 0 where the system does not tell.

    Control groups of version 2 limit swap apart from memory, and where the file for it is missing there is none. Those
    of version 1 limit the sum, so that in one with a limit swap does not count.
    """
    memory, text = host_memory(paths), _read(paths.swaps)
    if text is None or memory is None:
        return 0
    limits, told = [], False
    for folder in _v2_folders(paths):
        told = told or (folder / "memory.swap.max").exists()
        headroom = _headroom(folder, "memory.swap.max", "memory.swap.current")
        if headroom is not None:
            limits.append(max(0, headroom))
    return min([parse_swaps(text), *limits]) if told or not memory.limited else 0


def _v2_folders(paths: SystemPaths) -> Iterator[Path]:
    for version, path in parse_cgroup(_read(paths.cgroup) or ""):
        if version == "v2":
            yield from (paths.cgroups / group.relative_to("/") for group in (path, *path.parents))


def parse_swaps(text: str) -> int:
    """Read ``/proc/swaps``. zram does not count: it lies in the same memory, and weights do not compress."""
    rows = [line.split() for line in text.splitlines()[1:]]
    sizes = [(row[2], row[3]) for row in rows if len(row) >= 4 and not row[0].startswith("/dev/zram")]
    return sum(1024 * (int(size) - int(used)) for size, used in sizes if size.isdigit() and used.isdigit())


def parse_cgroup(text: str) -> list[tuple[str, PurePosixPath]]:
    """Read ``/proc/self/cgroup``: version ``v1`` or ``v2`` and path of every group that may limit memory."""
    groups = []
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            if number == "0" and not controllers:
                groups.append(("v2", PurePosixPath(path)))
            elif "memory" in controllers.split(","):
                groups.append(("v1", PurePosixPath(path)))
    return groups


def _cgroup_headrooms(paths: SystemPaths) -> Iterator[int]:
    """Bytes left in each control group above this process that has a limit."""
    text = _read(paths.cgroup)
    for version, path in parse_cgroup(text) if text is not None else ():
        root = paths.cgroups if version == "v2" else paths.cgroups / "memory"
        names = ("memory.max", "memory.current") if version == "v2" else V1_FILES
        # Seen from inside a container the path may be the host's: then only the root is there, which is its own group.
        for group in (path, *path.parents):
            folder = root / group.relative_to("/")
            headroom = _headroom(folder, *names)
            if headroom is not None:
                yield headroom + parse_droppable(_read(folder / "memory.stat") or "")


def _headroom(folder: Path, limit_file: str, usage_file: str) -> int | None:
    """Limit less usage; None where there is no limit."""
    limit, usage = (_read(folder / name) for name in (limit_file, usage_file))
    if limit is None or usage is None or not limit.strip().isdigit() or not usage.strip().isdigit():
        return None
    return int(limit) - int(usage)


def parse_droppable(text: str) -> int:
    """Read ``memory.stat`` of a control group: bytes that are dropped when memory is wanted.

    These are pages of files, active ones too (those of a bundle that was just copied or verified are), and what the
    kernel keeps of folders. Version 1 counts groups below only in the lines that begin with ``total``.
    """
    values = {name: int(size) for name, size in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}
    total = "total_" if "total_inactive_file" in values else ""
    names = (f"{total}inactive_file", f"{total}active_file", "slab_reclaimable")
    return sum(values.get(name, 0) for name in names)


def this_cpu(paths: SystemPaths = SYSTEM) -> DetectedDevice | None:
    """The CPU of this machine; None where the system does not tell its memory."""
    memory = host_memory(paths)
    if memory is None:
        return None
    product = "CPU of this machine" + (", in a group with a memory limit" if memory.limited else "")
    return DetectedDevice(Product("cpu", product, "cpu", None, memory.total, None, shared=True), memory.available)


def this_gpu(paths: SystemPaths = SYSTEM) -> DetectedDevice | None:
    """The GPU of this machine, of several number 0; None if none is found."""
    return next(iter(gpus(paths)), None)


def gpus(paths: SystemPaths = SYSTEM) -> list[DetectedDevice]:
    """The GPUs of this machine: a Jetson's by its device tree, others by nvidia-smi and in its order.

    CUDA_VISIBLE_DEVICES has no part in it.
    """
    # Containers hide the one and not always the other.
    model, memory = _read(paths.model) or _read(paths.firmware), host_memory(paths)
    if model is not None and memory is not None:
        jetson = parse_jetson_model(model, memory.total)
        if jetson is not None:
            return [DetectedDevice(jetson, memory.available)]
    try:
        listing = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=SMI_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia_smi(listing)


def driver_version(paths: SystemPaths = SYSTEM) -> str | None:
    """Version of NVIDIA's kernel driver; None where there is none, or it does not say."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _read(paths.driver) or "")
    return found[1] if found else None


def parse_jetson_model(text: str, memory: int) -> Product | None:
    """The Jetson module that a device tree names.

    Args:
        text: of ``/proc/device-tree/model``; the development kit's name, which does not tell how much memory it has.
        memory: total bytes that Linux sees, always less than the nominal size.
    """
    name = text.rstrip("\0\n ")
    for words, products in (("AGX Orin", "AGX Orin"), ("Orin NX", "Orin NX"), ("Orin Nano", "Orin Nano")):
        if words in name:
            sizes = [device for device in PRODUCTS.values() if f"Jetson {products} " in device.product]
            fitting = [device for device in sizes if device.memory >= memory]
            return min(fitting or sizes, key=lambda device: abs(device.memory - memory))
    return PRODUCTS["thor-128gb"] if "Thor" in name else None


def parse_nvidia_smi(text: str) -> list[DetectedDevice]:
    """Read the lines of name, total and free MiB, and compute capability; what has no numbers is left out."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[1].isdigit() and fields[2].isdigit() and re.fullmatch(r"\d+\.\d", fields[3]):
            total, free = (int(field) * MIB for field in fields[1:3])
            found.append(DetectedDevice(_gpu(fields[0], total, int(fields[3].replace(".", ""))), free))
    return found


def _gpu(name: str, memory: int, compute: int) -> Product:
    """A GPU by its product name, with the table's bandwidth where the table has this product in this size."""
    for device in PRODUCTS.values():
        # Drivers leave "NVIDIA" or "GeForce" out of some names and put the form (PCIe, SXM) behind others.
        words = device.product.removeprefix("NVIDIA ").removesuffix(" 40GB").removesuffix(" 80GB")
        same = re.search(rf"\b{re.escape(words)}(?! (Ti|SUPER|Laptop))\b", name) is not None
        if same and device.compute == compute and 0.85 < memory / device.memory < 1.05:
            return Product("gpu", name, device.family, compute, memory, device.bandwidth, shared=False)
    family: Family = "geforce" if "RTX" in name or "GTX" in name else "datacenter"
    return Product("gpu", name, family, compute, memory, None, shared=False)


def read_bandwidth() -> float:
    """Measure how fast all cores together read memory, bytes per second; takes about half a second and 256 MiB."""
    workers = len(os.sched_getaffinity(0))
    part = READ_BYTES // 8 // workers
    arrays = [np.ones(part, dtype=np.int64) for _ in range(workers)]
    best = 0.0
    with ThreadPoolExecutor(workers) as pool:
        end = time.perf_counter() + READ_SECONDS
        while time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(np.max, arrays))  # lets go of the interpreter's lock
            best = max(best, 8 * part * workers / (time.perf_counter() - began))
    return max(best, GB_PER_SECOND / 10)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
