"""A folder that appears whole or not at all, and the files that an interrupted export leaves for the next one.

Everything is in one hidden folder next to the target until it is complete::

    .NAME.partial/
        lock       held while an export runs; names its process
        bundle/    the files
        journal/   what is finished, see owl2.export.job.journal
        replaced/  the former bundle, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from owl2.runtime import spec
from owl2.runtime.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ExportError,
    ParityError,
    QuantizationError,
)

# Files that tell an export's folder from what users have of their own: those of a bundle, or of a GPTQ checkpoint.
MARKS_OF_AN_EXPORT = ((spec.MANIFEST,), ("quantize_config.json", spec.REPORT))
# The same command would meet these again: what led to them is not worth keeping.
LASTING_ERRORS = (CalibrationError, CheckpointError, ConfigError, ParityError, QuantizationError)
LOCK = "lock"
LOCK_SECONDS = 0.5  # a process that is just ending removes its lock


class Staging:
    """Collects files next to the target under a hidden name; :meth:`publish` renames them into place.

    Left without publishing, everything is removed, unless :attr:`kept` is set and the export ended for a reason that
    may be gone next time (Ctrl-C, a full disk, a kill). One process at a time writes to a target.

    Attributes:
        work: the hidden folder.
        folder, journal: its parts ``bundle`` and ``journal``.
        kept: says what is finished, once the next export can continue there if this one is interrupted; empty before.
    """

    def __init__(self, target: Path, *, source: Path | None = None, overwrite: bool) -> None:
        """Check the target; nothing is written yet, but a publication that a kill interrupted is put right.

        Raises:
            ExportError: the target exists and may not be replaced, or another process is writing to it.
        """
        self.target = target = Path(os.path.realpath(target))
        if source is not None and target == Path(os.path.realpath(source)):
            raise ExportError(f"{target} is the checkpoint itself; choose another folder")
        if target.exists() and not _replaceable(target):
            raise ExportError(f"{target} exists and is not a bundle; it is left alone: choose another folder")
        self.work = target.with_name(f".{target.name}.partial")
        self.folder, self.journal = self.work / "bundle", self.work / "journal"
        self._replaced = self.work / "replaced"
        self._lock = FileLock(self.work / LOCK, timeout=LOCK_SECONDS)
        self.kept = ""
        if self.work.exists():
            self._acquire()
            try:
                # After a kill: put back a bundle that was to be replaced, remove what is left of one just published.
                if self._replaced.exists() and not target.exists():
                    self._replaced.rename(target)
                if not self.folder.exists():
                    self._remove()
            finally:
                self._lock.release()
        if not overwrite and target.exists() and any(target.iterdir()):
            raise ExportError(f"{target} exists; give --overwrite to replace it or choose another folder")

    def __enter__(self) -> Staging:
        self._acquire()
        try:
            self._make_folders()
        except OSError as error:
            self._lock.release()
            raise _unwritable(self.target, error) from error
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, LASTING_ERRORS):
                self.kept = ""
            if not self.kept:
                self._remove()
        finally:
            self._lock.release()

    def clear(self) -> None:
        self.kept = ""
        for folder in (self.journal, self.folder):
            shutil.rmtree(folder, ignore_errors=True)
        self._make_folders()

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted export has left something to continue."""
        return self.journal.is_dir() and any(self.journal.iterdir())

    @property
    def used(self) -> int:
        return sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())

    @property
    def left(self) -> str:
        """A sentence without its full stop on the files that an export leaves behind if it ends now."""
        if not self.kept:
            return "Nothing was left behind"
        return (
            f"{self.kept} are kept in {self.work} ({self.used / 1e6:.0f} MB): the same command continues there, "
            "with --fresh it starts over"
        )

    def publish(self) -> None:
        """Put the files in the target's place."""
        for path in self.folder.iterdir():
            sync(path)
        sync(self.folder)
        if self.target.exists():
            self.target.rename(self._replaced)
            try:
                self.folder.rename(self.target)
            except BaseException:
                self._replaced.rename(self.target)
                raise
        else:
            self.folder.rename(self.target)
        self.kept = ""
        sync(self.target.parent)

    def _make_folders(self) -> None:
        for folder in (self.folder, self.journal):
            folder.mkdir(exist_ok=True)

    def _remove(self) -> None:
        """Remove the hidden folder; the lock goes last, since it holds off others."""
        for path in self.work.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.work / LOCK).unlink()
            self.work.rmdir()

    def _acquire(self, attempts: int = 3) -> None:
        path = self.work / LOCK
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            path.write_text(str(os.getpid()), encoding="ascii")
        except Timeout as error:
            holder = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "which just ended"
            raise ExportError(
                f"another owl2-export (process {holder}) is writing to {self.target}; wait for it, or choose "
                "another folder"
            ) from error
        except OSError as error:
            self._lock.release()
            if attempts > 1 and isinstance(error, FileNotFoundError):  # another process has just removed the folder
                return self._acquire(attempts - 1)
            raise _unwritable(self.target, error) from error


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk before anything that relies on it is written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replaceable(target: Path) -> bool:
    """Whether it is an empty folder or one that an export has written: a bundle, or a checkpoint with a report."""
    if not target.is_dir():
        return False
    exported = any(all((target / name).is_file() for name in names) for names in MARKS_OF_AN_EXPORT)
    return exported or not any(target.iterdir())


def _unwritable(target: Path, error: OSError) -> ExportError:
    return ExportError(f"cannot write to {target.parent}: {error.strerror or error}")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
