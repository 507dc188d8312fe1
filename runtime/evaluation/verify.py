"""Verifying a bundle: every file is hashed, and its golden prompts are replayed on the device at hand."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from owl2.runtime.arguments import checked
from owl2.runtime.backends.tensorrt.records import check_all
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import BackendName, DecoderEngine, EngineOptions, Floats, Ints, KvBuffers
from owl2.runtime.evaluation.divergence import row_kl
from owl2.runtime.evaluation.goldens import Baseline, Golden, read_baselines, read_goldens
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed
from owl2.runtime.load import Loaded, Preparation
from owl2.runtime.placement import CPU, Placement
from owl2.runtime.token_table import TokenTable
from owl2.runtime.verification import OnProgress

DECODED_STEPS = 4
"""Text positions at the end of a prompt that are decoded one by one, so that the cached step is replayed too."""
NOT_RECORDED = (
    "preprocessing, end tokens and rotary angles were not compared: an older owl2 exported this bundle and did not "
    "record them; export it again to have them compared"
)


@dataclass(frozen=True, slots=True)
class Replay:
    """Result of this device on a golden prompt.

    Attributes:
        name, positions, kl, top1_agreement, limit: as in :class:`Baseline`, but of this device.
        exported_kl: of the exporting machine.
        problem: why nothing was compared; empty if it was.
    """

    name: str
    positions: int
    kl: float
    top1_agreement: float
    limit: float
    exported_kl: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the divergence is within the limit; NaN is not."""
        return not self.problem and self.kl <= self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a verification.

    Attributes:
        problems: of files, a sentence each; with any, nothing was replayed.
        replays: one per golden.
        load_seconds, replay_seconds: without the time that hashing took.
        differences: of what the runtime makes of the manifest, from what the export recorded; a sentence each.
        notes: on what could not be compared.
    """

    problems: tuple[str, ...]
    replays: tuple[Replay, ...]
    load_seconds: float
    replay_seconds: float
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every file is intact, nothing differs and every golden is within its limit."""
        whole = not self.problems and not self.differences and bool(self.replays)
        return whole and all(replay.passed for replay in self.replays)


@checked
def verify(
    bundle: str | os.PathLike[str],
    *,
    device: str = CPU,
    threads: int | None = None,
    backend: BackendName | None = None,
    check_memory: bool = True,
    progress: OnProgress | None = None,
) -> Verdict:
    """Hash every file of a bundle, those of all its engines included, and replay its golden prompts on a device.

    Args:
        bundle: folder written by ``owl2-export``.
        device, threads, backend, check_memory: as in :meth:`Owl2.load`.
        progress: called with a :class:`LoadProgress` a few times a second.

    Raises:
        BundleError: the folder is not a bundle, has no engines that the device can run, or has golden prompts that
            cannot be read though their hash is right.
        BackendError: the device is not available or cannot run the bundle, which is checked before files are hashed;
            or a graph cannot be loaded or fails.
        InsufficientMemoryError: the model cannot fit.
    """
    folder = Path(bundle)
    options = EngineOptions(Placement.parse(device), threads, backend=backend)
    prepared = Preparation.of(folder, options, check_memory=check_memory)
    problems = prepared.problems(force=True, on_progress=progress)
    problems += check_all(folder, prepared.manifest, force=True)[1]
    if problems:
        return Verdict(tuple(problems), (), 0.0, 0.0)
    intact = Bundle(folder, prepared.manifest)
    goldens, facts = read_goldens(intact)
    baselines = read_baselines(intact, goldens)
    began = time.perf_counter()
    _, model = prepared.open(on_progress=progress)
    loaded = time.perf_counter()
    with closing(model):
        replays = tuple(replay(model, golden, baselines[golden.name]) for golden in goldens)
        differences = () if facts is None else tuple(facts.differences(model.config))
    notes = (NOT_RECORDED,) if facts is None else ()
    return Verdict((), replays, loaded - began, time.perf_counter() - loaded, differences, notes)


def replay(model: Loaded, golden: Golden, baseline: Baseline) -> Replay:
    """Run a golden and compare its logits."""
    if model.tokenizer.encode_prompt(golden.prompt) != golden.ids.tolist():
        problem = "the tokenizer splits the prompt differently than on the exporting machine"
        return Replay(golden.name, 0, math.nan, 0.0, baseline.limit, baseline.kl, problem)
    images = model.prepare(list(golden.images))
    if golden.pixels and golden.pixels != tuple(image.digest for image in images):
        problem = "preprocessing makes other pixels of its images than on the exporting machine"
        return Replay(golden.name, 0, math.nan, 0.0, baseline.limit, baseline.kl, problem)
    prompt = model.encode(golden.prompt, images)
    prompt = Prompt(prompt.keys[: model.config.decoder.max_position_embeddings], prompt.images)
    rows, _ = model.encoder.rows(list(prompt.images.values()))
    logits = run_golden(model.engine, model.table, prompt, rows, golden.positions)
    kl, agreement = distance(golden.logits, logits)
    return Replay(golden.name, len(golden.positions), kl, agreement, baseline.limit, baseline.kl)


def run_golden(
    decoder: DecoderEngine,
    table: TokenTable,
    prompt: Prompt,
    rows: Mapping[str, Floats],
    positions: Ints,
) -> Floats:
    """Logits [R, V] of some positions of a prompt, as :func:`stepwise_logits`.

    Args:
        table: token embeddings [V, C].
        rows: of its images, by digest, each [queries + 1, C].
        positions: int64 [R], rising.
    """
    embeds, modality = embed(prompt.keys, table, rows)
    return stepwise_logits(decoder, embeds, modality, positions, decoder.allocate(len(embeds), None))


def stepwise_logits(
    decoder: DecoderEngine, embeds: Floats, modality: Ints, positions: Ints, buffers: KvBuffers
) -> Floats:
    """Logits [R, V] of some positions: most of a prompt in one prefill, its last text step by step from the KV cache.

    Args:
        embeds: [T, C].
        modality: [T], 1 at image rows.
        positions: int64 [R], rising.
        buffers: empty, with room for T positions; hold the prompt's keys and values afterwards.
    """
    count, images = len(embeds), np.flatnonzero(modality)
    first = max(count - DECODED_STEPS, int(images[-1]) + 1 if len(images) else 1)
    wanted = positions[positions < first]
    rows = wanted if len(wanted) else np.array([first - 1])  # an engine is always asked for a row
    logits = [decoder.prefill(embeds[:first], modality[:first], 0, buffers, rows)[: len(wanted)]]
    steps = [decoder.decode(embeds[i : i + 1], i, buffers) for i in range(first, count)]
    logits += [step[None] for i, step in enumerate(steps, first) if i in positions]
    return np.concatenate(logits)


def distance(expected: Floats, actual: Floats) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence in nats, and share of equal most likely tokens: logits [R, V] twice.

    A logit that is NaN or infinite makes the divergence NaN.
    """
    if not np.isfinite(actual).all():
        return math.nan, 0.0
    return float(row_kl(expected, actual).mean()), float((expected.argmax(-1) == actual.argmax(-1)).mean())
