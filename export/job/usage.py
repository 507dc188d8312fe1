"""Time and memory of an export, over all the runs that it took."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil

from owl2.runtime.memory import peak_memory

SAMPLING_SECONDS = 0.1


def return_memory() -> None:
    """Give unused memory back to the system: the C library keeps what many small arrays took."""
    gc.collect()
    if hasattr(psutil, "heap_trim"):  # not with every C library
        psutil.heap_trim()


class Usage:
    """Watches the process while it is entered.

    Attributes:
        layer_seconds: one entry per finished decoder layer.
        own_peak: most bytes that belonged to this process alone, without pages of mapped files, which the system may
            drop at any time; sampled ten times a second; None if the system does not tell (other than Linux).
    """

    def __init__(self) -> None:
        self.layer_seconds: list[float] = []
        self._began = self._last = time.perf_counter()
        self._earlier_seconds = 0.0
        self._peak = 0
        self.own_peak: int | None = None
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Usage:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._sampler.join()

    def begin_layers(self) -> None:
        self._last = time.perf_counter()

    def end_layer(self) -> None:
        """Note the time of a layer, and start that of the next one."""
        now = time.perf_counter()
        self.layer_seconds.append(round(now - self._last, 3))
        self._last = now

    @property
    def seconds(self) -> float:
        """Wall time so far; of interrupted runs, that of the parts they finished."""
        return self._earlier_seconds + time.perf_counter() - self._began

    @property
    def peak(self) -> int:
        """Largest resident size, bytes; pages of mapped files count."""
        return max(self._peak, peak_memory())

    def to_json(self) -> dict[str, Any]:
        """The figures that a later run needs; :meth:`restore` takes them."""
        names = ("seconds", "layer_seconds", "peak", "own_peak")
        return {name: getattr(self, name) for name in names}

    def restore(self, earlier: Mapping[str, Any]) -> None:
        self._earlier_seconds = earlier["seconds"]
        self.layer_seconds = list(earlier["layer_seconds"])
        self._peak = earlier["peak"]
        self._note(earlier["own_peak"])

    def _sample(self) -> None:
        while True:
            memory = psutil.Process().memory_info()
            self._note(memory.rss - memory.shared if hasattr(memory, "shared") else None)
            if self._stopped.wait(SAMPLING_SECONDS):
                return

    def _note(self, size: int | None) -> None:
        if size is not None:
            self.own_peak = max(self.own_peak or 0, size)
