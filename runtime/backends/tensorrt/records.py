"""Folders of TensorRT engines in a bundle, and the record in each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from owl2.runtime import spec
from owl2.runtime.bundle import Manifest
from owl2.runtime.config import from_json, require
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError, BundleError
from owl2.runtime.placement import EngineKind
from owl2.runtime.verification import FileEntry, hash_file, verify_files

FOLDER = "engines"
RECORD = "engine.json"
RECORD_FORMAT = 2
DECODER_ENGINE = "decoder.engine"
VISION_ENGINE = "vision.engine"
PREFILL_PROFILE, DECODE_PROFILE = 0, 1
"""The optimization profiles of the decoder's engine."""
BUILT_ANYWHERE = frozenset({75, 80, 86, 89, 120})
"""Compute capabilities that ``owl2-export engine`` builds tensorrt-rtx engines for without such a GPU."""


def folder_name(kind: EngineKind, compute: int) -> str:
    """The folder in :data:`FOLDER` for engines of this kind and compute capability (times ten)."""
    return f"{kind}-sm{compute}"


def parse_folder(name: str) -> tuple[EngineKind, int]:
    """The inverse of :func:`folder_name`.

    Raises:
        BundleCorruptError: it is not such a name.
    """
    found = re.fullmatch(f"({'|'.join(get_args(EngineKind))})-sm([0-9]+)", name)
    if found is None:
        raise BundleCorruptError(
            f"{spec.MANIFEST}: engines: {name!r} is not a name such as {folder_name('tensorrt', 87)}"
        )
    return cast(EngineKind, found[1]), int(found[2])


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
        for name in ("context", "prefill", "images"):
            value = getattr(self, name)
            require(value > 0, f"{RECORD}: {name} must be positive, got {value}")
        for name in (DECODER_ENGINE, VISION_ENGINE):
            require(name in self.files, f"{RECORD}: files: {name} is missing")
        for name in (spec.DECODER_GRAPH, spec.VISION_GRAPH):
            require(name in self.source, f"{RECORD}: source: {name} is missing")

    @property
    def name(self) -> str:
        """Of their folder."""
        return folder_name(self.kind, times_ten(self.compute_capability))

    def folder_in(self, bundle: Path) -> Path:
        """Their folder in a bundle."""
        return bundle / FOLDER / self.name

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: unknown or missing keys, wrong types, another format, or impossible values.
        """
        return from_json(cls, data, RECORD)


def build_hint(bundle: Path, name: str) -> str:
    """The command that builds the engines of the folder of this name."""
    kind, compute = parse_folder(name)
    command = f"owl2-export engine {bundle} --kind {kind}"
    if kind == "tensorrt-rtx" and compute in BUILT_ANYWHERE:
        return f"run on any machine: {command} --gpu sm{compute}"
    return f"run on this device: {command}"


def read_record(bundle: Path, manifest: Manifest, name: str) -> EngineRecord:
    """The record in the folder of engines of this name; the engines themselves are not read.

    Raises:
        BundleCorruptError: it is missing, unreadable, not the one that the manifest names, or of other engines.
        BundleError: the bundle's graphs are not those that the engines were built from.
    """
    hint, path = build_hint(bundle, name), bundle / FOLDER / name / RECORD
    try:
        record = EngineRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
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
    """Verify the engines of a record.

    Args:
        bundle: folder.
        record: of the engines.
        force: hash files again that have not changed since they were last verified.

    Raises:
        BundleCorruptError: some are missing, truncated or changed; names all of them.
    """
    folder = record.folder_in(bundle)
    problems = verify_files(folder, record.files, force=force)
    if problems:
        raise BundleCorruptError(f"{folder}: {'; '.join(problems)}; {build_hint(bundle, record.name)}")


def check_all(bundle: Path, manifest: Manifest, *, force: bool = False) -> tuple[dict[str, EngineRecord], list[str]]:
    """Verify all engines of a bundle; ``force`` as in :func:`check_files`.

    Returns:
        The records that can be used, by name of the folder, and one sentence per problem.
    """
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
    """The record of the engines for this device; nothing large is read.

    Args:
        bundle: folder.
        manifest: of the bundle.
        kind: of engines.
        gpu: name of the device, for messages.
        capability: compute capability of the device.
        version: of the installed TensorRT.

    Raises:
        BackendUnavailableError: the bundle's engines are for another GPU or another TensorRT.
        BundleError: the bundle has none, or as :func:`read_record`.
    """
    name = folder_name(kind, times_ten(capability))
    hint = build_hint(bundle, name)
    listed = sorted(name for name in manifest.engines if name.startswith(f"{kind}-sm"))
    if not listed:
        raise BundleError(f"{bundle} has no engines of {kind}; {hint}")
    if name not in listed:
        raise BackendUnavailableError(
            f"the engines of {bundle} are for other GPUs ({', '.join(listed)}), this device is a {gpu} "
            f"(sm{times_ten(capability)}); {hint}"
        )
    record = read_record(bundle, manifest, name)
    if record.tensorrt != version:
        raise BackendUnavailableError(
            f"the engines in {record.folder_in(bundle)} were built with {kind} {record.tensorrt}, {version} is "
            f"installed, which may not be able to read them; {hint}"
        )
    return record


def times_ten(capability: tuple[int, int]) -> int:
    """A compute capability as in the names of folders: (8, 7) -> 87."""
    return 10 * capability[0] + capability[1]
