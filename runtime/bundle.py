"""Reading and verifying a bundle folder; docs/bundle.md describes the format."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from owl2.runtime import spec
from owl2.runtime.config import ModelConfig, from_json, require
from owl2.runtime.errors import BundleCorruptError, BundleError, BundleVersionError, ConfigError
from owl2.runtime.foreign import cut, read_json, reading, shorten
from owl2.runtime.graph_file import graph_problems
from owl2.runtime.open_file import OpenFile
from owl2.runtime.spec import DialectName, FloatType, KvType, VisionType, WeightType
from owl2.runtime.tensors import StoredTensor, check_shapes, stored_tensors
from owl2.runtime.token_table import FileTable
from owl2.runtime.verification import FileEntry, OnProgress, require_file_names, verify_files

MANIFEST_BYTES = 1 << 20
READ_VERSIONS = (3, 4, 5, spec.FORMAT_VERSION)
FIRST_WITH_DIGEST, FIRST_WITH_PRESET = 5, 6
VERSION = re.compile(r"\d+(\.\w+)*")
PRESET = re.compile(r"[a-z0-9-]{0,64}")


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Storage types of the weights.

    Attributes:
        decoder: fp32, fp16, int8 or int4 linear layers.
        head: the same for the output head.
        vision: fp32, fp16 or int8 tower and abstractor.
        embeddings: fp32 or fp16 rows of the token table.
        method: gptq or rtn for integer decoders, ``gptq checkpoint`` where a checkpoint's own integers were kept, none
            otherwise.
        group_size: columns per scale; 0 where nothing is grouped.
    """

    decoder: WeightType
    head: WeightType
    vision: VisionType
    embeddings: Literal["fp32", "fp16"]
    method: str
    group_size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of ``owl2.json``.

    Attributes:
        format: version of the bundle format.
        producer: the exporter, with its version.
        dialect: operator set of the graphs: ``ort`` for ONNX Runtime, ``onnx`` for TensorRT.
        activations: type in which the graphs compute.
        minimum_onnxruntime: lowest version that has the operators of the graphs, int8 K/V aside.
        kv_cache: types of the K/V cache to choose from, the activations' own among them, each with the lowest ONNX
            Runtime that has its attention.
        family: of models, which decides template, tokenizer and positions; see :mod:`owl2.runtime.families`.
        preset: name of the preset with which the model scores images; empty where it is not known to.
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
    family: Literal["mplug_owl2"]
    preset: str
    weights: WeightFormat
    model: ModelConfig
    files: Mapping[str, FileEntry]
    engines: Mapping[str, str]

    def __post_init__(self) -> None:
        known = ", ".join(spec.DECODER_GRAPHS)
        for kv_type in self.kv_cache:
            require(kv_type in spec.DECODER_GRAPHS, f"kv_cache: {shorten(kv_type)} is not known; known: {known}")
        require(self.activations in self.kv_cache, f"kv_cache: {self.activations}, the type of activations, is missing")
        for name, minimum in (("minimum_onnxruntime", self.minimum_onnxruntime), *self.kv_cache.items()):
            fits = not minimum or VERSION.fullmatch(minimum) is not None  # none where ONNX Runtime runs no such graph
            require(fits, f"{name} {shorten(minimum)} is not a version such as 1.22")
        require(
            PRESET.fullmatch(self.preset) is not None, f"preset {shorten(self.preset)} is not a name such as q-align"
        )
        require_file_names(self.files, "files")
        require_file_names(self.engines, "engines")
        require(spec.MANIFEST not in self.files, f"files: {spec.MANIFEST} cannot list itself")

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; :meth:`from_json` is the inverse."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """See :func:`content_digest`."""
        return content_digest(self.to_json())

    def sealed(self) -> dict[str, Any]:
        """What ``owl2.json`` holds: this content in the present format, with its digest."""
        current = replace(self, format=spec.FORMAT_VERSION)
        return current.to_json() | {"digest": current.digest}

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
            f"kv_cache {shorten(asked)}: this bundle offers {offered}; choose one of these or export the checkpoint "
            "again",
        )
        return asked or self.activations

    def kv_bytes(self, kv_type: KvType) -> int:
        """Bytes that keys and values of one position take in all layers."""
        return spec.kv_bytes(self.model.decoder, kv_type, self.dialect)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are those that its manifest lists."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, force: bool = False, on_progress: OnProgress | None = None
    ) -> Bundle:
        """Read the manifest and verify every file against it.

        Args:
            folder: written by ``owl2-export``.
            force: hash files again that have not changed since they were last verified.
            on_progress: told how many bytes have been hashed.

        Raises:
            BundleError: the folder is not a bundle.
            BundleVersionError: a format this version does not read.
            BundleCorruptError: files are missing, truncated or changed; the message names all of them.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        require_whole(folder, check_files(folder, manifest, force=force, on_progress=on_progress))
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        """Full path of a file of the bundle."""
        return self.folder / name

    def decoder_graph(self, kv_cache: KvType | None = None) -> Path:
        """Full path of the decoder graph with this type of K/V cache; None for that of the activations.

        Raises:
            ConfigError: the bundle does not offer it.
        """
        return self.path(spec.DECODER_GRAPHS[self.manifest.kv_type(kv_cache)])

    def open_file(self, name: str) -> OpenFile:
        """A listed file, held open; raises as :class:`OpenFile`."""
        return OpenFile(self.path(name), self.manifest.files[name])

    def tensors(self, graph: str) -> Mapping[str, StoredTensor]:
        """The weights of a graph by name; raises BundleCorruptError where the graph cannot be read."""
        return stored_tensors(self.path(graph))

    def check_shapes(self, graph: str, expected: Mapping[str, tuple[int | None, ...]]) -> None:
        """Refuse a graph whose inputs and outputs are not the model's, None being any size; raises BundleError."""
        check_shapes(self.path(graph), expected)

    def token_table(self) -> FileTable:
        """The rows of ``embeddings.bin``."""
        decoder, stored = self.manifest.model.decoder, self.manifest.weights.embeddings
        return FileTable(self.open_file(spec.EMBEDDINGS), decoder, stored)


