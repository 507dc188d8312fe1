"""Bundles of random weights, to measure the speed of a model without having it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path

from platformdirs import user_cache_path

from owl2.runtime import spec
from owl2.runtime.bench.process import ProcessError, lines_of
from owl2.runtime.errors import BackendError, BackendUnavailableError, ConfigError
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
        BackendError: it failed.
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
        _write(shape, Path(unfinished) / "bundle", on_progress or (lambda done, total: None))
        try:
            (Path(unfinished) / "bundle").rename(folder)
        except OSError:
            if not (folder / spec.MANIFEST).exists():  # else another process has just written the same
                raise
    return folder


def _write(shape: str, folder: Path, on_progress: OnShapeProgress) -> None:
    """In a new process: torch and the weights would count as memory of the model that is measured."""
    try:
        with closing(lines_of(__name__, [shape, str(folder.absolute())])) as lines:
            for line in lines:
                told = json.loads(line)
                if "missing" in told:
                    raise BackendUnavailableError(
                        f"random weights are written by the export half: {told['missing']}; pip install "
                        "'owl2[export]', or give a bundle"
                    )
                on_progress(told["done"], told["total"])
    except ProcessError as error:
        raise BackendError(f"a new process could not write {folder}: {error}") from error


def main(shape: str, folder: str) -> None:
    """Write a bundle, and a line of JSON for each part that is done, or for what is not installed."""
    try:
        writer = _writer()
    except ImportError as error:
        _tell({"missing": str(error)})
        return
    writer(shape, Path(folder), lambda done, total: _tell({"done": done, "total": total}))


def _tell(told: Mapping[str, str | int]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _writer() -> Callable[[str, Path, OnShapeProgress], None]:
    found = next(iter(entry_points(group=WRITERS, name="random")), None)
    if found is None:
        raise ImportError("this installation does not list it")
    writer: Callable[[str, Path, OnShapeProgress], None] = found.load()
    return writer
