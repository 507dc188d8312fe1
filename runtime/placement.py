"""The name of what a bundle runs on: ``cpu``, ``cuda``, ``cuda:1``, ``tensorrt``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from owl2.runtime.config import require

DeviceKind = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
EngineKind = Literal["tensorrt", "tensorrt-rtx"]
KINDS: tuple[DeviceKind, ...] = get_args(DeviceKind)
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Placement:
    """What graphs run on.

    Attributes:
        kind: the CPU, an NVIDIA GPU through CUDA kernels, or one through engines of TensorRT or TensorRT for RTX.
        index: which of several GPUs.
    """

    kind: DeviceKind = "cpu"
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Read ``kind`` or ``kind:index``.

        Raises:
            ConfigError: the kind is not known, the index is no number, or one is given for the CPU.
        """
        kind, colon, index = text.partition(":")
        numbered = [f"{name}[:N]" for name in KINDS if name != CPU]
        require(
            kind in KINDS and (not colon or (kind != CPU and re.fullmatch("[0-9]{1,3}", index) is not None)),
            f"device {text!r} is not known; give {CPU}, {' or '.join(numbered)}, as in cuda:1",
        )
        return cls(cast(DeviceKind, kind), int(index or 0))

    @property
    def on_host(self) -> bool:
        """Whether its memory is that of the process."""
        return self.kind == CPU

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind
