"""What the runtime asks of a backend."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class KvBuffers(Protocol):
    """Keys and values of all layers, preallocated; only the engine that made them looks inside."""

    @property
    def capacity(self) -> int:
        """Positions they hold."""

    @property
    def nbytes(self) -> int:
        """Memory they take."""


class DecoderEngine(Protocol):
    """Runs the decoder graph. Arrays in, arrays out, the K/V buffers explicit.

    Steps write keys and values of positions past..past+T-1 into the buffers, in place, and never touch earlier
    positions: a failed step leaves what was cached before it intact.
    """

    def allocate(self, capacity: int, previous: KvBuffers | None) -> KvBuffers:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``."""

    def prefill(self, embeds: Floats, modality: Ints, past: int, buffers: KvBuffers, logit_rows: Ints) -> Floats:
        """Run T mixed positions after ``past`` cached ones.

        Args:
            embeds: [T, C].
            modality: [T], 1 at image rows.
            past: positions already in ``buffers``.
            buffers: written in place; must hold past + T positions.
            logit_rows: [R], which of the T positions' logits are wanted.

        Returns:
            Logits [R, V].
        """

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""


class Engine(DecoderEngine, Protocol):
    """Runs both graphs."""

    def encode_images(self, pixels: Floats) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""
