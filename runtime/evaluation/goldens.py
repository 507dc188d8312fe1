"""The golden prompts of a bundle, with the logits they must lead to and the divergence that a device may show.

The expected logits in ``goldens.npz`` are those of the bundle's own graphs, its vision side included, with activations
in float32: every device should come close to them, whichever kernels it has. So a replay measures the device, not what
quantizing cost. ``report.json`` holds the divergence of the exporting machine and the limit for a device.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import ModelConfig, from_json, require
from owl2.runtime.engine import Floats, Ints
from owl2.runtime.errors import BundleCorruptError, ConfigError
from owl2.runtime.families.mplug_owl2.positions import Prompt

COMPARED_POSITIONS = 8
"""Text positions at the end of a golden prompt whose logits are compared."""

MAX_GOLDENS = 16
MAX_BYTES = 1 << 27
"""Of all arrays together; a file that claims more is not read."""

ARRAY_TYPES = {"name": "|u1", "prompt": "|u1", "ids": "<i8", "positions": "<i8", "logits": "<f4", "image": "|u1"}


@dataclass(frozen=True, eq=False)
class Golden:
    """A prompt and the logits it must lead to.

    Attributes:
        prompt: raw text with one ``<|image|>`` per image.
        ids: its token ids, -200 per image.
        images: uint8 [H, W, 3] each.
        positions: int64 [R], merged positions whose logits are compared.
        logits: float32 [R, V].
    """

    name: str
    prompt: str
    ids: Ints
    images: tuple[NDArray[np.uint8], ...]
    positions: Ints
    logits: Floats


@dataclass(frozen=True, slots=True)
class Baseline:
    """The exporting machine's result on a golden, and the limit for a device: an entry of the report.

    Attributes:
        name: of the golden.
        kl: mean Kullback-Leibler divergence of its distributions from the expected ones, nats.
        top1_agreement: share of positions with the same most likely token.
        limit: the largest ``kl`` at which a device passes.
    """

    name: str
    positions: int
    kl: float
    top1_agreement: float
    limit: float


def golden_positions(prompt: Prompt) -> Ints:
    """The last text positions of a prompt: int64 [R]."""
    text = [position for position, key in enumerate(prompt.keys) if isinstance(key, int)]
    return np.array(text[-COMPARED_POSITIONS:], dtype=np.int64)


def write_goldens(path: Path, goldens: Sequence[Golden]) -> None:
    """Write the file that :func:`read_goldens` reads; the same goldens give the same bytes."""
    arrays: dict[str, NDArray[Any]] = {}
    for index, golden in enumerate(goldens):
        arrays |= {
            f"{index}.name": np.frombuffer(golden.name.encode(), dtype=np.uint8),
            f"{index}.prompt": np.frombuffer(golden.prompt.encode(), dtype=np.uint8),
            f"{index}.ids": golden.ids,
            f"{index}.positions": golden.positions,
            f"{index}.logits": golden.logits,
            **{f"{index}.image.{place}": image for place, image in enumerate(golden.images)},
        }
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read_goldens(bundle: Bundle) -> tuple[Golden, ...]:
    """The goldens of a bundle; raises BundleCorruptError for a file that no export writes.

    No memory is allocated for arrays that the file only claims to hold.
    """
    path = bundle.path(spec.GOLDENS)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _read_arrays(archive)
        count = sum(name.endswith(".prompt") for name in arrays)
        require(0 < count <= MAX_GOLDENS, f"it has {count} prompts, expected 1 to {MAX_GOLDENS}")
        return tuple(_golden(arrays, index, bundle.manifest.model) for index in range(count))
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleCorruptError(
            f"{path} cannot be read as golden prompts: {error}; export the bundle again"
        ) from error


def read_baselines(bundle: Bundle, goldens: Sequence[Golden]) -> dict[str, Baseline]:
    """The report's entry of each golden, by name; raises BundleCorruptError if a golden has none."""
    path = bundle.path(spec.REPORT)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["goldens"]
        baselines = {entry["name"]: from_json(Baseline, entry, "goldens") for entry in entries}
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise BundleCorruptError(
            f"{path} has no limits for golden prompts: {error!r}; export the bundle again"
        ) from error
    missing = [golden.name for golden in goldens if golden.name not in baselines]
    if missing:
        raise BundleCorruptError(
            f"{path} has no limits for the golden prompts {', '.join(missing)}; export the bundle again"
        )
    return baselines


def _read_arrays(archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    require(total <= MAX_BYTES, f"its arrays take {total} bytes, at most {MAX_BYTES} are read")
    require(len(members) <= 32 * MAX_GOLDENS, f"it has {len(members)} arrays, at most {32 * MAX_GOLDENS} are read")
    arrays = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        expected = ARRAY_TYPES.get(name.split(".")[1] if "." in name else name)
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            require(version == (1, 0), f"{name} has version {version} of the npy format, expected (1, 0)")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            require(dtype.str == expected, f"{name} has type {dtype.str}, expected {expected}")
            size = math.prod(shape) * dtype.itemsize
            content = file.read(size + 1) if size <= member.file_size else b""
            require(len(content) == size and not fortran, f"{name} does not hold the {list(shape)} values it claims")
            arrays[name] = np.frombuffer(content, dtype=dtype).reshape(shape)
    return arrays


def _golden(arrays: Mapping[str, NDArray[Any]], index: int, model: ModelConfig) -> Golden:
    images = sorted(name for name in arrays if name.startswith(f"{index}.image."))
    golden = Golden(
        name=arrays[f"{index}.name"].tobytes().decode(),
        prompt=arrays[f"{index}.prompt"].tobytes().decode(),
        ids=arrays[f"{index}.ids"],
        images=tuple(arrays[name] for name in images),
        positions=arrays[f"{index}.positions"],
        logits=arrays[f"{index}.logits"],
    )
    positions, context = golden.positions, model.decoder.max_position_embeddings
    rising = positions.ndim == 1 and len(positions) and (np.diff(positions, prepend=-1) > 0).all()
    require(
        bool(rising) and int(positions[-1]) < context,
        f"the positions of prompt {index} do not rise within the context of {context}",
    )
    shape = (len(positions), model.decoder.vocab_size)
    require(golden.logits.shape == shape, f"the logits of prompt {index} are {golden.logits.shape}, not {shape}")
    require(bool(np.isfinite(golden.logits).all()), f"the logits of prompt {index} are not finite")
    return golden
