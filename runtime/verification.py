"""Verifying files against their recorded size and SHA-256, and remembering which ones have been verified.

Hashing the bundle of a 7B model takes seconds to minutes. So the digest of a verified file is remembered in the user's
cache folder, together with its size, its inode, and the times of its last modification and status change. While all of
these are the same, the file is not read again. (Only a program that already has the file mapped for writing can change
it without changing these.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from owl2.runtime.config import require
from owl2.runtime.foreign import read_json, shorten

HASH_BLOCK = 1 << 22
PROGRESS_SECONDS = 0.2

OnBlock = Callable[[int], object]
Signature = list[int | str]
"""Size, device, inode, modification and status change time (ns) of a file, and its SHA-256."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
DEVICE_NAME = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
"""Names that Windows gives to devices, with any ending."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a manifest lists it: size in bytes, SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Progress of a load.

    Attributes:
        stage: ``verifying`` hashes files and counts bytes; ``loading`` counts graphs.
        done, total: of this stage.
    """

    stage: Literal["verifying", "loading"]
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.stage}: {100 * self.done / max(self.total, 1):.0f} %"


OnProgress = Callable[[LoadProgress], object]


def require_file_names(names: Iterable[str], where: str) -> None:
    """Refuse names that are not plain ones within a folder, on every system.

    Raises:
        ConfigError: naming the first.
    """
    for name in names:
        plain = FILE_NAME.fullmatch(name) and not DEVICE_NAME.fullmatch(name) and not name.endswith(".")
        require(bool(plain), f"{where}: {shorten(name)} is not a plain file name")


def verify_files(
    folder: Path, files: Mapping[str, FileEntry], *, force: bool = False, on_progress: OnProgress | None = None
) -> list[str]:
    """Compare size and hash of files with what they must be; returns one sentence per problem.

    Args:
        folder: holds the files.
        files: by name.
        force: hash files again that have not changed since they were last verified.
        on_progress: called a few times a second, from the calling thread.
    """
    remembered = {} if force else _remembered(folder)
    signatures = signatures_of(folder, files)
    changed = {
        name: entry for name, entry in files.items() if not signatures[name] or remembered.get(name) != signatures[name]
    }
    if not changed:
        return []
    total, hashed = sum(entry.size for entry in changed.values()), 0
    interrupted = threading.Event()

    def on_block(count: int) -> None:
        nonlocal hashed
        if interrupted.is_set():
            raise InterruptedError
        with lock:
            hashed += count

    lock, pool = threading.Lock(), ThreadPoolExecutor()
    checks = {name: pool.submit(check_file, folder, name, entry, on_block) for name, entry in changed.items()}
    try:
        pending = set(checks.values())
        while pending:
            pending = wait(pending, timeout=PROGRESS_SECONDS).not_done
            if on_progress is not None:
                on_progress(LoadProgress("verifying", min(hashed, total), total))
    except BaseException:  # Ctrl-C must not wait for gigabytes to be hashed
        interrupted.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    problems = {name: check.result() for name, check in checks.items()}
    _remember(folder, {name: signature for name, signature in signatures.items() if not problems.get(name)})
    return [problem for problem in problems.values() if problem]


def check_file(folder: Path, name: str, entry: FileEntry, on_block: OnBlock = int) -> str:
    """Compare size and hash of one file; returns what is wrong with it, or nothing."""
    path = folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            return f"{name} is not a regular file"
        if status.st_size != entry.size:
            return f"{name} has {status.st_size} bytes, expected {entry.size} (truncated?)"
        if hash_file(path, on_block) != entry.sha256:
            return f"{name} was changed (its sha256 differs)"
    except InterruptedError:  # by the caller, not by the system
        raise
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    return ""


def hash_file(path: Path, on_block: OnBlock = int) -> str:
    """SHA-256 of a file in hex; ``on_block`` is told the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
            on_block(len(block))
    return digest.hexdigest()


def signatures_of(folder: Path, files: Mapping[str, FileEntry]) -> dict[str, Signature]:
    """By name, the signature of each file that is there, with the SHA-256 that it must have."""
    return {name: _signature(folder / name, entry.sha256) for name, entry in files.items()}


def _signature(path: Path, sha256: str) -> Signature:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, sha256]


def _record(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return user_cache_path("owl2", appauthor=False) / "verified" / f"{name}.json"


def _remembered(folder: Path) -> dict[str, Signature]:
    try:
        return dict(read_json(_record(folder))["files"])
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):  # RuntimeError: a user without a home
        return {}


def _remember(folder: Path, files: Mapping[str, Signature]) -> None:
    """Replace what is remembered of a folder; a cache folder that cannot be written to only costs time."""
    try:
        path = _record(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            try:
                json.dump({"folder": str(folder.resolve()), "files": files}, file)
                file.flush()
            except BaseException:
                temporary.unlink()
                raise
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        log.debug("verified files of %s are not remembered: %s", folder, error)
