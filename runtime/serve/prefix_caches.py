"""K/V caches of past conversations, found by what they hold: a client sends everything and pays for what is new."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from owl2.runtime.kv_cache import Key, KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.serve.disk_caches import DiskCaches

WORTH = 16
"""Positions in common from which on a cache is worth to be looked for."""
MOSTLY = 0.75
"""Share of a cache's positions from which on it is taken itself, and not a copy of its beginning."""


class PrefixCaches:
    """Caches that no answer is using, the most recently used last; any thread may call."""

    def __init__(self, model: Loaded, budget: int, disk: DiskCaches | None = None) -> None:
        """Keep caches of ``model`` that take ``budget`` bytes at most; others go to ``disk``, if there is one."""
        self._model, self._budget, self._disk = model, budget, disk
        self._idle: list[KvCache] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of the caches that wait."""
        with self._lock:
            return sum(cache.nbytes for cache in self._idle)

    def take(self, keys: Sequence[Key]) -> KvCache:
        """A cache with as much of a prompt's beginning as one holds, and nobody else's until :meth:`give_back`."""
        with self._lock:
            shared, best = max(
                ((cache.shared_prefix(keys), cache) for cache in self._idle),
                key=lambda pair: pair[0],
                default=(0, None),
            )
            if self._disk is not None and self._disk.shared(keys) >= shared + WORTH:
                loaded = self._disk.take(keys)
                if loaded is not None:
                    return loaded
            if best is None or shared < WORTH:
                return self._model.new_cache()
            if shared >= MOSTLY * best.length:
                self._idle.remove(best)
                return best
            # Most of it belongs to another conversation, which may go on.
            copy = self._model.new_cache()
            best.copy_to(copy)
            self._idle.remove(best)
            self._idle.append(best)
            return copy

    def give_back(self, cache: KvCache) -> None:
        """Keep a cache for a later prompt; those that were not used for longest go where there is no room."""
        with self._lock:
            if cache.length:
                self._idle.append(cache)
            while self._idle and sum(one.nbytes for one in self._idle) > self._budget:
                self._leave(self._idle.pop(0))

    def close(self) -> None:
        """Forget all, on the disk if there is one."""
        with self._lock:
            while self._idle:
                self._leave(self._idle.pop(0))

    def _leave(self, cache: KvCache) -> None:
        if self._disk is not None and cache.length >= WORTH:
            self._disk.put(cache)
        cache.clear()
