"""The certificate of a bundle: prompts with the logits they must lead to, replayed on the device at hand.

The expected logits are those of the bundle's own graphs, its vision side included, with activations in float32: what
every device should come near, whichever kernels it has. How near the exporting machine came, and how near a device
has to come, is in the report. So a replay measures the device and not what quantizing cost.
"""

from __future__ import annotations

import json
import math
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl2.runtime import spec
from owl2.runtime.backends.tensorrt.records import check_all
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import ModelConfig, from_json, require
from owl2.runtime.engine import DecoderEngine, EngineOptions, Floats, Ints, KvBuffers
from owl2.runtime.errors import BundleCorruptError, ConfigError
from owl2.runtime.evaluation.divergence import row_kl
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed, encode_prompt
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import prepare_images
from owl2.runtime.load import Preparation
from owl2.runtime.placement import Placement

POSITIONS = 8
"""So many text positions at the end of a prompt are compared."""

DECODED_STEPS = 4
"""So many text positions at the end of a prompt are decoded one by one, so that the cached step is replayed too."""

MOST_GOLDENS = 16
MOST_BYTES = 1 << 27
"""Of all arrays together; a file that claims more is not read."""

FORMATS = {"name": "|u1", "prompt": "|u1", "ids": "<i8", "positions": "<i8", "logits": "<f4", "image": "|u1"}


@dataclass(frozen=True, eq=False)
class Golden:
    """A prompt and what it must lead to.

    Attributes:
        name: for people.
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
    """The exporting machine's result on a golden, and the limit for a device.

    Attributes:
        name: of the golden.
        positions: compared.
        kl: mean Kullback-Leibler divergence of its distributions from the expected ones, nats.
        top1_agreement: share of positions with the same most likely token.
        limit: the largest ``kl`` at which a device passes.
    """

    name: str
    positions: int
    kl: float
    top1_agreement: float
    limit: float


@dataclass(frozen=True, slots=True)
class Replay:
    """What this device reached on a golden; ``problem`` says what else is wrong, if anything."""

    name: str
    positions: int
    kl: float
    top1_agreement: float
    limit: float
    exported_kl: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the device came near enough; NaN is not."""
        return not self.problem and self.kl <= self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found.

    Attributes:
        problems: of files, a sentence each; with any, nothing was replayed.
        replays: one per golden.
        load_seconds, replay_seconds: time taken, checking the files apart.
    """

    problems: tuple[str, ...]
    replays: tuple[Replay, ...]
    load_seconds: float
    replay_seconds: float

    @property
    def passed(self) -> bool:
        """Whether every file is whole and every golden was reached."""
        return not self.problems and bool(self.replays) and all(replay.passed for replay in self.replays)


def verify(folder: Path, device: Placement, threads: int | None = None, *, check_memory: bool = True) -> Verdict:
    """Check every file of a bundle, all engines among them, and replay its goldens on this device.

    Args:
        folder: of the bundle.
        device: what shall run it.
        threads: of the CPU; None lets ONNX Runtime choose.
        check_memory: refuse before anything is read if the weights cannot fit the device's free memory.

    Raises:
        BundleError: there is no bundle, or its certificate cannot be read though the hashes hold, or it has no engines
            that the device can run.
        BackendError: the device cannot be had or cannot run the bundle, told before files are checked; or the graphs
            cannot be loaded or fail.
        InsufficientMemoryError: they cannot fit.
    """
    prepared = Preparation.of(folder, EngineOptions(device, threads), check_memory=check_memory)
    manifest = prepared.manifest
    problems = [*prepared.problems(force=True), *check_all(folder, manifest)[1]]
    if problems:
        return Verdict(tuple(problems), (), 0.0, 0.0)
    bundle = Bundle(folder, manifest)
    goldens = read_goldens(bundle)
    limits = read_limits(bundle, goldens)
    began = time.perf_counter()
    _, model = prepared.open()
    engine, tokenizer, encoder, table = model.engine, model.tokenizer, model.encoder, model.table
    loaded = time.perf_counter()
    replays = []
    for golden in goldens:
        entry = limits[golden.name]
        prompt = golden_prompt(golden.prompt, golden.images, manifest.model, tokenizer)
        if tokenizer.encode_prompt(golden.prompt) != golden.ids.tolist():
            problem = "the tokenizer divides the prompt differently than where the bundle was exported"
            replays.append(Replay(golden.name, 0, math.nan, 0.0, entry.limit, entry.kl, problem))
            continue
        rows, _ = encoder.rows(list(prompt.images.values()))
        kl, agreement = distance(golden.logits, run_golden(engine, table, prompt, rows, golden.positions))
        replays.append(Replay(golden.name, len(golden.positions), kl, agreement, entry.limit, entry.kl))
    return Verdict((), tuple(replays), loaded - began, time.perf_counter() - loaded)


def golden_prompt(text: str, images: Sequence[NDArray[np.uint8]], model: ModelConfig, tokenizer: Tokenizer) -> Prompt:
    """A golden's prompt with its images, cut where the context ends."""
    prepared = prepare_images(list(images), model.preprocess, None)
    prompt = encode_prompt(text, prepared, tokenizer, model.rows_per_image)
    return Prompt(prompt.keys[: model.decoder.max_position_embeddings], prompt.images)


