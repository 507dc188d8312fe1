"""The model of a server: loaded when it is needed, given back when nobody has asked for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from owl2.runtime.engine import CLOSED
from owl2.runtime.errors import BackendError
from owl2.runtime.images import ImageEncoder
from owl2.runtime.load import Loaded
from owl2.runtime.serve.disk_caches import DiskCaches
from owl2.runtime.serve.prefix_caches import PrefixCaches
from owl2.runtime.serve.shared_engine import SharedEngine


@dataclass(frozen=True)
class Resident:
    """A loaded model that many conversations share.

    Attributes:
        model: whose engine is shared.
        engine: the same.
        caches: of past conversations.
    """

    model: Loaded
    engine: SharedEngine
    caches: PrefixCaches


class Residence:
    """Loads and unloads the model; any thread may call."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        cache_bytes: int,
        idle_seconds: float | None = None,
        disk: tuple[Path, int] | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            load: loads the model.
            cache_bytes: for the caches of past conversations.
            idle_seconds: without a request, after which the memory is given back; None for never.
            disk: folder for caches that have no room, and the bytes that they may take there.
        """
        self._load, self._cache_bytes, self._idle_seconds, self._disk = load, cache_bytes, idle_seconds, disk
        self._resident: Resident | None = None
        self._loading = threading.Lock()
        self._state = threading.Lock()
        self._users = 0
        self._closed = False
        self._used = time.monotonic()

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._resident is not None

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches of past conversations."""
        resident = self._resident
        return 0 if resident is None else resident.caches.nbytes

    @contextmanager
    def use(self) -> Iterator[Resident]:
        """The model, loaded if it is not, and kept meanwhile; raises what loading raises."""
        with self._loading:
            if self._resident is None:
                self._resident = self._open()
            resident = self._resident
            with self._state:
                self._users += 1
        try:
            yield resident
        finally:
            with self._state:
                self._users -= 1
                self._used = time.monotonic()

    def unload_if_idle(self) -> bool:
        """Give the memory back if nobody has used the model for long enough; returns whether it was."""
        with self._loading, self._state:
            idle = self._idle_seconds is not None and time.monotonic() - self._used >= self._idle_seconds
            if not idle or self._users or self._resident is None:
                return False
            self._close()
            return True

    def close(self) -> None:
        """Give the memory back for good; answers that are being generated end with an error."""
        with self._loading, self._state:
            self._closed = True
            self._close()

    def _open(self) -> Resident:
        if self._closed:
            raise BackendError(CLOSED)
        model = self._load()
        engine = SharedEngine(model.engine)
        shared = replace(model, engine=engine, encoder=ImageEncoder(engine))
        try:
            disk = None if self._disk is None else DiskCaches(*self._disk, shared)
        except BaseException:
            shared.close()
            raise
        return Resident(shared, engine, PrefixCaches(shared, self._cache_bytes, disk))

    def _close(self) -> None:
        resident, self._resident = self._resident, None
        if resident is not None:
            try:
                resident.caches.close()
            finally:
                resident.model.close()
