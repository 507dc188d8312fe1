"""Engines of an existing bundle: built next to its graphs, then entered in its manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from owl2.export.job.contents import ENGINE_FILES
from owl2.export.job.disk import write_json
from owl2.export.job.progress import Reporter
from owl2.export.job.staging import Staging
from owl2.export.tensorrt.build import BuildStats, build_engine
from owl2.export.tensorrt.profiles import Limits, decoder_profiles, vision_profile
from owl2.export.tensorrt.target import BuildTarget
from owl2.runtime import spec
from owl2.runtime.backends.tensorrt import records
from owl2.runtime.backends.tensorrt.records import DECODER_ENGINE, VISION_ENGINE, EngineRecord
from owl2.runtime.bundle import Bundle, Manifest, read_manifest
from owl2.runtime.errors import ExportError
from owl2.runtime.fit.machine import driver_version
from owl2.runtime.stored import sync
from owl2.runtime.verification import FileEntry, hash_file

SOURCES = {
    DECODER_ENGINE: (spec.DECODER_GRAPH, spec.DECODER_GRAPH + ".data"),
    VISION_ENGINE: (spec.VISION_GRAPH, spec.VISION_GRAPH + ".data"),
}
"""The files that each engine is built from, its graph first."""


@dataclass(frozen=True)
class EngineReport:
    """Result of a build: the folder, the record in it, and figures by name of the engine."""

    folder: Path
    record: EngineRecord
    built: dict[str, BuildStats]

    def to_json(self) -> dict[str, object]:
        built = {name: asdict(stats) for name, stats in self.built.items()}
        return {"folder": str(self.folder), "engine": self.record.to_json(), "built": built}


def build_engines(
    bundle: Bundle, target: BuildTarget, limits: Limits, workspace: int | None, reporter: Reporter
) -> EngineReport:
    """Build both engines; they appear together or not at all, and replace those for the same GPU.

    ``workspace`` and the errors are those of :func:`owl2.export.tensorrt.build.build_engine`.
    """
    model = bundle.manifest.model
    profiles = {
        VISION_ENGINE: (vision_profile(model, limits),),
        DECODER_ENGINE: decoder_profiles(model, limits),
    }
    folder = bundle.folder / records.FOLDER / records.folder_name(target.kind, divmod(target.compute, 10))
    compute = None if target.here else target.compute
    built = {}
    with _appearing(bundle.folder, folder) as work:
        for name, shapes in profiles.items():
            graph, engine = bundle.path(SOURCES[name][0]), work / name
            built[name] = build_engine(
                target.module, graph, engine, shapes, reporter, compute=compute, workspace=workspace
            )
            sync(engine)
        record = _record(bundle.manifest, target, limits, work)
        write_json(work / records.RECORD, record.to_json())
        sync(work / records.RECORD)
    return EngineReport(folder, record, built)


def _record(manifest: Manifest, target: BuildTarget, limits: Limits, work: Path) -> EngineRecord:
    sources = [name for names in SOURCES.values() for name in names]
    return EngineRecord(
        format=records.RECORD_FORMAT,
        kind=target.kind,
        tensorrt=target.module.__version__,
        compute_capability=divmod(target.compute, 10),
        gpu=target.device.product if target.here else None,
        driver=driver_version() if target.here else None,
        context=limits.context,
        prefill=limits.prefill,
        images=limits.images,
        source={name: manifest.files[name].sha256 for name in sources},
        files={name: FileEntry((work / name).stat().st_size, hash_file(work / name)) for name in SOURCES},
    )


@contextlib.contextmanager
def _appearing(bundle: Path, folder: Path) -> Iterator[Path]:
    """A folder that takes the place of ``folder``, and is entered in the manifest, if all goes well.

    If not, it is removed and everything is as before; after a kill, by the next build.
    """
    for path in (folder.parent, folder):
        if path.is_symlink():
            raise ExportError(f"{path} is a link and is left alone; engines are kept in the bundle itself: remove it")
    try:
        with Staging(folder, overwrite=True, contents=lambda _: ENGINE_FILES.__contains__) as staging:
            staging.clear()
            yield staging.folder
            content = read_manifest(bundle)
            engines = {**content.engines, folder.name: hash_file(staging.folder / records.RECORD)}
            # In the folder first, so that it takes nothing but a rename to enter it.
            write_json(staging.folder / spec.MANIFEST, replace(content, engines=engines).sealed())
            staging.publish((spec.MANIFEST, bundle / spec.MANIFEST))
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
