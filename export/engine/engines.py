"""Engines for a bundle that is there: built beside its graphs, then entered in its manifest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from owl2.export.engine.build import Built, Job, build_engine
from owl2.export.engine.profiles import Limits, decoder_profiles, vision_profile
from owl2.export.engine.target import Target
from owl2.export.progress import Reporter
from owl2.runtime import engines, spec
from owl2.runtime.bundle import Bundle, FileEntry, Manifest, hash_file
from owl2.runtime.engines import DECODER_ENGINE, VISION_ENGINE, EngineRecord, folder_name
from owl2.runtime.errors import ExportError

SOURCES = {
    DECODER_ENGINE: (spec.DECODER_GRAPH, spec.DECODER_GRAPH + ".data"),
    VISION_ENGINE: (spec.VISION_GRAPH, spec.VISION_GRAPH + ".data"),
}
"""The files that each engine is built from, its graph first."""


@dataclass(frozen=True)
class EngineReport:
    """What was built.

    Attributes:
        folder: that holds the engines.
        record: what stands beside them.
        built: time and size, by name of the engine.
    """

    folder: Path
    record: EngineRecord
    built: dict[str, Built]

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries."""
        built = {name: asdict(entry) for name, entry in self.built.items()}
        return {"folder": str(self.folder), "engine": self.record.to_json(), "built": built}


def build_engines(
    bundle: Bundle, target: Target, limits: Limits, workspace: int | None, reporter: Reporter
) -> EngineReport:
    """Build both engines; they appear together, or not at all, and take the place of those for the same GPU.

    Args:
        bundle: of the dialect onnx.
        target: what to build with and for.
        limits: largest shapes.
        workspace: most bytes of scratch memory on the GPU; None for all of it.
        reporter: is told of TensorRT's phases.

    Raises:
        BackendUnavailableError, ExportError: as :func:`owl2.export.engine.build.build_engine`.
    """
    model = bundle.manifest.model
    profiles = {
        VISION_ENGINE: (vision_profile(model, limits),),
        DECODER_ENGINE: decoder_profiles(model, limits),
    }
    folder = bundle.folder / engines.FOLDER / folder_name(target.kind, target.compute)
    built = {}
    with _appearing(folder) as work:
        for name, shapes in profiles.items():
            graph = bundle.path(SOURCES[name][0])
            compute = None if target.here else target.compute
            built[name] = build_engine(target.module, Job(graph, work / name, shapes, compute, workspace), reporter)
        record = _record(bundle.manifest, target, limits, work)
        (work / engines.RECORD).write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
    _enter(bundle.folder, folder)
    return EngineReport(folder, record, built)


def _record(manifest: Manifest, target: Target, limits: Limits, work: Path) -> EngineRecord:
    names = [name for sources in SOURCES.values() for name in sources]
    return EngineRecord(
        format=engines.FORMAT,
        kind=target.kind,
        tensorrt=target.module.__version__,
        compute_capability=divmod(target.compute, 10),
        gpu=target.device.product if target.here else None,
        driver=target.driver,
        context=limits.context,
        prefill=limits.prefill,
        pictures=limits.pictures,
        source={name: manifest.files[name].sha256 for name in names},
        files={name: FileEntry((work / name).stat().st_size, hash_file(work / name)) for name in SOURCES},
    )


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place if all goes well, and is removed if not.

    Raises:
        ExportError: the disk is full or cannot be written.
    """
    work = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        former = folder.with_name(f".{folder.name}.former")
        if folder.exists():
            folder.rename(former)
        work.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _enter(bundle: Path, folder: Path) -> None:
    """Let the manifest name the engines; it is replaced as a whole."""
    path = bundle / spec.MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    content["engines"] = content["engines"] | {folder.name: hash_file(folder / engines.RECORD)}
    written = path.with_name(path.name + ".new")
    with written.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)
