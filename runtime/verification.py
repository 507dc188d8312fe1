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
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

HASH_BLOCK = 1 << 22
PROGRESS_SECONDS = 0.2

OnBlock = Callable[[int], object]
Signature = list[int | str]
"""Size, device, inode, modification and status change time (ns) of a file, and its SHA-256."""

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
    signatures = {name: _signature(folder / name, entry.sha256) for name, entry in files.items()}
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
    if Path(name).name != name:
        return f"{name} is outside the bundle"
    if not path.is_file():
        return f"{name} is missing"
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{name} has {size} bytes, expected {entry.size} (truncated?)"
        if hash_file(path, on_block) != entry.sha256:
            return f"{name} was changed (its sha256 differs)"
    except InterruptedError:  # by the caller, not by the system
        raise
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
        record = json.loads(_record(folder).read_text(encoding="utf-8"))
        return dict(record["files"])
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
