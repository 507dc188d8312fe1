"""Engines for a bundle that is there: built beside its graphs, then entered in its manifest."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from owl2.export.job.progress import Reporter
from owl2.export.job.staging import sync, write_json
from owl2.export.tensorrt.build import Built, Job, build_engine
from owl2.export.tensorrt.profiles import Limits, decoder_profiles, vision_profile
from owl2.export.tensorrt.target import BuildTarget
from owl2.runtime import spec
from owl2.runtime.backends.tensorrt import records
from owl2.runtime.backends.tensorrt.records import DECODER_ENGINE, VISION_ENGINE, EngineRecord, folder_name
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.errors import ExportError
from owl2.runtime.verification import FileEntry, hash_file

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
    bundle: Bundle, target: BuildTarget, limits: Limits, workspace: int | None, reporter: Reporter
) -> EngineReport:
    """Build both engines; they appear together, or not at all, and take the place of those for the same GPU.

    Args:
        bundle: of the dialect onnx.
        target: what to build with and for.
        limits: largest shapes.
        workspace: most bytes of scratch memory on the GPU; None for all of it.
        reporter: is told of TensorRT's phases.

    Raises:
        BackendUnavailableError, ExportError: as :func:`owl2.export.tensorrt.build.build_engine`.
    """
    model = bundle.manifest.model
    profiles = {
        VISION_ENGINE: (vision_profile(model, limits),),
        DECODER_ENGINE: decoder_profiles(model, limits),
    }
    folder = bundle.folder / records.FOLDER / folder_name(target.kind, target.compute)
    built = {}
    with _appearing(bundle.folder, folder) as work:
        for name, shapes in profiles.items():
            graph = bundle.path(SOURCES[name][0])
            compute = None if target.here else target.compute
            built[name] = build_engine(target.module, Job(graph, work / name, shapes, compute, workspace), reporter)
            sync(work / name)
        record = _record(bundle.manifest, target, limits, work)
        write_synced(work / records.RECORD, record.to_json())
    return EngineReport(folder, record, built)


def _record(manifest: Manifest, target: BuildTarget, limits: Limits, work: Path) -> EngineRecord:
    names = [name for sources in SOURCES.values() for name in sources]
    return EngineRecord(
        format=records.FORMAT,
        kind=target.kind,
        tensorrt=target.module.__version__,
        compute_capability=divmod(target.compute, 10),
        gpu=target.device.product if target.here else None,
        driver=target.driver,
        context=limits.context,
        prefill=limits.prefill,
        images=limits.images,
        source={name: manifest.files[name].sha256 for name in names},
        files={name: FileEntry((work / name).stat().st_size, hash_file(work / name)) for name in SOURCES},
    )


@contextlib.contextmanager
def _appearing(bundle: Path, folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place, and is entered in the manifest, if all goes well.

    If not, it is removed, and what was there before is there again; also after a kill, the next time.

    Raises:
        ExportError: the disk is full or cannot be written.
    """
    work, former = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "former"))
    manifest = bundle / (spec.MANIFEST + ".new")
    try:
        _recover(folder, former)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        write_synced(manifest, _entered(bundle, folder.name, hash_file(work / records.RECORD)))
        if folder.exists():
            folder.rename(former)
        try:
            work.rename(folder)
            manifest.rename(bundle / spec.MANIFEST)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            _recover(folder, former)
            raise
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        manifest.unlink(missing_ok=True)


def _recover(folder: Path, former: Path) -> None:
    """Put the engines back that a kill between two renames has left aside, or remove them where others took over."""
    if former.exists() and not folder.exists():
        former.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _entered(bundle: Path, name: str, sha256: str) -> dict[str, object]:
    """The manifest with these engines in it."""
    content: dict[str, object] = json.loads((bundle / spec.MANIFEST).read_text(encoding="utf-8"))
    others = content["engines"]
    return content | {"engines": (others if isinstance(others, dict) else {}) | {name: sha256}}


def write_synced(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file that is on the disk when this returns."""
    write_json(path, content)
    sync(path)
