"""A folder that appears whole or not at all, and what an interrupted export leaves for the next one.

Everything lies in one hidden folder beside the target until it is complete::

    .NAME.partial/
        lock       held while an export runs; names its process
        bundle/    the files
        journal/   what is finished, see owl2.export.job.journal
        replaced/  the former bundle, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from owl2.runtime import spec
from owl2.runtime.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ExportError,
    ParityError,
    QuantizationError,
)

# A file that tells what was written here from what users have of their own.
WRITTEN = ((spec.MANIFEST,), ("quantize_config.json", spec.REPORT))
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same command would meet these again: what led to them is not worth keeping.
LASTING = (CalibrationError, CheckpointError, ConfigError, ParityError, QuantizationError)
LOCK = "lock"
LOCK_ATTEMPTS = 10


class Staging:
    """Collects files beside the target under a hidden name; :meth:`publish` renames them into place.

    Left without publishing, everything is removed, unless :meth:`keep` was called and what ended the export does
    not lie in the export itself (Ctrl-C, a full disk, a kill). One process at a time writes to a target.

    Attributes:
        target: the bundle's folder.
        folder: where the files go until then.
        journal: where notes on them go that are not part of the bundle.
    """

    def __init__(self, target: Path, *, source: Path | None = None, overwrite: bool) -> None:
        """Check the target; nothing is written yet, but what a kill left half done is put right.

        Args:
            target: folder to write.
            source: what it is made from, which is never replaced.
            overwrite: whether a bundle that is there may be replaced.

        Raises:
            ExportError: the target exists and may not be replaced, or another process is writing to it.
        """
        self.target = target = Path(os.path.realpath(target))
        if source is not None and target == Path(os.path.realpath(source)):
            raise ExportError(f"{target} is the checkpoint itself; choose another folder")
        if target.exists() and not _replaceable(target):
            raise ExportError(f"{target} exists and is no bundle; it is left alone: choose another folder")
        self.work = target.with_name(f".{target.name}.partial")
        self.folder, self.journal = self.work / "bundle", self.work / "journal"
        self._replaced = self.work / "replaced"
        self._lock: int | None = None
        self._kept = ""
        if self.work.exists():
            with self._locked():
                self._recover()
        if not overwrite and target.exists() and any(target.iterdir()):
            raise ExportError(f"{target} exists; give --overwrite to replace it or choose another folder")

    def __enter__(self) -> Staging:
        self._acquire()
        try:
            self._make_folders()
        except OSError as error:
            self._release()
            raise _unwritable(self.target, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, LASTING):
                self._kept = ""
            if not self._kept:
                self._remove()
        finally:
            self._release()

    def keep(self, what: str) -> None:
        """From now on an interrupted export leaves its files to the next one; ``what`` says what is finished."""
        self._kept = what

    def clear(self) -> None:
        """Begin with empty folders."""
        self._kept = ""
        for folder in (self.journal, self.folder):
            shutil.rmtree(folder, ignore_errors=True)
        self._make_folders()

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted export has left something to continue."""
        return self.journal.is_dir() and any(self.journal.iterdir())

    @property
    def used(self) -> int:
        """Bytes that lie here."""
        return sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())

    @property
    def left(self) -> str:
        """What an export that ends now leaves behind, as a sentence without its full stop."""
        if not self._kept:
            return "Nothing was left behind"
        return (
            f"{self._kept} are kept in {self.work} ({self.used / 1e6:.0f} MB): the same command continues there, "
            "with --fresh it starts over"
        )

    @property
    def kept(self) -> bool:
        """Whether an export that is interrupted now leaves something to continue."""
        return bool(self._kept)

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
        self._kept = ""
        sync(self.target.parent)

    def _make_folders(self) -> None:
        for folder in (self.folder, self.journal):
            folder.mkdir(exist_ok=True)

    def _recover(self) -> None:
        """Finish what a kill interrupted: put back a bundle that was to be replaced, remove what is published."""
        if self._replaced.exists() and not self.target.exists():
            self._replaced.rename(self.target)
        if not self.folder.exists():
            self._remove()

    def _remove(self) -> None:
        """Remove the hidden folder; the lock goes last, since it holds off others."""
        for path in self.work.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.work / LOCK).unlink()
            self.work.rmdir()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def _acquire(self) -> None:
        """Lock the hidden folder, which is made where it is missing.

        Raises:
            ExportError: another process holds it, or the folder cannot be written to.
        """
        failure: OSError = FileNotFoundError(errno.ENOENT, "its files come and go")
        for _ in range(LOCK_ATTEMPTS):
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:  # or the process that had it has just removed it
                failure = error
                continue
            if self._take(handle):
                return
            os.close(handle)
        raise _unwritable(self.target, failure) from failure

    def _take(self, handle: int) -> bool:
        """Lock the open file ``handle``; False where it is no longer the one in the folder."""
        path = self.work / LOCK
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 20).decode(errors="replace")
            os.close(handle)
            raise ExportError(
                f"another owl2-export (process {holder}) is writing to {self.target}; wait for it, or choose "
                "another folder"
            ) from error
        except OSError as error:
            os.close(handle)
            raise _unwritable(self.target, error) from error
        if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
            return False
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._lock = handle
        return True

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of names, before anything that relies on it is written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replaceable(target: Path) -> bool:
    """Whether it is an empty folder or one that was written here: a bundle, or a checkpoint with a report."""
    if not target.is_dir():
        return False
    written = any(all((target / name).is_file() for name in names) for names in WRITTEN)
    return written or not any(target.iterdir())


def _unwritable(target: Path, error: OSError) -> ExportError:
    return ExportError(f"cannot write to {target.parent}: {error.strerror or error}")


@contextlib.contextmanager
def disk_errors(staging: Staging, needed: int) -> Iterator[None]:
    """Turn a full disk into an error that says how much is needed and what was kept; goes around ``staging``.

    Raises:
        ExportError: writing failed for lack of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ExportError(_no_space(staging, needed)) from error


def check_space(staging: Staging, needed: int) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        ExportError: less than ``needed`` bytes, minus those that lie there already, are free.
    """
    if shutil.disk_usage(staging.target.parent).free < needed - staging.used:
        raise ExportError(_no_space(staging, needed))


def _no_space(staging: Staging, needed: int) -> str:
    free = shutil.disk_usage(staging.target.parent).free
    return (
        f"not enough space in {staging.target.parent}: the export takes about {needed / 1e6:.0f} MB, "
        f"{free / 1e6:.0f} MB are free; make room or write to another disk. {staging.left}"
    )


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
