"""What is attacked, and with which inputs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Input:
    """One hostile input.

    Attributes:
        target: what the surface does with it, or the name of the file that it replaces; usable in a file name.
        content: everything else.
    """

    target: str
    content: bytes

    @property
    def file_name(self) -> str:
        """Name of the file in which it is kept; :meth:`read` is the inverse."""
        return f"{hashlib.sha256(self.content).hexdigest()[:12]}.{self.target}"

    @classmethod
    def read(cls, path: Path) -> Input:
        """The input that was kept in a file."""
        return cls(path.name.split(".", 1)[1], path.read_bytes())


@dataclass(frozen=True, slots=True)
class Surface:
    """A way in for foreign data.

    Attributes:
        make: the input of a generator of random numbers, always the same for the same numbers.
        run: gives it to the code as a user would.
    """

    make: Callable[[random.Random], Input]
    run: Callable[[Input], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a surface is attacked.

    Attributes:
        module: in ``fuzz.surfaces``; its ``open_surface(work)`` gives the :class:`Surface`.
        share: of all inputs; about as many in proportion as it takes little time.
        memory: bytes that one input may add to what the process holds.
        trusted: whether SECURITY.md tells users to trust it: a crash of a library, and what it writes, is counted only.
        remarks: whether libraries write plain text to stderr that nothing here can switch off (libtiff, sentencepiece).
    """

    module: str
    share: float
    memory: int = 256 << 20
    remarks: bool = False
    trusted: bool = False


# An image of 67 megapixels takes 256 MiB decoded, and its RGB form as much.
PLANS = {
    "adapter": Plan("adapter", 0.02),
    "api": Plan("api", 0.1, 320 << 20),
    "calibration": Plan("calibration", 0.1),
    "checkpoint": Plan("checkpoint", 0.03),
    "data": Plan("data", 0.1),
    "engines": Plan("engines", 0.06),
    "goldens": Plan("goldens", 0.1),
    "graphs": Plan("graphs", 0.03, trusted=True),
    "harness": Plan("harness", 0),  # for its own test
    "images": Plan("images", 0.22, 640 << 20, remarks=True),
    "journal": Plan("journal", 0.001),
    "manifest": Plan("manifest", 0.1),
    "prompts": Plan("prompts", 0.06),
    "report": Plan("report", 0.02),
    "scores": Plan("scores", 0.02),
    "tokenizer": Plan("tokenizer", 0.039, remarks=True),
}


SURFACES = tuple(name for name, plan in PLANS.items() if plan.share)


def numbers(surface: str, seed: int, index: int) -> random.Random:
    """The random numbers of one input."""
    return random.Random(f"{surface} {seed} {index}")
