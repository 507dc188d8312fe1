"""Opening and checking a bundle folder; nothing of it is used before every file has been verified."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from owl2.runtime import spec
from owl2.runtime.backends.ort.installation import onnxruntime_version, onnxruntime_wheels
from owl2.runtime.config import DecoderConfig, ModelConfig, from_json, require
from owl2.runtime.errors import (
    BackendUnavailableError,
    BundleCorruptError,
    BundleError,
    BundleVersionError,
    ConfigError,
)
from owl2.runtime.spec import DialectName, FloatType, KvType

HASH_BLOCK = 1 << 22
EXPECTED = "expected a folder written by owl2-export"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the weights are stored.

    Attributes:
        decoder: fp32, fp16, int8 or int4 linear layers.
        head: the same for the output head.
        vision: fp32, fp16 or int8 tower and abstractor.
        embeddings: fp32 or fp16 rows of the token table.
        method: gptq or rtn for integer decoders, ``gptq checkpoint`` where a checkpoint's own integers were kept, none
            otherwise.
        group_size: columns per scale; 0 where nothing is grouped.
    """

    decoder: str
    head: str
    vision: str
    embeddings: Literal["fp32", "fp16"]
    method: str
    group_size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``owl2.json``.

    Attributes:
        format: version of the bundle format.
        producer: the exporter, with its version.
        dialect: operator set of the graphs: ``ort`` for ONNX Runtime, ``onnx`` for TensorRT.
        activations: type in which the graphs compute.
        minimum_onnxruntime: lowest version that has the operators of the graphs, int8 K/V aside.
        kv_cache: types of the K/V cache to choose from, the activations' own among them, each with the lowest ONNX
            Runtime that has its attention.
        template: name of the conversation template; ``mplug_owl2``.
        weights: how the weights are stored.
        model: architecture and image preprocessing.
        files: every other file of the bundle, engines aside.
        engines: sha256 of the record in each folder of TensorRT engines, by name; see
            :mod:`owl2.runtime.backends.tensorrt.records`.
    """

    format: int
    producer: str
    dialect: DialectName
    activations: FloatType
    minimum_onnxruntime: str
    kv_cache: Mapping[KvType, str]
    template: Literal["mplug_owl2"]
    weights: WeightFormat
    model: ModelConfig
    files: Mapping[str, FileEntry]
    engines: Mapping[str, str]

    def __post_init__(self) -> None:
        known = ", ".join(spec.DECODER_GRAPHS)
        for kind in self.kv_cache:
            require(kind in spec.DECODER_GRAPHS, f"kv_cache: {kind!r} is not known; known: {known}")
        require(self.activations in self.kv_cache, f"kv_cache: {self.activations}, the type of activations, is missing")

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: unknown or missing keys, or wrong types.
        """
        return from_json(cls, data, spec.MANIFEST)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def kv_type(self, asked: KvType | None) -> KvType:
        """The type of the K/V cache; that of the activations where none is asked for.

        Raises:
            ConfigError: the bundle does not offer it.
        """
        offered = ", ".join(self.kv_cache)
        require(
            asked is None or asked in self.kv_cache,
            f"kv_cache {asked!r}: this bundle offers {offered}; choose one of these or export the checkpoint again",
        )
        return asked or self.activations

    def kv_bytes(self, kind: KvType) -> int:
        """Bytes that keys and values of one position take in all layers."""
        return spec.kv_bytes(self.model.decoder, kind, self.dialect)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, *, onnxruntime: bool = True) -> Bundle:
        """Read the manifest and verify every file against it.

        Args:
            folder: written by ``owl2-export``.
            onnxruntime: whether its graphs will run there, and not as engines.

        Raises:
            BundleError: no bundle there.
            BundleVersionError: a format this version does not know.
            BundleCorruptError: files are missing, truncated or changed; all of them are named.
            BackendUnavailableError: the installed ONNX Runtime is too old for the graphs.
        """
        manifest = read_manifest(folder)
        problems = check_files(folder, manifest)
        if problems:
            raise BundleCorruptError(f"{folder}: " + "; ".join(problems) + "; copy or export the bundle again")
        if onnxruntime:
            check_onnxruntime(manifest.minimum_onnxruntime)
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        """Full path of a file of the bundle."""
        return self.folder / name

    def decoder_graph(self, kv_cache: KvType | None = None) -> Path:
        """Full path of the decoder graph with this type of K/V cache; None for that of the activations.

        Raises:
            ConfigError: the bundle does not offer it.
            BackendUnavailableError: the installed ONNX Runtime is too old for it.
        """
        offered, kv_cache = self.manifest.kv_cache, self.manifest.kv_type(kv_cache)
        if is_older(onnxruntime_version(), offered[kv_cache]):
            raise BackendUnavailableError(
                f"the {kv_cache} K/V cache needs onnxruntime {offered[kv_cache]} or newer, {onnxruntime_version()} "
                f"is installed; upgrade it ({_upgrade()}) or load with kv_cache {self.manifest.activations!r}"
            )
        return self.path(spec.DECODER_GRAPHS[kv_cache])

    def embeddings(self) -> NDArray[np.floating[Any]]:
        """The token table, memory-mapped: float16 or float32 [V, C]; only rows in use become resident."""
        return open_embeddings(self.folder, self.manifest.model.decoder, self.manifest.weights.embeddings)


