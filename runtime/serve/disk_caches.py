"""Caches of past conversations on the disk: those that have no room in memory, and all while the model is unloaded."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from owl2.runtime.families.mplug_owl2.positions import digests_of
from owl2.runtime.foreign import ForeignError
from owl2.runtime.kv_cache import Key, KvCache, common_prefix
from owl2.runtime.load import Loaded
from owl2.runtime.saved_cache import named_keys, restore_cache, stored_cache
from owl2.runtime.stored import Stored, partial_of, read_array, read_stored, write_stored

KIND = "cache"
FINGERPRINT = 16
"""Digits of a bundle's fingerprint in the name of its folder."""
PATTERN = "*.owl2cache"
LOG = logging.getLogger("owl2.serve")


@dataclass(frozen=True)
class OnDisk:
    """A cache in a file.

    Attributes:
        path: of the file.
        keys: that it holds.
        nbytes: of the file.
        written: when.
    """

    path: Path
    keys: Sequence[Key]
    nbytes: int
    written: float


class DiskCaches:
    """A folder of caches, the most recently used last; any thread may call."""

    def __init__(self, folder: Path, budget: int, model: Loaded) -> None:
        """Find what a server has left for this bundle; what is damaged is deleted.

        Args:
            folder: has a folder of its own for each bundle, which is made if it is missing.
            budget: bytes.
            model: of the caches.
        """
        folder /= model.fingerprint[:FINGERPRINT]
        self._folder, self._budget, self._model = folder, budget, model
        self._lock = threading.Lock()
        self._held: list[OnDisk] = []
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.glob(partial_of(PATTERN)):  # of a server that was killed
            path.unlink(missing_ok=True)
        for path in sorted(folder.glob(PATTERN)):
            self._find(path)
        self._held.sort(key=lambda held: held.written)

    def shared(self, keys: Sequence[Key]) -> int:
        """Most positions that one of them shares with the beginning of a prompt."""
        with self._lock:
            return max((common_prefix(held.keys, keys) for held in self._held), default=0)

    def take(self, keys: Sequence[Key], mostly: float) -> KvCache | None:
        """Load the one that shares most with a prompt; None if it cannot be read, and is deleted.

        Its file goes too where most of it is shared; otherwise it belongs to another conversation, which may go on.
        """
        with self._lock:
            held = max(self._held, key=lambda held: common_prefix(held.keys, keys), default=None)
            if held is None:
                return None
            self._held.remove(held)
            cache = self._model.new_cache()
            try:
                stored = read_stored(held.path, KIND)
                restore_cache(stored, list(stored.description["images"]), self._model, cache)
            except Exception as error:  # whatever a file may hold
                LOG.warning("%s is deleted: %s", held.path, error)
                held.path.unlink(missing_ok=True)
                return None
            if common_prefix(held.keys, keys) >= mostly * len(held.keys):
                held.path.unlink(missing_ok=True)
            else:
                self._held.append(held)
            return cache

    def put(self, cache: KvCache) -> None:
        """Write a cache; the least recently used files go where there is no room."""
        keys = cache.keys
        digests = digests_of(keys)
        state, arrays = stored_cache(self._model, cache, {digest: number for number, digest in enumerate(digests)})
        if state is None or sum(array.nbytes for array in arrays.values()) > self._budget:
            return
        path = self._folder / f"{secrets.token_hex(8)}{PATTERN[1:]}"
        description = {"bundle": self._model.fingerprint, "cache": state, "images": digests}
        try:
            write_stored(path, KIND, Stored(description, arrays))
        except OSError as error:
            LOG.warning("a conversation's cache cannot be kept on the disk: %s", error)
            return
        with self._lock:
            self._held.append(OnDisk(path, keys, path.stat().st_size, time.time()))
            while sum(held.nbytes for held in self._held) > self._budget:
                self._held.pop(0).path.unlink(missing_ok=True)

    def _find(self, path: Path) -> None:
        try:
            description, keys = read_array(path, KIND, "keys")
            if description["bundle"] != self._model.fingerprint:
                raise ForeignError("it is of another bundle")
            status = path.stat()
            named = named_keys(keys, description["images"])
            self._held.append(OnDisk(path, named, status.st_size, status.st_mtime))
        except Exception as error:  # whatever a file may hold
            LOG.warning("%s is deleted: %s", path, error)
            path.unlink(missing_ok=True)