def golden_positions(prompt: Prompt) -> Ints:
    """The last text positions of a prompt: int64 [R]."""
    text = [position for position, key in enumerate(prompt.keys) if isinstance(key, int)]
    return np.array(text[-POSITIONS:], dtype=np.int64)


def run_golden(
    decoder: DecoderEngine,
    table: NDArray[np.floating[Any]],
    prompt: Prompt,
    rows: Mapping[str, Floats],
    positions: Ints,
) -> Floats:
    """Logits [R, V] of ``positions``: most of the prompt in one prefill, its end step by step from the KV cache.

    Args:
        decoder: runs the graph.
        table: token embeddings [V, C].
        prompt: merged positions.
        rows: of its images, by digest, each [queries + 1, C].
        positions: int64 [R], rising.
    """
    embeds, modality = embed(prompt.keys, table, rows)
    return stepwise_logits(decoder, embeds, modality, positions, decoder.allocate(len(embeds), None))


def stepwise_logits(
    decoder: DecoderEngine, embeds: Floats, modality: Ints, positions: Ints, buffers: KvBuffers
) -> Floats:
    """Logits [R, V] of ``positions``: most of a prompt in one prefill, its end step by step from the KV cache.

    Args:
        decoder: runs the graph.
        embeds: [T, C].
        modality: [T], 1 at image rows.
        positions: int64 [R], rising.
        buffers: empty, for T positions.
    """
    count = len(embeds)
    images = np.flatnonzero(modality)
    first = max(count - DECODED_STEPS, int(images[-1]) + 1 if len(images) else 1)
    wanted = positions[positions < first]
    asked = wanted if len(wanted) else np.array([first - 1])
    made = [decoder.prefill(embeds[:first], modality[:first], 0, buffers, asked)[: len(wanted)]]
    steps = [decoder.decode(embeds[i : i + 1], i, buffers) for i in range(first, count)]
    made += [logits[None] for i, logits in enumerate(steps, first) if i in positions]
    return np.concatenate(made)


