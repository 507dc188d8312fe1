"""The KV cache: which positions the buffers hold, what a new prompt shares with them, and who may write to them."""

from __future__ import annotations

from collections.abc import Sequence

from owl2.runtime.config import require
from owl2.runtime.engine import Engine, KvBuffers, KvContent, KvTransfer
from owl2.runtime.errors import BackendError, ContextOverflowError, Owl2Error

Key = int | tuple[str, int]
"""Content of a position: a token id, or a row of an image as (digest of its pixels, row)."""

GROWTH = 256


def common_prefix(held: Sequence[Key], wanted: Sequence[Key]) -> int:
    """Number of positions in which two sequences begin alike."""
    pairs = enumerate(zip(held, wanted))
    return next((index for index, (one, other) in pairs if one != other), min(len(held), len(wanted)))


class KvCache:
    """Keys and values of one conversation, kept across steps and turns.

    The buffers grow in steps up to the context. Only the newest :class:`Claim` may write to them.
    """

    def __init__(self, engine: Engine, context: int, growth: int = GROWTH) -> None:
        """An empty cache of at most ``context`` positions, in buffers that the engine allocates.

        ``growth`` is the step in which they grow.
        """
        require(context > 0, f"context must be positive, got {context}")
        self.context = context
        self._growth = growth
        self._engine = engine
        self._claims = 0
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
        return common_prefix(self._keys, keys)

    @property
    def keys(self) -> Sequence[Key]:
        """What the positions hold."""
        return tuple(self._keys)

    def content(self, positions: int) -> KvContent:
        """Keys and values of the first positions, of at least one.

        Raises:
            BackendError: the device cannot give them.
        """
        require(0 < positions <= self.length, f"the cache holds {self.length} positions, not {positions}")
        return self._transfer().read(self._reserve(0), positions)

    def restore(self, keys: Sequence[Key], content: KvContent, longest: int) -> None:
        """Fill this cache, which is empty, with what another one held.

        Args:
            keys: what its positions are.
            content: their keys and values.
            longest: of the other cache.

        Raises:
            BackendError: the device cannot take them, or they are in another form.
            ValueError: they have not the shape of this model's.
        """
        transfer = self._transfer()
        if content.form != transfer.form:
            raise BackendError(
                f"keys and values in {content.form} cannot be loaded into a K/V cache in {transfer.form}"
            )
        self._buffers = transfer.write(content, self._room_for(len(keys) + 1))
        self._keys, self.longest = list(keys), longest

    def claim(self) -> Claim:
        """The right to write, which all earlier claims lose."""
        self._claims += 1
        return Claim(self, self._claims)

    def copy_to(self, other: KvCache) -> None:
        """Copy the content into ``other``, an empty cache of the same engine."""
        if self._buffers is not None:
            other._buffers = self._engine.allocate(self._buffers.capacity, self._buffers)
        other._keys, other.longest = list(self._keys), self.longest

    def clear(self) -> None:
        """Forget everything and release the buffers."""
        self._truncate(0)
        self._buffers = None

    def _reserve(self, count: int) -> KvBuffers:
        needed = self.length + count
        if needed > self.context:
            raise ContextOverflowError(
                self.length,
                count,
                self.context,
                "shorten the prompt, start a new chat or, where the model allows it, load with a larger context",
            )
        if self._buffers is None or self._buffers.capacity < needed:
            self._buffers = self._engine.allocate(self._room_for(needed), self._buffers)
        return self._buffers

    def _room_for(self, positions: int) -> int:
        """Capacity of buffers for at least so many positions, or for the whole context."""
        return min(self.context, -(-positions // self._growth) * self._growth)

    def _transfer(self) -> KvTransfer:
        transfer = self._engine.kv_transfer
        if transfer is None:
            raise BackendError("keys and values cannot be saved or loaded on this device; save the messages alone")
        return transfer

    def _commit(self, keys: Sequence[Key]) -> None:
        self.longest = max(self.longest, self.length + len(keys))  # first: it may be too large, but not too small
        self._keys.extend(keys)

    def _truncate(self, length: int) -> None:
        del self._keys[length:]
        if not self._keys:
            self.longest = 0


class Claim:
    """The right of one generation to write to a KV cache, until there is a newer one.

    Positions beyond the cache's length are scratch: a step writes there first and :meth:`commit` makes them part of the
    cache, so a failed or cancelled step changes nothing. Every method raises Owl2Error once the claim is lost.

    Attributes:
        cache: that it is for.
    """

    def __init__(self, cache: KvCache, number: int) -> None:
        """Claim number ``number``, from 1, on ``cache``; :meth:`KvCache.claim` makes it."""
        self.cache = cache
        self._number = number

    @property
    def counts(self) -> bool:
        """Whether it is the newest."""
        return self.cache._claims == self._number

    def check(self) -> None:
        """Raise Owl2Error if the claim is lost."""
        if not self.counts:
            raise Owl2Error("this answer can no longer be generated: its chat went on without it; ask again")

    def reserve(self, count: int) -> KvBuffers:
        """Buffers with room for ``count`` more positions.

        Raises:
            ContextOverflowError: they would not fit the context.
        """
        self.check()
        return self.cache._reserve(count)

    def commit(self, keys: Sequence[Key]) -> None:
        """Declare that the positions after the cache's length now hold ``keys``."""
        self.check()
        self.cache._commit(keys)

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        self.check()
        self.cache._truncate(length)
