"""Breaks every promise on request, to see that the harness notices."""

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from fuzz.surface import Input, Surface
from owl2.runtime.config import require
from owl2.runtime.errors import Owl2Warning


def _take_memory() -> None:
    _ = bytearray(400 << 20)


def _take_time() -> None:
    end = time.process_time() + 1
    while time.process_time() < end:
        pass


def _sleep_deaf() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(1000)


DEEDS: dict[str, Callable[[], object]] = {
    "accepted": lambda: warnings.warn("works for now", Owl2Warning, stacklevel=1),
    "refused": lambda: require(False, "text must be short"),
    "exception": lambda: int("x"),
    "message": lambda: require(False, "text must not be " + "x" * 3000),
    "lines": lambda: warnings.warn("one\ntwo", Owl2Warning, stacklevel=1),
    "control": lambda: warnings.warn("\x1b[31mred", Owl2Warning, stacklevel=1),
    "warning": lambda: warnings.warn("of a library", UserWarning, stacklevel=1),
    "stderr": lambda: os.write(2, b"of a library"),
    "memory": _take_memory,
    "cpu": _take_time,
    "hang": lambda: time.sleep(1000),
    "deaf": _sleep_deaf,
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: sys.exit(3),
    "quit": lambda: os._exit(0),
}


def open_surface(_: Path, __: Path) -> Surface:
    """One input for each deed."""

    def make(rng: random.Random) -> Input:
        return Input(rng.choice(list(DEEDS)), b"")

    return Surface(make, lambda given: DEEDS[given.target]())