def distance(expected: Floats, made: Floats) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence in nats and share of equal best tokens: logits [R, V] twice.

    A logit that is NaN or infinite makes the divergence NaN.
    """
    if not np.isfinite(made).all():
        return math.nan, 0.0
    return float(row_kl(expected, made).mean()), float((expected.argmax(-1) == made.argmax(-1)).mean())


def write_goldens(path: Path, goldens: Sequence[Golden]) -> None:
    """Write the file of a bundle that :func:`read_goldens` reads; the same goldens give the same bytes."""
    arrays: dict[str, NDArray[Any]] = {}
    for index, golden in enumerate(goldens):
        arrays |= {
            f"{index}.name": _bytes(golden.name),
            f"{index}.prompt": _bytes(golden.prompt),
            f"{index}.ids": golden.ids,
            f"{index}.positions": golden.positions,
            f"{index}.logits": golden.logits,
            **{f"{index}.image.{place}": image for place, image in enumerate(golden.images)},
        }
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read_goldens(bundle: Bundle) -> tuple[Golden, ...]:
    """The goldens of a bundle; nothing is allocated for what the file only claims to hold.

    Raises:
        BundleCorruptError: the file is not what an export writes.
    """
    path = bundle.path(spec.GOLDENS)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _arrays(archive)
        return _goldens(arrays, bundle.manifest.model)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleCorruptError(f"{path} is no certificate: {error}; export the bundle again") from error


def read_limits(bundle: Bundle, goldens: Sequence[Golden]) -> dict[str, Baseline]:
    """The report's entry on each golden, by name.

    Raises:
        BundleCorruptError: the report is not what an export writes, or has no entry for a golden.
    """
    path = bundle.path(spec.REPORT)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["goldens"]
        baselines = [from_json(Baseline, entry, "goldens") for entry in entries]
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise BundleCorruptError(f"{path} holds no certificate: {error!r}; export the bundle again") from error
    missing = [golden.name for golden in goldens if golden.name not in {entry.name for entry in baselines}]
    if missing:
        raise BundleCorruptError(f"{path} holds no certificate for {', '.join(missing)}; export the bundle again")
    return {entry.name: entry for entry in baselines}


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _arrays(archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    require(total <= MOST_BYTES, f"its arrays take {total} bytes, at most {MOST_BYTES} are read")
    require(len(members) <= 32 * MOST_GOLDENS, f"it has {len(members)} arrays")
    arrays = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        kind = name.split(".")[1] if name.count(".") else name
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            require(version == (1, 0), f"{name} has version {version} of the npy format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            require(dtype.str == FORMATS.get(kind), f"{name} has type {dtype.str}, expected {FORMATS.get(kind)}")
            size = math.prod(shape) * dtype.itemsize
            content = file.read(size + 1) if size <= member.file_size else b""
            require(len(content) == size and not fortran, f"{name} does not hold the {list(shape)} values it claims")
            arrays[name] = np.frombuffer(content, dtype=dtype).reshape(shape)
    return arrays


def _goldens(arrays: Mapping[str, NDArray[Any]], model: ModelConfig) -> tuple[Golden, ...]:
    count = sum(name.endswith(".prompt") for name in arrays)
    require(0 < count <= MOST_GOLDENS, f"it has {count} prompts")
    goldens = []
    for index in range(count):
        images = sorted(name for name in arrays if name.startswith(f"{index}.image."))
        golden = Golden(
            name=arrays[f"{index}.name"].tobytes().decode(),
            prompt=arrays[f"{index}.prompt"].tobytes().decode(),
            ids=arrays[f"{index}.ids"],
            images=tuple(arrays[name] for name in images),
            positions=arrays[f"{index}.positions"],
            logits=arrays[f"{index}.logits"],
        )
        positions, last = golden.positions, model.decoder.max_position_embeddings
        fits = positions.ndim == 1 and len(positions) and (np.diff(positions, prepend=-1) > 0).all()
        require(bool(fits) and int(positions[-1]) < last, f"the positions of prompt {index} do not rise within {last}")
        shape = (len(positions), model.decoder.vocab_size)
        require(golden.logits.shape == shape, f"the logits of prompt {index} are {golden.logits.shape}, not {shape}")
        require(bool(np.isfinite(golden.logits).all()), f"the logits of prompt {index} are not finite")
        goldens.append(golden)
    return tuple(goldens)
