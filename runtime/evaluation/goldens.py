"""The golden prompts of a bundle, with the logits they must lead to and the divergence that a device may show.

The expected logits in ``goldens.npz`` are those of the bundle's own graphs, its vision side included, with activations
in float32: every device should come close to them, whichever kernels it has. So a replay measures the device, not what
quantizing cost. ``report.json`` holds the divergence of the exporting machine and the limit for a device.

Logits say nothing of what only shows elsewhere: at which token an answer ends, or the rotary angles of long
conversations. The file records these too, and the pixels that each image becomes, which must be the same everywhere.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import LONGEST_CONTEXT, ModelConfig, from_json, require
from owl2.runtime.engine import Floats, Ints
from owl2.runtime.errors import BundleCorruptError
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.foreign import listed, read_bytes, read_json, reason, shorten
from owl2.runtime.harmless import harmless
from owl2.runtime.rope import rotary_angles

COMPARED_POSITIONS = 8
"""Text positions at the end of a golden prompt whose logits are compared."""

MAX_GOLDENS = 16
MAX_BYTES = 1 << 27
"""Of the file, and of all arrays together; a file that claims more is not read."""
MAX_DIRECTORY = 1 << 18
"""Bytes of the zip archive's list of names."""
MAX_TEXT = 1 << 16
"""Bytes of a name or a prompt."""
MAX_FACTS = 64
"""Entries of a list among the facts."""

NPY_START = b"\x93NUMPY\x01\x00"
# As numpy writes it: its own reader evaluates whatever Python literal is there, and warns of some.
NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[|<][uif][0-9])', 'fortran_order': False, 'shape': \((?P<shape>[0-9, ]{0,100})\), \} *\n"
)

ARRAY_TYPES = {
    "name": "|u1", "prompt": "|u1", "ids": "<i8", "positions": "<i8", "logits": "<f4", "image": "|u1", "pixels": "|u1",
    "end_ids": "<i8", "context": "<i8", "lengths": "<i8", "angles": "<f4",
}  # fmt: skip
FIRST_WITH_FACTS = 5
"""Format of the bundle."""
ANGLE_TOLERANCE = 1e-5
"""Relative; float32 powers differ by less than a tenth of it between machines, and any other theta by more."""


@dataclass(frozen=True, eq=False)
class Golden:
    """A prompt and the logits it must lead to.

    Attributes:
        prompt: raw text with one ``<|image|>`` per image.
        ids: its token ids, -200 per image.
        images: uint8 [H, W, 3] each.
        pixels: digest of each image after preprocessing; empty where a bundle of an older format has none.
        positions: int64 [R], merged positions whose logits are compared.
        logits: float32 [R, V].
    """

    name: str
    prompt: str
    ids: Ints
    images: tuple[NDArray[np.uint8], ...]
    pixels: tuple[str, ...]
    positions: Ints
    logits: Floats


