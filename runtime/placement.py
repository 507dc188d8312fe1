"""Names of devices: ``cpu``, ``cuda``, ``cuda:1``, ``tensorrt``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

from owl2.runtime.config import require
from owl2.runtime.foreign import shorten

EngineKind = Literal["tensorrt", "tensorrt-rtx"]
KINDS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
"""Kinds of device that this package supports without others."""
BACKEND_ENTRY_POINTS = "owl2.backends"
"""Group of entry points that add a kind of device: its name, and the :data:`.Backend` that runs it."""
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Placement:
    """The device that graphs run on.

    Attributes:
        kind: ``cpu``; ``cuda`` for an NVIDIA GPU through CUDA kernels; ``tensorrt`` or ``tensorrt-rtx`` for one through
            engines; or what another package adds.
        index: which of several such devices.
    """

    kind: str = CPU
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Read ``kind`` or ``kind:index``.

        Raises:
            ConfigError: the kind is not known, the index is not a number, or the CPU was given one.
        """
        require(isinstance(text, str), f"device must be a text, got {shorten(text)}")
        kind, colon, index = text.partition(":")
        known = KINDS if kind in KINDS else (*KINDS, *entry_points(group=BACKEND_ENTRY_POINTS).names)
        numbered = [f"{name}[:N]" for name in known if name != CPU]
        require(
            kind in known and (not colon or (kind != CPU and re.fullmatch("[0-9]{1,3}", index) is not None)),
            f"device {shorten(text)} is not known; use {CPU}, {' or '.join(numbered)}, as in cuda:1",
        )
        return cls(kind, int(index or 0))

    @property
    def on_host(self) -> bool:
        """Whether its memory is that of the process."""
        return self.kind == CPU

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind


HOST = Placement()
"""The CPU."""
