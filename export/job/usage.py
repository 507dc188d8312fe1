"""Time and memory of an export, over all the runs that it took."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from owl2.runtime.config import from_json
from owl2.runtime.memory import peak_memory

SAMPLING_SECONDS = 0.1


def return_memory() -> None:
    """Give unused memory back to the system: the C library keeps what many small arrays took."""
    gc.collect()
    if hasattr(psutil, "heap_trim"):  # not with every C library
        psutil.heap_trim()


@dataclass(frozen=True)
class Figures:
    """What a run has used, for the next one: seconds, and bytes."""

    seconds: float
    layer_seconds: tuple[float, ...]
    peak: int
    own_peak: int | None


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
        return asdict(Figures(self.seconds, tuple(self.layer_seconds), self.peak, self.own_peak))

    def restore(self, earlier: Mapping[str, Any]) -> None:
        """Go on from what :meth:`to_json` gave; raises ConfigError if it is something else."""
        figures = from_json(Figures, earlier, "usage")
        self._earlier_seconds = figures.seconds
        self.layer_seconds = list(figures.layer_seconds)
        self._peak = figures.peak
        self._note(figures.own_peak)

    def _sample(self) -> None:
        while True:
            memory = psutil.Process().memory_info()
            self._note(memory.rss - memory.shared if hasattr(memory, "shared") else None)
            if self._stopped.wait(SAMPLING_SECONDS):
                return

    def _note(self, size: int | None) -> None:
        if size is not None:
            self.own_peak = max(self.own_peak or 0, size)
