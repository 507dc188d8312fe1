"""TensorRT engines in a bundle: what ``engine.json`` says of them, and whether they can be used here.

An engine belongs to one version of TensorRT and one kind of GPU, so a bundle may hold several, each in its folder
``engines/<kind>-sm<compute capability>/``. The graphs that they were built from stay in the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle, FileEntry, check_entry
from owl2.runtime.config import from_json, require
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError, BundleError, ConfigError

EngineKind = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_KINDS: tuple[EngineKind, ...] = get_args(EngineKind)
RECORD_FORMAT = 1
ENGINES = "engines"
RECORD = "engine.json"
DECODER_ENGINE = "decoder.engine"
VISION_ENGINE = "vision.engine"
PREFILL_PROFILE, DECODE_PROFILE = 0, 1
"""The optimization profiles of the decoder's engine."""


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The content of ``engine.json``.

    Attributes:
        format: version of this record.
        kind: which library built the engines and runs them.
        tensorrt: its version.
        gpu: name of the GPU that they were built on; None where they were built without one.
        compute_capability: of the GPUs that they are for.
        driver: of the machine that built them; for information.
        context: the largest S + T of a step.
        prefill: the largest T of a step.
        cached: values of S that building preferred; for information.
        image_rows: most image rows of a step.
        pictures: most pictures that the vision tower takes at once.
        source: sha256 of each file of the bundle that they were built from.
        files: the engines.

    Raises:
        ConfigError: numbers that cannot work, or a file missing.
    """

    format: int
    kind: EngineKind
    tensorrt: str
    gpu: str | None
    compute_capability: tuple[int, int]
    driver: str | None
    context: int
    prefill: int
    cached: tuple[int, ...]
    image_rows: int
    pictures: int
    source: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        for name in ("context", "prefill", "image_rows", "pictures"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")
        require(self.context > 1, f"context must be at least 2, got {self.context}")
        for name in (DECODER_ENGINE, VISION_ENGINE):
            require(name in self.files, f"files: {name} is missing")
        for name in (spec.DECODER_GRAPH, spec.VISION_GRAPH):
            require(name in self.source, f"source: {name} is missing")

    @property
    def folder(self) -> str:
        """Where the engines lie in the bundle, such as ``engines/tensorrt-sm87``."""
        return f"{ENGINES}/{self.kind}-{sm(self.compute_capability)}"

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: unknown or missing keys, wrong types or values that cannot work.
        """
        return from_json(cls, data, RECORD)


def sm(compute_capability: tuple[int, int]) -> str:
    """How NVIDIA's tools name a compute capability: (8, 7) -> ``sm87``."""
    return "sm{}{}".format(*compute_capability)


def read_record(folder: Path) -> EngineRecord:
    """Read the ``engine.json`` of a folder.

    Raises:
        BundleCorruptError: it is missing, unreadable, or of a format that this version does not know.
    """
    path = folder / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleCorruptError(f"{path} cannot be read: {error}; {rebuild(folder.parent.parent)}") from error
    version = data.get("format") if isinstance(data, Mapping) else None
    if version != RECORD_FORMAT:
        raise BundleCorruptError(
            f"{path}: format {version!r} is not known, this owl2 reads {RECORD_FORMAT}; {rebuild(folder.parent.parent)}"
        )
    try:
        return EngineRecord.from_json(data)
    except ConfigError as error:
        raise BundleCorruptError(f"{path}: {error}; {rebuild(folder.parent.parent)}") from error


def rebuild(bundle: Path) -> str:
    """The sentence that says how engines are made."""
    return f"run on this device: owl2-export engine {bundle}"


def find_engines(
    bundle: Bundle, kind: EngineKind, gpu: str, compute_capability: tuple[int, int], version: str
) -> tuple[Path, EngineRecord]:
    """The folder of the engines for this device, verified, and what is recorded of them.

    Args:
        bundle: verified.
        kind: of engines.
        gpu: name of the device, for messages.
        compute_capability: of the device.
        version: of the installed TensorRT.

    Raises:
        BackendUnavailableError: the bundle's engines are for another GPU or another TensorRT.
        BundleError: the bundle has none, or its graphs are not those that they were built from.
        BundleCorruptError: a file is missing, truncated or changed.
    """
    require_standard(bundle)
    folder = bundle.folder / ENGINES / f"{kind}-{sm(compute_capability)}"
    if not folder.is_dir():
        others = sorted(path.name for path in (bundle.folder / ENGINES).glob(f"{kind}-sm*"))
        if others:
            raise BackendUnavailableError(
                f"the engines of {bundle.folder} are for other GPUs ({', '.join(others)}), this device is a {gpu} "
                f"({sm(compute_capability)}); {rebuild(bundle.folder)}"
            )
        raise BundleError(f"{bundle.folder} has no engines of {kind}; {rebuild(bundle.folder)}")
    record = read_record(folder)
    if (record.kind, record.compute_capability) != (kind, compute_capability):
        raise BackendUnavailableError(
            f"the engines in {folder} are of {record.kind} for {sm(record.compute_capability)}, this device needs "
            f"{kind} for {sm(compute_capability)}; {rebuild(bundle.folder)}"
        )
    if record.tensorrt != version:
        raise BackendUnavailableError(
            f"the engines in {folder} were built with {kind} {record.tensorrt}, {version} is installed, which cannot "
            f"read them; {rebuild(bundle.folder)}"
        )
    check_source(bundle, folder, record)
    problems = [problem for name, entry in record.files.items() if (problem := check_entry(folder, name, entry))]
    if problems:
        raise BundleCorruptError(f"{folder}: {'; '.join(problems)}; {rebuild(bundle.folder)}")
    return folder, record


def check_source(bundle: Bundle, folder: Path, record: EngineRecord) -> None:
    """Compare the graphs that engines were built from with those of the bundle.

    Raises:
        BundleError: they differ.
    """
    listed = bundle.manifest.files
    changed = [name for name, digest in record.source.items() if name not in listed or listed[name].sha256 != digest]
    if changed:
        raise BundleError(
            f"the engines in {folder} were built from another {', '.join(changed)} than the bundle has now, so they "
            f"are another model's; {rebuild(bundle.folder)}"
        )


def require_standard(bundle: Bundle) -> None:
    """Refuse bundles that TensorRT cannot build from.

    Raises:
        BundleError: the dialect is not ``onnx``.
    """
    dialect = bundle.manifest.dialect
    if dialect != "onnx":
        raise BundleError(
            f"{bundle.folder} is of the dialect {dialect}, which TensorRT does not read; export the checkpoint again "
            "with --dialect onnx"
        )
