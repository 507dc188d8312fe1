"""A file of a loaded bundle, held open so that its content can neither vanish nor change unnoticed."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from owl2.runtime.engine import CLOSED
from owl2.runtime.errors import BackendError, BundleCorruptError
from owl2.runtime.verification import HASH_BLOCK, FileEntry


class OpenFile:
    """Reads of a file at given places; several threads may read.

    A mapped file that another program truncates kills the process that reads it; a read only comes back short. And the
    system records when a file was written to: then it is hashed again before anything more is read. A file that was
    replaced by another of the same name stays what it was here.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        """Open a verified file.

        Raises:
            BundleCorruptError: it cannot be opened, or its size is not the verified one.
        """
        self._path, self._entry = path, entry
        self._lock = threading.Lock()
        try:
            self._handle: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._status = self._now()
        except OSError as error:
            raise BundleCorruptError(f"{path} cannot be read: {error.strerror or error}; copy it again") from error
        if self._status[0] != entry.size:
            raise self.changed()

    def check(self) -> None:
        """Find out whether the file is still what was verified.

        Takes about a microsecond, unless the system says that the file was touched.

        Raises:
            BundleCorruptError: it was truncated or overwritten.
            BackendError: it was closed.
        """
        now = self._now()
        if now == self._status:
            return
        if now[0] != self._entry.size or self._hash() != self._entry.sha256:
            raise self.changed()
        self._status = now

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at a place; raises as :meth:`check`."""
        handle = self._open()
        if hasattr(os, "pread"):
            content = os.pread(handle, size, offset)
        else:  # Windows
            with self._lock:
                os.lseek(handle, offset, os.SEEK_SET)
                content = os.read(handle, size)
        if len(content) != size:
            raise self.changed()
        return content

    @property
    def size(self) -> int:
        """Bytes of the verified file."""
        return self._entry.size

    @property
    def descriptor(self) -> int:
        """Of the open file; raises BackendError once it was closed."""
        return self._open()

    def close(self) -> None:
        """Give the file back; later reads raise BackendError."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _open(self) -> int:
        if self._handle is None:
            raise BackendError(CLOSED)
        return self._handle

    def _now(self) -> tuple[int, int, int]:
        status = os.fstat(self._open())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, self._entry.size, HASH_BLOCK):
            digest.update(self.read(start, min(HASH_BLOCK, self._entry.size - start)))
        return digest.hexdigest()

    def changed(self) -> BundleCorruptError:
        """What to raise where the content is not the verified one."""
        return BundleCorruptError(
            f"{self._path} was changed while the model used it, so that its answers cannot be trusted; copy or export "
            "the bundle again, then load it again"
        )
