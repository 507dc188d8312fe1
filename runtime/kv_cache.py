"""The KV cache: which positions the buffers hold, and what a new prompt shares with them."""

from __future__ import annotations

from collections.abc import Sequence

from owl2.runtime.config import require
from owl2.runtime.engine import Engine, KvBuffers
from owl2.runtime.errors import ContextOverflowError

Key = int | tuple[str, int]
"""Content of a position: a token id, or a row of an image as (digest of its pixels, row)."""

GROWTH = 256


class KvCache:
    """Keys and values of one conversation, kept across steps and turns.

    The buffers grow in steps up to the context. Positions beyond :attr:`length` are scratch: a step writes
    there first and :meth:`commit` makes them part of the cache, so a failed or cancelled step changes nothing.
    """

    def __init__(self, engine: Engine, context: int) -> None:
        """An empty cache of at most ``context`` positions, in buffers that the engine allocates."""
        require(context > 0, f"context must be positive, got {context}")
        self.context = context
        self._engine = engine
        self._keys: list[Key] = []
        self.longest = 0
        """The largest length since the cache was last empty."""
        self._buffers: KvBuffers | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return 0 if self._buffers is None else self._buffers.nbytes

    @property
    def capacity(self) -> int:
        """Positions the buffers have room for; they grow up to :attr:`context`."""
        return 0 if self._buffers is None else self._buffers.capacity

    def shared_prefix(self, keys: Sequence[Key]) -> int:
        """Number of positions at the start of ``keys`` that the cache holds already."""
        pairs = zip(self._keys, keys)
        return next(
            (index for index, (held, wanted) in enumerate(pairs) if held != wanted),
            min(self.length, len(keys)),
        )

    def reserve(self, count: int) -> KvBuffers:
        """Buffers with room for ``count`` more positions.

        Raises:
            ContextOverflowError: they would not fit the context.
        """
        needed = self.length + count
        if needed > self.context:
            raise ContextOverflowError(
                self.length,
                count,
                self.context,
                "shorten the prompt, start a new chat or, where the model allows it, load with a larger context",
            )
        if self._buffers is None or self._buffers.capacity < needed:
            capacity = min(self.context, -(-needed // GROWTH) * GROWTH)
            self._buffers = self._engine.allocate(capacity, self._buffers)
        return self._buffers

    def commit(self, keys: Sequence[Key]) -> None:
        """Declare that the positions after :attr:`length` now hold ``keys``."""
        self._keys.extend(keys)
        self.longest = max(self.longest, self.length)

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        del self._keys[length:]
        if not self._keys:
            self.longest = 0

    def copy_to(self, other: KvCache) -> None:
        """Copy the content into ``other``, an empty cache of the same engine."""
        if self._buffers is not None:
            other._buffers = self._engine.allocate(self._buffers.capacity, self._buffers)
        other._keys, other.longest = list(self._keys), self.longest

    def clear(self) -> None:
        """Forget everything and release the buffers."""
        self.truncate(0)
        self._buffers = None
