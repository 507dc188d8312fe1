"""Folders of TensorRT engines in a bundle, and the record in each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from owl2.runtime import spec
from owl2.runtime.bundle import Manifest
from owl2.runtime.config import from_json, require, require_positive
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError, BundleError, ConfigError
from owl2.runtime.foreign import read_json, reading, shorten
from owl2.runtime.placement import EngineKind
from owl2.runtime.verification import FileEntry, hash_file, require_file_names, verify_files

FOLDER = "engines"
RECORD = "engine.json"
RECORD_FORMAT = 2
DECODER_ENGINE = "decoder.engine"
VISION_ENGINE = "vision.engine"
PREFILL_PROFILE, DECODE_PROFILE = 0, 1
"""The optimization profiles of the decoder's engine."""
BUILT_ANYWHERE = frozenset({75, 80, 86, 89, 120})
"""Compute capabilities that ``owl2-export engine`` builds tensorrt-rtx engines for without such a GPU."""


def folder_name(kind: EngineKind, capability: tuple[int, int]) -> str:
    """The folder in :data:`FOLDER` for engines of this kind and compute capability: ``tensorrt-sm87`` for (8, 7)."""
    return f"{kind}-sm{10 * capability[0] + capability[1]}"


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """Content of ``engine.json``, on the engines next to it.

    Attributes:
        format: version of this record.
        kind: of engine.
        tensorrt: version of the module that built them.
        compute_capability: of the GPU they are for.
        gpu: name of the GPU they were built on; None where they were built without one.
        driver: its driver's version; None where they were built without one.
        context: positions that a conversation may take.
        prefill: new positions of a step.
        images: encoded at a time.
        source: sha256 of the files they were built from, by name.
        files: size and sha256 of the engines, by name.
    """

    format: int
    kind: EngineKind
    tensorrt: str
    compute_capability: tuple[int, int]
    gpu: str | None
    driver: str | None
    context: int
    prefill: int
    images: int
    source: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        known = self.format == RECORD_FORMAT
        require(known, f"{RECORD}: format {self.format} is not known; this owl2 reads {RECORD_FORMAT}")
        require_positive(self, f"{RECORD}:")
        require_file_names(self.files, f"{RECORD}: files")
        require_file_names(self.source, f"{RECORD}: source")
        for name in (DECODER_ENGINE, VISION_ENGINE):
            require(name in self.files, f"{RECORD}: files: {name} is missing")
        for name in (spec.DECODER_GRAPH, spec.VISION_GRAPH):
            require(name in self.source, f"{RECORD}: source: {name} is missing")

    @property
    def name(self) -> str:
        """Name of their folder."""
        return folder_name(self.kind, self.compute_capability)

    def folder_in(self, bundle: Path) -> Path:
        return bundle / FOLDER / self.name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Read a record; ConfigError for unknown or missing keys, wrong types, another format or impossible values."""
        return from_json(cls, data, RECORD)


def build_hint(bundle: Path, name: str) -> str:
    """The command that builds the engines of the folder of this name.

    Raises:
        BundleCorruptError: the name is not one that :func:`folder_name` makes.
    """
    found = re.fullmatch(f"({'|'.join(get_args(EngineKind))})-sm([0-9]+)", name)
    if found is None:
        raise BundleCorruptError(f"{spec.MANIFEST}: engines: {shorten(name)} is not a name such as tensorrt-sm87")
    command = f"owl2-export engine {bundle} --kind {found[1]}"
    if found[1] == "tensorrt-rtx" and int(found[2]) in BUILT_ANYWHERE:
        return f"run on any machine: {command} --gpu sm{found[2]}"
    return f"run on this device: {command}"


def read_record(bundle: Path, manifest: Manifest, name: str) -> EngineRecord:
    """The record in the folder of engines of this name; the engines themselves are not read.

    Raises:
        BundleCorruptError: it is missing, unreadable, not the one that the manifest names, or of other engines.
        BundleError: the bundle's graphs are not those that the engines were built from.
    """
    hint, path = build_hint(bundle, name), bundle / FOLDER / name / RECORD
    try:
        with reading(path, BundleCorruptError, hint):
            record = EngineRecord.from_json(read_json(path))
    except ConfigError as error:
        raise BundleCorruptError(f"{path} cannot be used: {error}; {hint}") from error
    if hash_file(path) != manifest.engines[name]:
        raise BundleCorruptError(f"{path} is not the one that {spec.MANIFEST} names; {hint}")
    if record.name != name:
        raise BundleCorruptError(f"{path} is of engines {record.name}, not {name}; {hint}")
    files = manifest.files
    changed = [file for file, digest in record.source.items() if file not in files or files[file].sha256 != digest]
    if changed:
        raise BundleError(
            f"the engines in {path.parent} were built from another {', '.join(changed)} than the bundle has now; {hint}"
        )
    return record


def check_files(bundle: Path, record: EngineRecord, *, force: bool = False) -> None:
    """Verify the engines of a record; ``force`` hashes files again that have not changed since they were verified.

    Raises:
        BundleCorruptError: some are missing, truncated or changed; names all of them.
    """
    folder = record.folder_in(bundle)
    problems = verify_files(folder, record.files, force=force)
    if problems:
        raise BundleCorruptError(f"{folder}: {'; '.join(problems)}; {build_hint(bundle, record.name)}")


def check_all(bundle: Path, manifest: Manifest, *, force: bool = False) -> tuple[dict[str, EngineRecord], list[str]]:
    """Verify all engines of a bundle -> the usable records, by name of the folder, and one sentence per problem."""
    records, problems = {}, []
    for name in manifest.engines:
        try:
            records[name] = read_record(bundle, manifest, name)
            check_files(bundle, records[name], force=force)
        except BundleError as error:
            problems.append(str(error))
    return records, problems


def find_record(
    bundle: Path, manifest: Manifest, kind: EngineKind, gpu: str, capability: tuple[int, int], version: str
) -> EngineRecord:
    """The record of the engines for a device, given by its product name ``gpu`` and compute capability.

    Nothing large is read; ``version`` is that of the installed TensorRT.

    Raises:
        BackendUnavailableError: the bundle's engines are for another GPU or another TensorRT.
        BundleError: the bundle has none, or as :func:`read_record`.
    """
    name = folder_name(kind, capability)
    hint = build_hint(bundle, name)
    listed = sorted(name for name in manifest.engines if name.startswith(f"{kind}-sm"))
    if not listed:
        raise BundleError(f"{bundle} has no engines of {kind}; {hint}")
    if name not in listed:
        raise BackendUnavailableError(
            f"the engines of {bundle} are for other GPUs ({', '.join(listed)}), this device is a {gpu} "
            f"({name.removeprefix(f'{kind}-')}); {hint}"
        )
    record = read_record(bundle, manifest, name)
    if record.tensorrt != version:
        raise BackendUnavailableError(
            f"the engines in {record.folder_in(bundle)} were built with {kind} {record.tensorrt}, {version} is "
            f"installed, which may not be able to read them; {hint}"
        )
    return record
