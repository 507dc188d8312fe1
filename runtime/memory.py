"""Memory of this process."""

from __future__ import annotations

import sys


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    if sys.platform == "win32":
        import psutil  # a dependency there only

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
