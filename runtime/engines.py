"""TensorRT engines beside the graphs of a bundle: where they lie, and what each folder says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from owl2.runtime.bundle import FileEntry
from owl2.runtime.config import from_json, require
from owl2.runtime.devices import EngineKind

FOLDER = "engines"
RECORD = "engine.json"
FORMAT = 1
DECODER_ENGINE = "decoder.engine"
VISION_ENGINE = "vision.engine"


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

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: unknown or missing keys, wrong types, or another format.
        """
        return from_json(cls, data, RECORD)
