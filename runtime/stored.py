"""Files that this project writes for itself: arrays and a description, in the layout of safetensors.

Any program that reads safetensors can read the arrays; hashes of every part are in the metadata. Nothing in such a file
is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.foreign import ForeignError, open_file, parse_json, shorten

VERSION = 1
LENGTH_BYTES = 8
HEADER_BYTES = 64 << 20
FILE_BYTES = 1 << 40
DIMENSIONS = 8
METADATA = "__metadata__"
TYPES: dict[str, type[np.generic]] = {"F32": np.float32, "I32": np.int32, "U8": np.uint8, "F16": np.float16}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
PRIVATE = 0o600
"""A conversation is nobody else's business."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """Content of a file.

    Attributes:
        description: a JSON object.
        arrays: by name.
    """

    description: Mapping[str, Any]
    arrays: Mapping[str, Array]


@dataclass(frozen=True)
class Place:
    """Where an array is: bytes first to stop behind the header."""

    dtype: type[np.generic]
    shape: tuple[int, ...]
    first: int
    stop: int


def write_stored(path: Path, kind: str, content: Stored) -> None:
    """Write a file as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, array in content.arrays.items():
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    hashes = {name: hashlib.sha256(_bytes(array)).hexdigest() for name, array in content.arrays.items()}
    metadata = {
        "kind": kind,
        "version": str(VERSION),
        "description": json.dumps(content.description, ensure_ascii=False),
        "hashes": json.dumps(hashes),
    }
    header[METADATA] = metadata | {"hash": _hash_of(header, metadata)}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 64 + 64 - LENGTH_BYTES)  # arrays begin where any type may
    start = len(text).to_bytes(LENGTH_BYTES, "little") + text
    write_whole(path, itertools.chain([start], map(_bytes, content.arrays.values())))


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk before anything that relies on it is written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file for its owner alone, as a whole or not at all: under another name, then in the older one's place.

    A process that is killed leaves a file of the pattern :func:`partial_of` at most.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(partial_of(path.name).replace("*", secrets.token_hex(4)))
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, PRIVATE)) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_of(pattern: str) -> str:
    """Pattern of the names under which files of this pattern are written."""
    return f".{pattern}.*.partial"


def read_stored(path: Path, kind: str) -> Stored:
    """Read a file of this kind, all hashes checked.

    Raises:
        ForeignError: it is of another kind or version, or damaged; says where.
        OSError: it cannot be read.
    """
    with open_file(path, FILE_BYTES) as file:
        header, metadata, begin = _start(file, kind)
        places, hashes = _checked_places(header, metadata, os.fstat(file.fileno()).st_size - begin)
        arrays = {name: _array(file, begin, name, place, hashes.get(name)) for name, place in places.items()}
    return Stored(_object(metadata["description"], "its description"), arrays)


def read_array(path: Path, kind: str, name: str) -> tuple[Mapping[str, Any], Array]:
    """The description and one array alone; raises as :func:`read_stored`, and KeyError without such an array."""
    with open_file(path, FILE_BYTES) as file:
        header, metadata, begin = _start(file, kind)
        places, hashes = _checked_places(header, metadata, os.fstat(file.fileno()).st_size - begin)
        array = _array(file, begin, name, places[name], hashes.get(name))
    return _object(metadata["description"], "its description"), array


def read_description(path: Path, kind: str) -> Mapping[str, Any]:
    """The description alone, whatever became of the arrays; raises as :func:`read_stored`."""
    with open_file(path, FILE_BYTES) as file:
        _, metadata, _ = _start(file, kind)
    return _object(metadata["description"], "its description")


def _start(file: BinaryIO, kind: str) -> tuple[dict[str, Any], dict[str, str], int]:
    """Header, its metadata, and where the arrays begin."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if len(start) < LENGTH_BYTES or not 0 < length <= min(HEADER_BYTES, size - LENGTH_BYTES):
        raise ForeignError(f"it is not a saved {kind}, or only its first {size} bytes are left")
    header, metadata = _header(file.read(length), kind)
    return header, metadata, LENGTH_BYTES + length


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _hash_of(header: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    rest = {name: entry for name, entry in header.items() if name != METADATA}
    told = {name: text for name, text in metadata.items() if name != "hash"}
    return hashlib.sha256(json.dumps([rest, told], sort_keys=True).encode()).hexdigest()


def _header(content: bytes, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        header = parse_json(content.decode())
    except UnicodeDecodeError as error:
        raise ForeignError(f"it is not a saved {kind}: its header is not UTF-8") from error
    metadata = header.get(METADATA) if isinstance(header, dict) else None
    wanted = ("kind", "version", "description", "hashes", "hash")
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(name), str) for name in wanted):
        raise ForeignError(f"it is not a saved {kind}")
    if metadata["kind"] != kind:
        raise ForeignError(f"it holds a saved {shorten(metadata['kind'])}, expected a saved {kind}")
    if metadata["version"] != str(VERSION):
        raise ForeignError(f"it has version {shorten(metadata['version'])}, this owl2 reads version {VERSION}")
    if _hash_of(header, metadata) != metadata["hash"]:
        raise ForeignError("its header was changed (its sha256 differs)")
    return header, metadata


def _places(header: Mapping[str, Any]) -> dict[str, Place]:
    """Places of the arrays, one behind the other."""
    places: dict[str, Place] = {}
    end = 0
    for name, entry in header.items():
        if name == METADATA:
            continue
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(first), int(stop)]} if (
                kind in TYPES
                and len(shape) <= DIMENSIONS
                and all(isinstance(length, int) and 0 <= length < FILE_BYTES for length in shape)
                and first == end
                and stop - first == math.prod(shape) * np.dtype(TYPES[kind]).itemsize
            ):
                places[name] = Place(TYPES[kind], tuple(shape), first, stop)
                end = stop
            case _:
                raise ForeignError(f"its part {shorten(name)} has no sensible place: {shorten(entry)}")
    return places


def _checked_places(
    header: Mapping[str, Any], metadata: Mapping[str, str], end: int
) -> tuple[dict[str, Place], dict[str, Any]]:
    """Places and hashes of the arrays, which must fill the file."""
    places = _places(header)
    expected = max((place.stop for place in places.values()), default=0)
    if end != expected:
        raise ForeignError(f"it has {end} bytes of data instead of {expected}: it was cut off or added to")
    return places, _object(metadata["hashes"], "the list of hashes")


def _array(file: BinaryIO, begin: int, name: str, place: Place, expected: object) -> Array:
    array = np.empty(place.stop - place.first, np.uint8)
    file.seek(begin + place.first)
    if file.readinto(array.data) != array.nbytes:  # type: ignore[attr-defined]  # of every file that is opened
        raise ForeignError(f"its part {name} ends early: the file was truncated while it was read")
    if hashlib.sha256(array.data).hexdigest() != expected:
        raise ForeignError(f"its part {name} was changed (its sha256 differs)")
    return array.view(place.dtype).reshape(place.shape)


def _object(text: str, what: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ForeignError(f"{what} is not a JSON object")
    return value
