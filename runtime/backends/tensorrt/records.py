"""TensorRT engines beside the graphs of a bundle: where they lie, and what each folder says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.config import from_json, require
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError, BundleError
from owl2.runtime.fit.products import PRODUCTS
from owl2.runtime.placement import EngineKind
from owl2.runtime.verification import FileEntry, hash_file, verify_files

FOLDER = "engines"
RECORD = "engine.json"
FORMAT = 2
DECODER_ENGINE = "decoder.engine"
VISION_ENGINE = "vision.engine"
PREFILL_PROFILE, DECODE_PROFILE = 0, 1
"""The optimization profiles of the decoder's engine."""


def folder_name(kind: EngineKind, compute: int) -> str:
    """The folder in :data:`FOLDER` for engines of this kind and compute capability (times ten)."""
    return f"{kind}-sm{compute}"


def parse_folder(name: str) -> tuple[EngineKind, int]:
    """The inverse of :func:`folder_name`.

    Raises:
        BundleCorruptError: it is no such name.
    """
    found = re.fullmatch(f"({'|'.join(get_args(EngineKind))})-sm([0-9]+)", name)
    if found is None:
        raise BundleCorruptError(f"{spec.MANIFEST}: engines: {name!r} is no name such as {folder_name('tensorrt', 87)}")
    return cast(EngineKind, found[1]), int(found[2])


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What ``engine.json`` says of the engines beside it.

    Attributes:
        format: version of this record.
        kind: what built them and runs them.
        tensorrt: version of that module.
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
        require(self.format == FORMAT, f"{RECORD}: format {self.format} is not known; this owl2 reads {FORMAT}")
        for name in ("context", "prefill", "images"):
            value = getattr(self, name)
            require(value > 0, f"{RECORD}: {name} must be positive, got {value}")
        for name in (DECODER_ENGINE, VISION_ENGINE):
            require(name in self.files, f"{RECORD}: files: {name} is missing")
        for name in (spec.DECODER_GRAPH, spec.VISION_GRAPH):
            require(name in self.source, f"{RECORD}: source: {name} is missing")

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: unknown or missing keys, wrong types, another format, or values that cannot be.
        """
        return from_json(cls, data, RECORD)


def read_record(folder: Path) -> EngineRecord:
    """Read the ``engine.json`` of a folder of engines.

    Raises:
        BundleCorruptError: it is missing or unreadable, or says what cannot be.
    """
    path = folder / RECORD
    try:
        return EngineRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
        again = rebuild(folder.parent.parent, *parse_folder(folder.name))
        raise BundleCorruptError(f"{path} cannot be used: {error}; {again}") from error


def rebuild(bundle: Path, kind: EngineKind, compute: int) -> str:
    """The sentence that says how engines of this kind and compute capability (times ten) are made."""
    command = f"owl2-export engine {bundle} --kind {kind}"
    if kind == "tensorrt-rtx" and any(device.compute == compute for device in PRODUCTS.values()):
        return f"run on any machine: {command} --gpu sm{compute}"
    return f"run on this device: {command}"


def checked_record(bundle: Path, manifest: Manifest, name: str) -> EngineRecord:
    """The record in the folder of engines of this name; the engines themselves are not read.

    Raises:
        BundleCorruptError: it is not the one that the manifest names, or of other engines.
        BundleError: the bundle's graphs are not those that they were built from.
    """
    kind, compute = parse_folder(name)
    again, folder = rebuild(bundle, kind, compute), bundle / FOLDER / name
    record = read_record(folder)
    if hash_file(folder / RECORD) != manifest.engines[name]:
        raise BundleCorruptError(f"{folder / RECORD} is not the one that {spec.MANIFEST} names; {again}")
    if (found := folder_name(record.kind, _times_ten(record.compute_capability))) != name:
        raise BundleCorruptError(f"{folder / RECORD} is of engines {found}, not {name}; {again}")
    files = manifest.files
    changed = [file for file, digest in record.source.items() if file not in files or files[file].sha256 != digest]
    if changed:
        raise BundleError(
            f"the engines in {folder} were built from another {', '.join(changed)} than the bundle has now, so they "
            f"are another model's; {again}"
        )
    return record


def check_files(bundle: Path, name: str, record: EngineRecord, *, force: bool = False) -> None:
    """Verify every file next to the record in the folder of engines of this name.

    Args:
        bundle: folder.
        name: of the folder of engines.
        record: of these engines.
        force: hash files again that have not changed since they were last verified.

    Raises:
        BundleCorruptError: some are missing, truncated or changed; all of them are named.
    """
    folder = bundle / FOLDER / name
    problems = verify_files(folder, record.files, force=force)
    if problems:
        raise BundleCorruptError(f"{folder}: {'; '.join(problems)}; {rebuild(bundle, *parse_folder(name))}")


def check_all(bundle: Path, manifest: Manifest, *, force: bool = False) -> tuple[dict[str, EngineRecord], list[str]]:
    """Verify all engines of a bundle; ``force`` as in :func:`check_files`.

    Returns:
        The records that are what the manifest names, by name of the folder, and one sentence per problem.
    """
    records, problems = {}, []
    for name in manifest.engines:
        try:
            records[name] = checked_record(bundle, manifest, name)
            check_files(bundle, name, records[name], force=force)
        except BundleError as error:
            problems.append(str(error))
    return records, problems


def find_record(
    bundle: Path, manifest: Manifest, kind: EngineKind, gpu: str, capability: tuple[int, int], version: str
) -> EngineRecord:
    """What is recorded of the engines for this device, before anything large is read.

    Args:
        bundle: folder.
        manifest: of the bundle.
        kind: of engines.
        gpu: name of the device, for messages.
        capability: compute capability of the device.
        version: of the installed TensorRT.

    Raises:
        BackendUnavailableError: the bundle's engines are for another GPU or another TensorRT.
        BundleError: the bundle has none, or as :func:`checked_record`.
    """
    compute = _times_ten(capability)
    again, name = rebuild(bundle, kind, compute), folder_name(kind, compute)
    listed = sorted(name for name in manifest.engines if name.startswith(f"{kind}-sm"))
    if name not in listed:
        if not listed:
            raise BundleError(f"{bundle} has no engines of {kind}; {again}")
        raise BackendUnavailableError(
            f"the engines of {bundle} are for other GPUs ({', '.join(listed)}), this device is a {gpu} (sm{compute}); "
            f"{again}"
        )
    record = checked_record(bundle, manifest, name)
    if record.tensorrt != version:
        raise BackendUnavailableError(
            f"the engines in {bundle / FOLDER / name} were built with {kind} {record.tensorrt}, {version} is "
            f"installed, which cannot be counted on to read them; {again}"
        )
    return record


def find_engines(
    bundle: Bundle, kind: EngineKind, gpu: str, capability: tuple[int, int], version: str
) -> tuple[Path, EngineRecord]:
    """The folder of the engines for this device, verified, and what is recorded of them.

    Args:
        bundle: verified.
        kind, gpu, capability, version: as of :func:`find_record`.

    Raises:
        BackendUnavailableError, BundleError: as :func:`find_record`.
        BundleCorruptError: a file is missing, truncated or changed.
    """
    record = find_record(bundle.folder, bundle.manifest, kind, gpu, capability, version)
    name = folder_name(kind, _times_ten(capability))
    check_files(bundle.folder, name, record)
    return bundle.folder / FOLDER / name, record


def _times_ten(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]
