"""Memory of this process and of the machine that it runs on.

Detection is best effort: a file that is missing or cannot be understood leaves the answer None and raises nothing.
Parsing is separate from reading, so that it can be tested on recorded text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
"""Of the files in which Linux describes memory and board; tests give one of their own."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the CPU, bytes.

    Attributes:
        total: of the machine.
        available: what processes can take now.
        limited: whether a control group holds it down, as in a container with a limit.
    """

    total: int
    available: int
    limited: bool


def host_memory(root: Path = ROOT) -> HostMemory | None:
    """Memory of this machine, or of the container that this process runs in; None where it is not known."""
    memory = parse_meminfo(read_state(root / "proc/meminfo"))
    if memory is None:
        return None
    total, free = memory
    available = free
    for version, folder in control_groups(root):
        names = ("max", "current") if version == "v2" else ("limit_in_bytes", "usage_in_bytes")
        left = headroom(folder, *names)
        if left is not None:
            available = min(available, max(0, left + parse_droppable(read_state(folder / "memory.stat"))))
    return HostMemory(total, available, limited=available < free)


def parse_meminfo(text: str) -> tuple[int, int] | None:
    """Read total and available bytes from ``/proc/meminfo``; page cache that can be dropped counts as available."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    if "MemTotal" not in values or "MemAvailable" not in values:
        return None
    return int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024


def control_groups(root: Path = ROOT) -> Iterator[tuple[str, Path]]:
    """Version, ``v1`` or ``v2``, and folder of each control group above this process that may limit memory."""
    for line in read_state(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = "v2" if number == "0" and not controllers else "v1"
        if path.startswith("/") and (version == "v2" or "memory" in controllers.split(",")):
            mounted = root / "sys/fs/cgroup" / ("" if version == "v2" else "memory")
            # Inside a container the path may be the host's: then only the root exists, which is the container's group.
            group = PurePosixPath(path)
            yield from ((version, mounted / above.relative_to("/")) for above in (group, *group.parents))


def headroom(folder: Path, limit_file: str, usage_file: str) -> int | None:
    """Limit less usage; None where there is no limit."""
    limit, usage = (read_state(folder / f"memory.{name}").strip() for name in (limit_file, usage_file))
    return int(limit) - int(usage) if limit.isdigit() and usage.isdigit() else None


def parse_droppable(text: str) -> int:
    """Read ``memory.stat`` of a control group: bytes that the kernel drops when memory is wanted.

    These are pages of files, active ones too (as those of a bundle that was just copied or verified), and what the
    kernel keeps of folders. Version 1 counts groups below only in the lines that begin with ``total``.
    """
    values = {name: int(size) for name, size in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}
    total = "total_" if "total_inactive_file" in values else ""
    names = (f"{total}inactive_file", f"{total}active_file", "slab_reclaimable")
    return sum(values.get(name, 0) for name in names)


def read_state(path: Path) -> str:
    """Text of a file of the kernel's; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    if sys.platform == "win32":
        import psutil  # a dependency there only

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