@dataclass(frozen=True, eq=False)
class Facts:
    """What a runtime makes of the manifest and no logits show.

    Attributes:
        end_ids: int64, the tokens that end an answer.
        context: positions that the model was trained for.
        lengths: int64 [R], lengths of sequences.
        angles: float32 [R, D/2], rotary angles of their last positions.
    """

    end_ids: Ints
    context: int
    lengths: Ints
    angles: Floats

    @classmethod
    def of(cls, model: ModelConfig) -> Facts:
        """Those of a model, at lengths near and far; scaling shows beyond the trained length."""
        context = model.decoder.max_position_embeddings
        lengths = np.array([2, context // 2 + 1, context, 2 * context], np.int64)
        end_ids = np.array(model.decoder.eos_token_ids, np.int64)
        return cls(end_ids, context, lengths, _last_angles(model, lengths))

    def differences(self, model: ModelConfig) -> list[str]:
        """Compare with what this runtime makes of a manifest; a sentence for each difference."""
        found, angles = Facts.of(model), _last_angles(model, self.lengths)
        same = angles.shape == self.angles.shape and np.allclose(angles, self.angles, rtol=ANGLE_TOLERANCE, atol=0)
        end_ids, recorded = (", ".join(map(str, sorted(each.end_ids.tolist()))) for each in (found, self))
        checks = {
            f"answers end at the tokens {end_ids}, on the exporting machine at {recorded}": end_ids == recorded,
            f"the context is {found.context} positions, on the exporting machine {self.context}": (
                found.context == self.context
            ),
            "the rotary angles are not those of the exporting machine": same,
        }
        return [sentence for sentence, holds in checks.items() if not holds]


def _last_angles(model: ModelConfig, lengths: Ints) -> Floats:
    return np.concatenate([rotary_angles(model.decoder, [length - 1], length) for length in lengths.tolist()])


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


def write_goldens(path: Path, goldens: Sequence[Golden], facts: Facts) -> None:
    """Write the file that :func:`read_goldens` reads; the same goldens give the same bytes."""
    arrays: dict[str, NDArray[Any]] = {
        "end_ids": facts.end_ids,
        "context": np.array([facts.context], np.int64),
        "lengths": facts.lengths,
        "angles": facts.angles,
    }
    for index, golden in enumerate(goldens):
        arrays |= {
            f"{index}.name": np.frombuffer(golden.name.encode(), dtype=np.uint8),
            f"{index}.prompt": np.frombuffer(golden.prompt.encode(), dtype=np.uint8),
            f"{index}.ids": golden.ids,
            f"{index}.positions": golden.positions,
            f"{index}.logits": golden.logits,
            **{f"{index}.image.{place}": image for place, image in enumerate(golden.images)},
            f"{index}.pixels": np.frombuffer(bytes.fromhex("".join(golden.pixels)), np.uint8).reshape(-1, 32),
        }
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read_goldens(bundle: Bundle) -> tuple[tuple[Golden, ...], Facts | None]:
    """The goldens of a bundle, and its facts unless it is of an older format, which has none.

    No memory is allocated for arrays that the file only claims to hold.

    Raises:
        BundleCorruptError: a file that no export writes.
    """
    path, model = bundle.path(spec.GOLDENS), bundle.manifest.model
    try:
        content = read_bytes(path, MAX_BYTES)
        _check_directory(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = _read_arrays(archive)
        count = sum(name.endswith(".prompt") for name in arrays)
        require(0 < count <= MAX_GOLDENS, f"it has {count} prompts, expected 1 to {MAX_GOLDENS}")
        has_facts = bundle.manifest.format >= FIRST_WITH_FACTS
        goldens = tuple(_golden(arrays, index, model, with_pixels=has_facts) for index in range(count))
        return goldens, _facts(arrays) if has_facts else None
    except Exception as error:  # zipfile and its decoders raise nearly anything on damaged data
        raise BundleCorruptError(
            f"{path} cannot be read as golden prompts: {reason(error)}; export the bundle again"
        ) from error


def read_baselines(bundle: Bundle, goldens: Sequence[Golden]) -> dict[str, Baseline]:
    """The report's entry of each golden, by name; raises BundleCorruptError if a golden has none."""
    path = bundle.path(spec.REPORT)
    try:
        entries = read_json(path)["goldens"]
        baselines = {entry["name"]: from_json(Baseline, entry, "goldens") for entry in entries}
    except Exception as error:  # an index of whatever is there
        raise BundleCorruptError(
            f"{path} has no limits for golden prompts: {reason(error)}; export the bundle again"
        ) from error
    missing = [golden.name for golden in goldens if golden.name not in baselines]
    if missing:
        raise BundleCorruptError(
            f"{path} has no limits for the golden prompts {listed(missing)}; export the bundle again"
        )
    return baselines


def _check_directory(content: bytes) -> None:
    """Refuse an archive with a list of names that is long, or that zipfile might look for elsewhere."""
    end = content[-22:]
    require(end[:4] == b"PK\5\6" and content[-42:-38] != b"PK\6\7", "it does not end as a plain zip archive")
    size = int.from_bytes(end[12:16], "little")
    require(size <= MAX_DIRECTORY, f"its list of names takes {size} bytes, at most {MAX_DIRECTORY} are read")


def _read_arrays(archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    require(total <= MAX_BYTES, f"its arrays take {total} bytes, at most {MAX_BYTES} are read")
    require(len(members) <= 32 * MAX_GOLDENS, f"it has {len(members)} arrays, at most {32 * MAX_GOLDENS} are read")
    require(not any(member.flag_bits & 1 for member in members), "it is encrypted")
    arrays = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        expected = ARRAY_TYPES.get(name.split(".")[1] if "." in name else name)
        with archive.open(member) as file:
            start = file.read(10)
            require(start[:8] == NPY_START, f"{shorten(name)} is not an array in version 1.0 of the npy format")
            header = NPY_HEADER.fullmatch(file.read(int.from_bytes(start[8:], "little")))
            found = None if header is None else header["type"].decode()
            require(header is not None and found == expected, f"{shorten(name)} has type {found}, expected {expected}")
            shape = [int(count) for count in header["shape"].split(b",") if count.strip()] if header else []
            dtype = np.dtype(expected)
            size = math.prod(shape) * dtype.itemsize
            content = file.read(size + 1) if size <= member.file_size else b""
            require(len(content) == size, f"{shorten(name)} does not hold the {shorten(shape)} values it claims")
            arrays[name] = np.frombuffer(content, dtype=dtype).reshape(shape)
    return arrays


def _facts(arrays: Mapping[str, NDArray[Any]]) -> Facts:
    end_ids, context, lengths, angles = (arrays[name] for name in ("end_ids", "context", "lengths", "angles"))
    fits = context.shape == (1,) and end_ids.ndim == 1 and angles.ndim == 2 and lengths.shape == angles.shape[:1]
    few = 0 < len(lengths) <= MAX_FACTS and len(end_ids) <= MAX_FACTS
    require(fits and few, "its facts about the model have wrong shapes")
    require(bool(((lengths > 0) & (lengths <= 2 * LONGEST_CONTEXT)).all()), "its lengths of sequences are impossible")
    return Facts(end_ids, int(context[0]), lengths, angles)


def _golden(arrays: Mapping[str, NDArray[Any]], index: int, model: ModelConfig, *, with_pixels: bool) -> Golden:
    images = sorted(name for name in arrays if name.startswith(f"{index}.image."))
    name, prompt = (arrays[f"{index}.{key}"].tobytes() for key in ("name", "prompt"))
    require(max(len(name), len(prompt)) <= MAX_TEXT, f"prompt {index} has more than {MAX_TEXT} bytes")
    pixels = arrays[f"{index}.pixels"] if with_pixels else np.zeros((0, 32), np.uint8)
    right = pixels.shape == (len(images), 32) or not with_pixels
    require(right, f"the digests of the images of prompt {index} are {list(pixels.shape)}")
    golden = Golden(
        name=harmless(name.decode()),
        prompt=prompt.decode(),
        ids=arrays[f"{index}.ids"],
        images=tuple(arrays[name] for name in images),
        pixels=tuple(digest.tobytes().hex() for digest in pixels),
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