def open_embeddings(folder: Path, decoder: DecoderConfig, stored: FloatType) -> NDArray[np.floating[Any]]:
    """The token table of a bundle's folder, as :meth:`Bundle.embeddings`."""
    dtype = np.float16 if stored == "fp16" else np.float32
    shape = (decoder.vocab_size, decoder.hidden_size)
    return np.memmap(folder / spec.EMBEDDINGS, dtype=dtype, mode="r", shape=shape)


def read_manifest(folder: Path) -> Manifest:
    """Read ``owl2.json`` alone.

    Raises:
        BundleError, BundleVersionError, BundleCorruptError: as :meth:`Bundle.open`.
    """
    path = folder / spec.MANIFEST
    if not folder.exists():
        raise BundleError(f"{folder} does not exist; give a folder written by owl2-export")
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; give the folder that owl2-export wrote")
    if not path.is_file():
        is_checkpoint = (folder / "config.json").is_file()
        hint = "it is a PyTorch checkpoint: convert it with owl2-export" if is_checkpoint else EXPECTED
        raise BundleError(f"{folder} is no bundle: {spec.MANIFEST} is missing; {hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleCorruptError(f"{path} is no readable JSON: {error}") from error
    version = data.get("format") if isinstance(data, Mapping) else None
    if version != spec.FORMAT_VERSION:
        raise BundleVersionError(
            f"{path}: format version {version!r} is not known; this owl2 reads version {spec.FORMAT_VERSION}; "
            "export the checkpoint again or install a matching owl2"
        )
    try:
        return Manifest.from_json(data)
    except ConfigError as error:
        raise BundleCorruptError(f"{path}: {error}") from error


def check_files(folder: Path, manifest: Manifest) -> list[str]:
    """Compare size and hash of every file; returns one sentence per problem."""
    graphs = [spec.DECODER_GRAPHS[kind] for kind in spec.DECODER_GRAPHS if kind in manifest.kv_cache]
    unlisted = [name for name in dict.fromkeys((*spec.BUNDLE_FILES, *graphs)) if name not in manifest.files]
    problems = [f"{name} is not listed in {spec.MANIFEST}" for name in unlisted]
    decoder, weights = manifest.model.decoder, manifest.weights
    rows = manifest.files.get(spec.EMBEDDINGS)
    expected = decoder.vocab_size * decoder.hidden_size * (2 if weights.embeddings == "fp16" else 4)
    if rows is not None and rows.size != expected:
        problems.append(f"{spec.EMBEDDINGS} has {rows.size} bytes, the model's token table takes {expected}")
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: check_entry(folder, *item), manifest.files.items())
    return problems + [problem for problem in found if problem]


def check_entry(folder: Path, name: str, entry: FileEntry) -> str:
    """Compare size and hash of one file; returns what is wrong with it, or nothing."""
    path = folder / name
    if Path(name).name != name:
        return f"{name} lies outside the bundle"
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"{name} has {size} bytes, expected {entry.size} (truncated?)"
    if hash_file(path) != entry.sha256:
        return f"{name} was changed (its sha256 differs)"
    return ""


def hash_file(path: Path) -> str:
    """sha256 of a file as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_onnxruntime(minimum: str) -> None:
    """Refuse an ONNX Runtime older than ``minimum``.

    Raises:
        BackendUnavailableError: with both versions.
    """
    if is_older(onnxruntime_version(), minimum):
        raise BackendUnavailableError(
            f"this bundle needs onnxruntime {minimum} or newer, {onnxruntime_version()} is installed; "
            f"upgrade it ({_upgrade()})"
        )


def _upgrade() -> str:
    """How to install a newer ONNX Runtime over the one that is there; a second wheel would overwrite its files."""
    return f"pip install -U {' '.join(onnxruntime_wheels()) or 'onnxruntime'}"


def is_older(version: str, minimum: str) -> bool:
    """Whether a version of ONNX Runtime comes before ``minimum``; patch levels do not count.

    Raises:
        BundleCorruptError: one of them is no version.
    """
    return _version(version) < _version(minimum)


def _version(text: str) -> tuple[int, ...]:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    if numbers is None:
        raise BundleCorruptError(f"{spec.MANIFEST}: minimum_onnxruntime {text!r} is no version such as 1.22")
    return tuple(map(int, numbers.groups()))
