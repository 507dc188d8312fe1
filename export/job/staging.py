"""A folder that appears whole or not at all, and the files that an interrupted export leaves for the next one.

Everything is in one hidden folder next to the target until it is complete::

    .NAME.partial/
        made-by-owl2-export    its mark
        lock       held while an export runs; names its process
        bundle/    the files
        journal/   what is finished, see owl2.export.job.journal
        replaced/  the former bundle, for the moment between two renames

A folder of this name without the mark, or with anything else in it, is somebody else's: it is refused and left as it
is. What is removed is removed name by name (:mod:`owl2.export.job.contents`).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from owl2.export.job.contents import (
    LISTS,
    LOCK,
    MARK,
    Known,
    foreign,
    in_work,
    is_marked,
    mark,
    of_exported,
    of_locking,
    remove,
)
from owl2.export.job.disk import write_text
from owl2.runtime.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ExportError,
    Owl2Warning,
    ParityError,
    QuantizationError,
)
from owl2.runtime.foreign import ForeignError, listed, reason
from owl2.runtime.stored import sync

# The same command would meet these again: what led to them is not worth keeping.
LASTING_ERRORS = (CalibrationError, CheckpointError, ConfigError, ParityError, QuantizationError)
LOCK_SECONDS = 0.5  # a process that is just ending removes its lock
ATTEMPTS = 10  # where such processes remove the hidden folder at the same moment


class Staging:
    """Collects files next to the target under a hidden name; :meth:`publish` renames them into place.

    Left without publishing, everything is removed, unless :attr:`kept` is set and the export ended for a reason that
    may be gone next time (Ctrl-C, a full disk, a kill). One process at a time writes to a target.

    Attributes:
        work: the hidden folder.
        folder, journal: its parts ``bundle`` and ``journal``.
        kept: says what is finished, once the next export can continue there if this one is interrupted; empty before.
    """

    def __init__(
        self,
        target: Path,
        *,
        source: Path | None = None,
        overwrite: bool,
        contents: Callable[[Path], Known] = of_exported,
    ) -> None:
        """Check the target and the hidden folder; nothing is written, made or removed yet.

        Only a bundle that a kill left aside, between the two renames of a publication, is put back.

        Args:
            target: folder to write.
            source: folder that must not be the target.
            overwrite: replace what is there.
            contents: tells what an export wrote in an existing target; raises ForeignError if it wrote none of it.

        Raises:
            ExportError: the target exists and may not be replaced, the hidden folder is not an export's, or another
                process is writing to it.
        """
        self.target = target = Path(os.path.realpath(target))
        if source is not None and target == Path(os.path.realpath(source)):
            raise ExportError(f"{target} is the checkpoint itself; choose another folder")
        self.work = target.parent / f".{target.name}.partial"
        self.folder, self.journal = self.work / "bundle", self.work / "journal"
        self._replaced = self.work / "replaced"
        self._lock = FileLock(self.work / LOCK, timeout=LOCK_SECONDS)
        self._contents, self._overwrite = contents, overwrite
        self.kept = ""
        with _writing(target):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                if os.path.lexists(self.work):
                    self._look_at_work()
            if os.path.lexists(target):
                self._check_target()

    def __enter__(self) -> Staging:
        self._acquire()
        try:
            with _writing(self.target):
                self._check_work()
                if not self.folder.exists():  # a kill came right after a publication
                    self._remove_parts()
                self._make_folders()
        except BaseException:
            self._lock.release()
            raise
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
        self._remove_parts()
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

    def publish(self, entry: tuple[str, Path] | None = None) -> None:
        """Put the files in the target's place; if that fails, everything is as before.

        ``entry`` names one of them and where it is renamed to in the end: the files count once it is there.
        """
        for path in (*self.folder.iterdir(), self.folder):
            sync(path)
        if os.path.lexists(self.target):
            self._check_target()  # it may have changed since
        try:
            if self.target.exists():
                self.target.rename(self._replaced)
            self.folder.rename(self.target)
            if entry is not None:
                (self.target / entry[0]).rename(entry[1])
        except BaseException:  # an interrupt may come right after each of these renames
            if entry is None or self.folder.exists() or (self.target / entry[0]).exists():
                if not self.folder.exists():
                    self.target.rename(self.folder)
                self._put_back()
            raise
        self.kept = ""
        sync(self.target.parent)

    def _check_target(self) -> None:
        target = self.target
        if target.is_symlink() or not target.is_dir():
            raise ExportError(f"{target} exists and is not a bundle; it is left alone: choose another folder")
        if not any(target.iterdir()):
            return
        try:
            known = self._contents(target)
        except (ForeignError, OSError) as error:
            raise ExportError(
                f"{target} exists and is not a bundle; it is left alone: choose another folder ({reason(error)})"
            ) from error
        if not self._overwrite:
            done = self.work.exists() and not self.folder.exists()  # a kill came right after its publication
            raise ExportError(
                f"{target} exists; give --overwrite to replace it or choose another folder"
                f"{f'. It is complete: {self.work} can be deleted' if done else ''}"
            )
        if others := foreign(target, known):
            raise ExportError(
                f"{target} holds {listed(others)}, which no export wrote and which would be lost; move it away, or "
                "choose another folder"
            )

    def _look_at_work(self) -> None:
        self._check_mark()
        if os.path.lexists(self.work / LOCK):
            self._lock_or_refuse()
        try:
            self._check_work()
        finally:
            self._lock.release()

    def _check_mark(self) -> None:
        """Raise ExportError for a hidden folder that no export has made."""
        linked = self.work.is_symlink()
        if linked or not self.work.is_dir() or not is_marked(self.work):
            raise ExportError(
                f"{self.work} {'is a link' if linked else 'was not made by owl2-export'} and is left alone; an export "
                f"to {self.target} keeps its unfinished files under this name: move it away, or choose another folder"
            )

    def _check_work(self) -> None:
        """Put back what a kill left aside; raise ExportError for anything in the hidden folder that is not known."""
        self._put_back()
        if self._replaced.is_dir() and not self._replaced.is_symlink() and self.folder.exists():
            raise ExportError(
                f"{self._replaced} was {self.target} until an interrupted export began to replace it, and "
                "something else is there now; move one of them away"
            )
        replaced = self._known_replaced()
        if others := foreign(self.work, lambda name: in_work(name) or replaced(name.removeprefix("replaced/"))):
            raise ExportError(
                f"{self.work} holds {listed(others)}, which no export wrote and which would be lost; move it away"
            )

    def _put_back(self) -> None:
        """Put the former bundle back where nothing has taken its place."""
        if self._replaced.is_dir() and not self._replaced.is_symlink() and not os.path.lexists(self.target):
            self._replaced.rename(self.target)

    def _known_replaced(self) -> Known:
        """What is known in ``replaced``; while it is removed, the files that list the others go last."""
        try:
            known = self._contents(self._replaced)
        except (ForeignError, OSError):
            return LISTS.__contains__
        return lambda name: known(name) or name in LISTS

    def _make_folders(self) -> None:
        for folder in (self.folder, self.journal):
            folder.mkdir(exist_ok=True)

    def _remove_parts(self) -> None:
        self._put_back()
        for folder in (self.journal, self.folder):
            remove(folder, in_work, f"{folder.name}/")
        remove(self._replaced, self._known_replaced())

    def _remove(self) -> None:
        """Remove the hidden folder; the lock goes last, since it holds off others."""
        self._remove_parts()
        with contextlib.suppress(OSError):
            if others := foreign(self.work, of_locking):
                warnings.warn(
                    f"{self.work} stays, since it holds {listed(others)}; move what is yours away, and delete the rest",
                    Owl2Warning,
                    stacklevel=2,
                )
                return
            (self.work / MARK).unlink()
            # Not the mark again: it may be that of an export that has just come.
            remove(self.work, lambda name: name != MARK and of_locking(name))

    def _acquire(self, attempts: int = ATTEMPTS) -> None:
        try:
            with _writing(self.target):
                self._make_work()
                self._lock_or_refuse()
                write_text(self.work / LOCK, str(os.getpid()))
        except ExportError as error:
            self._lock.release()
            if attempts == 1 or not isinstance(error.__cause__, FileNotFoundError):
                raise
            self._acquire(attempts - 1)  # another process has just removed the folder

    def _make_work(self) -> None:
        try:
            self.work.mkdir(parents=True)
        except FileExistsError:
            self._check_mark()
        mark(self.work)

    def _lock_or_refuse(self) -> None:
        path = self.work / LOCK
        try:
            self._lock.acquire()
        except Timeout as error:
            holder = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "which just ended"
            raise ExportError(
                f"another owl2-export (process {holder}) is writing to {self.target}; wait for it, or choose "
                "another folder"
            ) from error


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn errors of the system into those of an export to ``target``."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write to {target.parent}: {error.strerror or error}") from error
