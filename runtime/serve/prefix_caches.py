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
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of the caches that wait."""
        return self._nbytes

    def take(self, keys: Sequence[Key]) -> KvCache:
        """A cache with as much of a prompt's beginning as one holds, and nobody else's until :meth:`give_back`."""
        with self._lock:
            shared = max((cache.shared_prefix(keys) for cache in self._idle), default=0)
        if self._disk is not None and self._disk.shared(keys) >= shared + WORTH:
            loaded = self._disk.take(keys, MOSTLY)
            if loaded is not None:
                return loaded
        with self._lock:
            best = max(self._idle, key=lambda cache: cache.shared_prefix(keys), default=None)
            if best is None or best.shared_prefix(keys) < WORTH:
                return self._model.new_cache()
            self._idle.remove(best)
            if best.shared_prefix(keys) < MOSTLY * best.length:
                # Most of it belongs to another conversation, which may go on.
                copy = self._model.new_cache()
                best.copy_to(copy)
                self._idle.append(best)
                best = copy
            self._count()
            return best

    def give_back(self, cache: KvCache) -> None:
        """Keep a cache for a later prompt; those that were not used for longest go where there is no room."""
        leaving: list[KvCache] = []
        with self._lock:
            if cache.length:
                self._idle.append(cache)
            self._count()
            while self._idle and self._nbytes > self._budget:
                leaving.append(self._idle.pop(0))
                self._count()
        self._leave(leaving)

    def close(self) -> None:
        """Forget all, on the disk if there is one."""
        with self._lock:
            leaving, self._idle = self._idle, []
            self._count()
        self._leave(leaving)

    def _count(self) -> None:
        self._nbytes = sum(cache.nbytes for cache in self._idle)

    def _leave(self, caches: Sequence[KvCache]) -> None:
        for cache in caches:
            if self._disk is not None and cache.length >= WORTH:
                self._disk.put(cache)
            cache.clear()
