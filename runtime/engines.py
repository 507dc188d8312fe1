"""TensorRT engines beside the graphs of a bundle: where they lie, and what each folder says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle, FileEntry, check_entry, hash_file
from owl2.runtime.config import from_json, require
from owl2.runtime.devices import EngineKind
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError, BundleError

FOLDER = "engines"
RECORD = "engine.json"
FORMAT = 1
DECODER_ENGINE = "decoder.engine"
VISION_ENGINE = "vision.engine"
PREFILL_PROFILE, DECODE_PROFILE = 0, 1
"""The optimization profiles of the decoder's engine."""


def folder_name(kind: EngineKind, compute: int) -> str:
    """The folder in :data:`FOLDER` for engines of this kind and compute capability (times ten)."""
    return f"{kind}-sm{compute}"


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
        pictures: encoded at a time.
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
    pictures: int
    source: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        require(self.format == FORMAT, f"{RECORD}: format {self.format} is not known; this owl2 reads {FORMAT}")
        for name in ("context", "prefill", "pictures"):
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
        raise BundleCorruptError(f"{path} cannot be used: {error}; {rebuild(folder.parent.parent)}") from error


def rebuild(bundle: Path) -> str:
    """The sentence that says how engines are made."""
    return f"run on this device: owl2-export engine {bundle}"


def find_engines(
    bundle: Bundle, kind: EngineKind, gpu: str, capability: tuple[int, int], version: str
) -> tuple[Path, EngineRecord]:
    """The folder of the engines for this device, verified, and what is recorded of them.

    Args:
        bundle: verified.
        kind: of engines.
        gpu: name of the device, for messages.
        capability: compute capability of the device.
        version: of the installed TensorRT.

    Raises:
        BackendUnavailableError: the bundle's engines are for another GPU or another TensorRT.
        BundleError: the bundle has none, or its graphs are not those that they were built from.
        BundleCorruptError: a file is missing, truncated or changed.
    """
    again = rebuild(bundle.folder)
    compute = 10 * capability[0] + capability[1]
    folder = bundle.folder / FOLDER / folder_name(kind, compute)
    listed = sorted(name for name in bundle.manifest.engines if name.startswith(f"{kind}-sm"))
    if folder.name not in listed:
        if not listed:
            raise BundleError(f"{bundle.folder} has no engines of {kind}; {again}")
        raise BackendUnavailableError(
            f"the engines of {bundle.folder} are for other GPUs ({', '.join(listed)}), this device is a {gpu} "
            f"(sm{compute}); {again}"
        )
    record = read_record(folder)
    if hash_file(folder / RECORD) != bundle.manifest.engines[folder.name]:
        raise BundleCorruptError(f"{folder / RECORD} is not the one that {spec.MANIFEST} names; {again}")
    if (record.kind, record.compute_capability) != (kind, capability):
        found = folder_name(record.kind, 10 * record.compute_capability[0] + record.compute_capability[1])
        raise BackendUnavailableError(f"the engines in {folder} are {found}, this device needs {folder.name}; {again}")
    if record.tensorrt != version:
        raise BackendUnavailableError(
            f"the engines in {folder} were built with {kind} {record.tensorrt}, {version} is installed, which cannot "
            f"be counted on to read them; {again}"
        )
    files = bundle.manifest.files
    changed = [name for name, digest in record.source.items() if name not in files or files[name].sha256 != digest]
    if changed:
        raise BundleError(
            f"the engines in {folder} were built from another {', '.join(changed)} than the bundle has now, so they "
            f"are another model's; {again}"
        )
    problems = [problem for name, entry in record.files.items() if (problem := check_entry(folder, name, entry))]
    if problems:
        raise BundleCorruptError(f"{folder}: {'; '.join(problems)}; {again}")
    return folder, record
