"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from owl2.runtime import spec
from owl2.runtime.errors import ExportError

# A file that tells what was written here from what users have of their own.
WRITTEN = ((spec.MANIFEST,), ("quantize_config.json", spec.REPORT))
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """Collects files beside the target under a hidden name; :meth:`publish` renames them into place.

    Left without publishing (an error, Ctrl-C), everything is removed. What a killed process left behind is
    removed by the next one that writes to the same target.

    Attributes:
        folder: where the files go until then.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        """Check the target; nothing is written yet.

        Raises:
            ExportError: the target exists and may not be replaced.
        """
        self.target = target = Path(os.path.realpath(target))
        self._published = False
        if target.exists() and not _replaceable(target):
            raise ExportError(f"{target} exists and is no bundle; it is left alone: choose another folder")
        self.folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
        self._restore_replaced()
        if not overwrite and target.exists() and any(target.iterdir()):
            raise ExportError(f"{target} exists; give --overwrite to replace it or choose another folder")

    def __enter__(self) -> Staging:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.folder.mkdir()
        except OSError as error:
            raise ExportError(f"cannot write to {self.target.parent}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Put the files in the target's place."""
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if self.target.exists():
            replaced = self.target.with_name(f".{self.target.name}.{os.getpid()}.replaced")
            self.target.rename(replaced)
            try:
                self.folder.rename(self.target)
            except BaseException:
                replaced.rename(self.target)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            self.folder.rename(self.target)
        self._published = True

    def _left_behind(self, kind: str) -> list[Path]:
        """Hidden folders of processes that are gone."""
        parent, prefix, suffix = self.target.parent, f".{self.target.name}.", f".{kind}"
        names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
        pids = {name: name.removeprefix(prefix).removesuffix(suffix) for name in names if name.startswith(prefix)}
        return [
            parent / name
            for name, pid in pids.items()
            if name.endswith(suffix) and pid.isdigit() and not _alive(int(pid))
        ]

    def _restore_replaced(self) -> None:
        """Put back a bundle whose replacement was killed between the two renames."""
        for path in self._left_behind("replaced"):
            if self.target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(self.target)

    def _remove_leftovers(self) -> None:
        for path in self._left_behind("partial"):
            shutil.rmtree(path, ignore_errors=True)


def _replaceable(target: Path) -> bool:
    """Whether it is an empty folder or one that was written here: a bundle, or a checkpoint with a report."""
    if not target.is_dir():
        return False
    written = any(all((target / name).is_file() for name in names) for names in WRITTEN)
    return written or not any(target.iterdir())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


@contextlib.contextmanager
def disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turn a full disk into an error that says how much is needed.

    Raises:
        ExportError: writing failed for lack of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ExportError(_no_space(folder, needed)) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        ExportError: less than ``needed`` bytes are free where ``folder`` lies.
    """
    if shutil.disk_usage(folder.parent).free < needed:
        raise ExportError(_no_space(folder, needed))


def _no_space(folder: Path, needed: int) -> str:
    free = shutil.disk_usage(folder.parent).free
    return (
        f"not enough space in {folder.parent}: the bundle takes about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
        "free; make room or write to another disk. Nothing was left behind"
    )
