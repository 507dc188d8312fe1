"""The seam between the runtime and its backends."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.config import require
from owl2.runtime.errors import BackendError
from owl2.runtime.foreign import shorten
from owl2.runtime.placement import HOST, Placement
from owl2.runtime.spec import KvType

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BackendName = Literal["native", "onnxruntime"]
"""What can run a bundle on the CPU."""
MAX_THREADS_PER_CORE = 4
PREFILL_BLOCK = 256
"""New positions of a prefill step, where a backend has no reason for another number."""
CLOSED = "this model was closed; load the bundle again"
"""Message of the BackendError that every call raises after :meth:`Engine.close`."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings with which a backend opens a bundle.

    Attributes:
        device: where it runs.
        threads: of one operator on the CPU; None lets the backend choose.
        kv_cache: type of the K/V cache; None for the backend's choice.
        context: positions the user asked for; None for as many as the model allows.
        backend: on the CPU; None for the native core, or ONNX Runtime where that cannot run the bundle.
        warm: whether to open at once what the native core opens with the first image.
    """

    device: Placement = HOST
    threads: int | None = None
    kv_cache: KvType | None = None
    context: int | None = None
    backend: BackendName | None = None
    warm: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "context"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(value is None or whole, f"{name} must be a whole number, got {value!r}")
        require(self.kv_cache is None or isinstance(self.kv_cache, str), f"kv_cache {self.kv_cache!r} is not a type")
        known = get_args(BackendName)
        require(
            self.backend is None or self.backend in known,
            f"backend {shorten(self.backend)} is not known; known: {', '.join(known)}",
        )
        require(self.backend is None or self.device.on_host, f"backend {self.backend} is for the CPU; leave it out")


class KvBuffers(Protocol):
    """Preallocated keys and values of all layers; only the engine that made them looks inside."""

    @property
    def capacity(self) -> int:
        """Positions they hold."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory they take."""


@dataclass(frozen=True)
class SequenceRows:
    """New rows of one sequence.

    Attributes:
        embeds: float32 [T, C].
        modality: [T], 1 at image rows.
        past: positions already in ``buffers``.
        buffers: written in place; must hold past + T positions.
    """

    embeds: Floats
    modality: Ints
    past: int
    buffers: KvBuffers


@dataclass(frozen=True)
class KvContent:
    """Keys and values outside of their buffers.

    Attributes:
        form: what only buffers of the same form can hold: the type of the K/V cache, and more where that does not say
            all.
        positions: P.
        parts: bytes of arrays [layers, heads, P, ...] by name.
    """

    form: str
    positions: int
    parts: Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class KvTransfer:
    """How keys and values leave an engine's buffers and return.

    Attributes:
        form: of the :class:`KvContent` that is read, and the only one that may be written.
        read: keys and values of the first positions.
        write: buffers with room for so many positions that begin with the content; raises ValueError if it has not the
            shape of the model's.
    """

    form: str
    read: Callable[[KvBuffers, int], KvContent]
    write: Callable[[KvContent, int], KvBuffers]


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no machine like this one can use.

    Raises:
        ConfigError: with the most that it can.
    """
    maximum = MAX_THREADS_PER_CORE * (os.cpu_count() or 1)
    require(threads is None or threads > 0, f"threads must be positive, got {threads}")
    require(
        threads is None or threads <= maximum,
        f"threads {threads} is more than this machine can use; give at most {maximum}",
    )


Buffers = TypeVar("Buffers", bound=KvBuffers)


def own(buffers: KvBuffers, expected: type[Buffers], total: int = 0) -> Buffers:
    """The buffers as those of the engine that made them.

    Args:
        buffers: given by a caller.
        expected: class of the engine's buffers.
        total: positions that they must hold.

    Raises:
        BackendError: another backend made them.
        ConfigError: they are too small.
    """
    if not isinstance(buffers, expected):
        raise BackendError(f"these K/V buffers belong to another backend: {type(buffers).__name__}")
    require(total <= buffers.capacity, f"{total} positions do not fit K/V buffers of {buffers.capacity}")
    return buffers


class DecoderEngine(Protocol):
    """Runs the decoder graph. Arrays in, arrays out, the K/V buffers explicit.

    A step writes keys and values of positions past..past+T-1 into the buffers, in place, and never touches earlier
    positions: a failed step leaves what was cached before it intact. A cancelled step raises
    :class:`owl2.runtime.cancellation.StoppedError`, before it runs or within a second.
    """

    def allocate(self, capacity: int, previous: KvBuffers | None) -> KvBuffers:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``."""

    @property
    def kv_transfer(self) -> KvTransfer | None:
        """How keys and values leave the buffers and return; None if they cannot."""

    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        """Run T mixed positions after ``past`` cached ones.

        Args:
            embeds: [T, C].
            modality: [T], 1 at image rows.
            past: positions already in ``buffers``.
            buffers: written in place; must hold past + T positions.
            logit_rows: [R], which of the T positions' logits are wanted; R >= 1.
            cancellation: stops the step.

        Returns:
            Logits [R, V].
        """

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""


class SteppingEngine(Protocol):
    """Runs new rows of several sequences in one step."""

    def step(self, sequences: Sequence[SequenceRows], logit_rows: Ints, cancellation: Cancellation = NEVER) -> Floats:
        """Run them; the results of each sequence are what it would get alone, bit for bit.

        Args:
            sequences: with different buffers.
            logit_rows: [R], which of all rows' logits are wanted, counted over the sequences; R >= 1.
            cancellation: stops the step.

        Returns:
            Logits [R, V].
        """


class Engine(DecoderEngine, Protocol):
    """Runs both graphs of a bundle."""

    @property
    def stepping(self) -> SteppingEngine | None:
        """The same engine, where its steps may hold rows of several sequences."""

    @property
    def context(self) -> int | None:
        """Most positions of a conversation; None where only the model limits them."""

    @property
    def block(self) -> int:
        """New positions of a prefill step, at most, unless a prompt cannot be divided."""

    @property
    def rows_are_independent(self) -> bool:
        """Whether the logits of a row are the same bits whatever other rows its step has."""

    def encode_images(self, pixels: Floats, cancellation: Cancellation = NEVER) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""

    def close(self) -> None:
        """Give all memory back except K/V buffers, which go with their owners; later calls raise BackendError."""
