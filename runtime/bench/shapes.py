"""Bundles of random weights, to measure the speed of a model without having it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from platformdirs import user_cache_path

from owl2.runtime import spec
from owl2.runtime.errors import BackendUnavailableError, ConfigError
from owl2.runtime.fit.products import GIB
from owl2.runtime.version import __version__

SHAPES = {"7b": 5 * GIB, "small": GIB // 64}
"""Shapes by name, and the bytes that a bundle of one takes on the disk at most."""
WRITERS = "owl2.shapes"
"""Group of entry points that write such bundles: functions (shape, folder, on_progress)."""
OnShapeProgress = Callable[[int, int], None]


def shape_bundle(shape: str, scratch: Path | None = None, on_progress: OnShapeProgress | None = None) -> Path:
    """The bundle of a shape: written the first time, which takes a few minutes, and kept.

    Args:
        shape: one of :data:`SHAPES`.
        scratch: where it is kept; None for the user's cache folder.
        on_progress: told how many parts are written, of how many.

    Raises:
        ConfigError: a shape that is not known, or no room on the disk.
        BackendUnavailableError: the export half, which writes it, is not installed.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape {shape!r} is not known; known: {', '.join(SHAPES)}")
    parent = user_cache_path("owl2") / "shapes" if scratch is None else scratch
    folder = parent / f"{shape}-{__version__}-format{spec.FORMAT_VERSION}"
    if (folder / spec.MANIFEST).exists():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < SHAPES[shape]:
        raise ConfigError(
            f"a bundle of the shape {shape} takes {SHAPES[shape] / GIB:.1f} GiB, {parent} has {free / GIB:.1f} GiB "
            "left; give another folder with --scratch"
        )
    with tempfile.TemporaryDirectory(prefix=f"{shape}-", dir=parent) as unfinished:
        _writer()(shape, Path(unfinished) / "bundle", on_progress or (lambda done, total: None))
        try:
            (Path(unfinished) / "bundle").rename(folder)
        except OSError:
            if not (folder / spec.MANIFEST).exists():  # else another process has just written the same
                raise
    return folder


def _writer() -> Callable[[str, Path, OnShapeProgress], None]:
    found = next(iter(entry_points(group=WRITERS, name="random")), None)
    try:
        if found is None:
            raise ImportError("this installation does not list it")
        writer: Callable[[str, Path, OnShapeProgress], None] = found.load()
    except ImportError as error:
        raise BackendUnavailableError(
            f"random weights are written by the export half: {error}; pip install 'owl2[export]', or give a bundle"
        ) from error
    return writer