def read_manifest(folder: Path) -> Manifest:
    """Read ``owl2.json`` only.

    Raises:
        BundleError, BundleVersionError, BundleCorruptError: as :meth:`Bundle.open`.
    """
    path = folder / spec.MANIFEST
    with reading(path, BundleCorruptError, "copy or export the bundle again"):
        if not folder.exists():
            raise BundleError(f"{folder} does not exist; give a folder written by owl2-export")
        if not folder.is_dir():
            raise BundleError(f"{folder} is a file; give the folder that owl2-export wrote")
        if not path.exists():
            is_checkpoint = (folder / "config.json").is_file()
            converting = f"it is a PyTorch checkpoint: convert it with owl2-export {folder} BUNDLE"
            hint = converting if is_checkpoint else "give a folder written by owl2-export"
            raise BundleError(f"{folder} is not a bundle: {spec.MANIFEST} is missing; {hint}")
        data = read_json(path, MANIFEST_BYTES)
        version = data.get("format") if isinstance(data, dict) else None
        if type(version) is not int or version not in READ_VERSIONS:
            raise BundleVersionError(
                f"{path} has format version {shorten(version)}, this owl2 reads versions "
                f"{READ_VERSIONS[0]} to {READ_VERSIONS[-1]}; export the checkpoint again (owl2-export CHECKPOINT "
                "BUNDLE --overwrite) or install the owl2 that wrote it"
            )
        if version >= FIRST_WITH_DIGEST and data.pop("digest", None) != content_digest(data):
            raise BundleCorruptError(
                f"{path} was changed: its digest is not that of its content; copy or export the bundle again"
            )
    try:
        return Manifest.from_json(_migrated(data, version))
    except ConfigError as error:
        raise BundleCorruptError(f"{path}: {cut(str(error), 500)}; copy or export the bundle again") from error


def _migrated(data: dict[str, Any], version: int) -> dict[str, Any]:
    """The content of a manifest of an older format, in the terms of the present one."""
    if version <= 3 and "family" not in data:  # called it by the name of the template
        data = {"family" if key == "template" else key: value for key, value in data.items()}
    match data:
        case {"model": {"decoder": {"eos_token_id": end, **decoder}, **model}} if version <= 4:  # there was one
            data = {**data, "model": {**model, "decoder": {**decoder, "eos_token_ids": [end]}}}
    if version >= FIRST_WITH_PRESET:
        return data
    require("preset" not in data, "unknown keys preset")
    return {**data, "preset": ""}


def fingerprint(manifest: Manifest, names: Collection[str] | None = None) -> str:
    """What tells bundles with other weights apart: a hash (hex) of the hashes of its files.

    Args:
        manifest: of the bundle.
        names: of the files that count; None for all.
    """
    hashes = {name: entry.sha256 for name, entry in manifest.files.items() if names is None or name in names}
    return content_digest(hashes)


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a manifest's content but for ``digest`` itself, written in one canonical way.

    That is JSON in ASCII, keys sorted, no spaces, numbers as Python writes them; see docs/bundle.md.
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def check_files(
    folder: Path, manifest: Manifest, *, force: bool = False, on_progress: OnProgress | None = None
) -> list[str]:
    """Compare size and hash of every file with the manifest; returns one sentence per problem."""
    graphs = [spec.DECODER_GRAPHS[kv_type] for kv_type in spec.DECODER_GRAPHS if kv_type in manifest.kv_cache]
    unlisted = [name for name in dict.fromkeys((*spec.BUNDLE_FILES, *graphs)) if name not in manifest.files]
    problems = [f"{name} is not listed in {spec.MANIFEST}" for name in unlisted]
    decoder, weights = manifest.model.decoder, manifest.weights
    rows = manifest.files.get(spec.EMBEDDINGS)
    expected = decoder.vocab_size * decoder.hidden_size * (2 if weights.embeddings == "fp16" else 4)
    if rows is not None and rows.size != expected:
        problems.append(f"{spec.EMBEDDINGS} has {rows.size} bytes, the model's token table takes {expected}")
    problems += verify_files(folder, manifest.files, force=force, on_progress=on_progress)
    if not problems:
        for name in (spec.VISION_GRAPH, *dict.fromkeys(graphs)):
            data = (spec.VISION_GRAPH if name == spec.VISION_GRAPH else spec.DECODER_GRAPH) + ".data"
            problems += graph_problems(folder / name, data, manifest.files[data].size)
    return problems


def require_whole(folder: Path, problems: Sequence[str]) -> None:
    """Refuse a bundle with problems.

    Raises:
        BundleCorruptError: there are any; names all of them.
    """
    if problems:
        raise BundleCorruptError(f"{folder}: " + "; ".join(problems) + "; copy or export the bundle again")
