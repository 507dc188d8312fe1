"""Images and videos in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from owl2.runtime.config import require
from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import shorten

IMAGES = frozenset(
    (
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
    )
)
VIDEOS = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv")
)
"""Of their names in folders."""


def find_files(paths: Iterable[Path], suffixes: frozenset[str], *, recursive: bool = False) -> list[str]:
    """Paths of files: as they are given, and of folders those whose names have one of the suffixes, sorted.

    Links to folders are not followed, unless they are given themselves.

    Raises:
        ConfigError: a path does not exist, a folder cannot be read, or there is nothing.
    """
    found: dict[str, None] = {}
    for path in paths:
        if not path.is_dir():
            require(os.path.lexists(path), f"{shorten(str(path))} does not exist")
            found[str(path)] = None
            continue
        for folder, folders, names in os.walk(path, onerror=_refuse):
            folders.sort()
            inside = sorted(name for name in (*names, *folders) if _is_named(name, suffixes))
            found.update((os.path.join(folder, name), None) for name in inside)  # noqa: PTH118
            if not recursive:
                break
    require(bool(found), "there is nothing to score; give files, or --recursive for folders within folders")
    return list(found)


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(f"the folder {shorten(str(error.filename))} cannot be read: {error.strerror}") from error


def _is_named(name: str, suffixes: frozenset[str]) -> bool:
    return Path(name).suffix.lower() in suffixes and not name.startswith(".")
