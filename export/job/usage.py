"""Time and memory of an export, over all the runs that it took."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from owl2.runtime.memory import peak_memory

SAMPLING_SECONDS = 0.1


def own_memory() -> int | None:
    """Bytes of memory that are this process's own now; None where the system does not tell (other than Linux).

    Pages of mapped files, which the system may drop at any time, do not count.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def return_memory() -> None:
    """Give back to the system what is not used any more: the C library keeps what many small arrays took."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


class Usage:
    """Watches the process while it is entered.

    Attributes:
        layer_seconds: one entry per finished decoder layer.
    """

    def __init__(self) -> None:
        self.layer_seconds: list[float] = []
        self._began = self._last = time.perf_counter()
        self._earlier_seconds = 0.0
        self._peak = 0
        self._own_peak: int | None = None
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Usage:
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._sampler.join()

    def begin_layers(self) -> None:
        """The first layer's time begins here."""
        self._last = time.perf_counter()

    def end_layer(self) -> None:
        """A layer is done; the next one's time begins."""
        now = time.perf_counter()
        self.layer_seconds.append(round(now - self._last, 3))
        self._last = now

    @property
    def seconds(self) -> float:
        """Wall time so far, of interrupted runs what they had finished."""
        return self._earlier_seconds + time.perf_counter() - self._began

    @property
    def peak(self) -> int:
        """Largest resident size, bytes; pages of mapped files count."""
        return max(self._peak, peak_memory())

    @property
    def own_peak(self) -> int | None:
        """The largest :func:`own_memory`, sampled ten times a second; None where the system does not tell."""
        return self._own_peak

    def to_json(self) -> dict[str, Any]:
        """What a later run has to know; :meth:`restore` takes it."""
        return {
            "seconds": self.seconds,
            "layer_seconds": self.layer_seconds,
            "peak": self.peak,
            "own_peak": self._own_peak,
        }

    def restore(self, earlier: Mapping[str, Any]) -> None:
        """Add what an interrupted run has used."""
        self._earlier_seconds = earlier["seconds"]
        self.layer_seconds = list(earlier["layer_seconds"])
        self._peak = earlier["peak"]
        self._note(earlier["own_peak"])

    def _sample(self) -> None:
        while True:
            self._note(own_memory())
            if self._stopped.wait(SAMPLING_SECONDS):
                return

    def _note(self, size: int | None) -> None:
        if size is not None:
            self._own_peak = max(self._own_peak or 0, size)
