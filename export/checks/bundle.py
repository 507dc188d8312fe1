"""Comparing a finished bundle with torch: does it compute the same, and what do its weights cost?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from owl2.export.checks.certificate import certify, float_rows, make_goldens
from owl2.export.checks.kv_int8 import FloatLogits, check_codes, compare as compare_kv_int8, summary
from owl2.export.checks.parity import Parity, compare, with_float_activations
from owl2.export.decoder import ExportedDecoder
from owl2.export.job.progress import Reporter
from owl2.export.job.usage import return_memory
from owl2.export.prompts import Prompts
from owl2.export.report import Accuracy, KvInt8
from owl2.export.vision import ExportedVision
from owl2.quant.kv import RoundedStream
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtBuffers, OrtOptions, open_decoder
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import DecoderEngine, Floats, Ints, KvBuffers
from owl2.runtime.evaluation.certificate import Baseline
from owl2.runtime.evaluation.divergence import Divergence, divergence
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed
from owl2.runtime.spec import FloatType, KvType

# So many text positions at the end of a probe are decoded one by one, to compare the cached step too.
DECODED_STEPS = 4

Embedded = tuple[Floats, Ints]
"""Rows [T, C] before the first layer, and int64 [T] that is 1 at image rows."""


@dataclass(frozen=True)
class Made:
    """What the export has written, and what torch made of the measured prompts on the way.

    Attributes:
        bundle: complete but for report and manifest.
        decoder, vision: what torch computed.
        kv_int8: the probes with keys and values as an int8 cache holds them.
        calibrated: whether the scales of that cache come from calibration data.
    """

    bundle: Bundle
    decoder: ExportedDecoder
    vision: ExportedVision
    kv_int8: RoundedStream
    calibrated: bool


@dataclass(frozen=True)
class Checks:
    """Results; :class:`owl2.export.report.Report` tells what each holds."""

    parity: Parity
    accuracy: Accuracy
    goldens: tuple[Baseline, ...]
    kv_int8: KvInt8 | None


def check_bundle(
    made: Made, prompts: Prompts, goldens: Sequence[Prompt], probes: list[Embedded], reporter: Reporter
) -> Checks:
    """Run every graph and compare; writes the golden prompts. One decoder is open at a time.

    Args:
        made: is checked.
        prompts: without images; the measured ones are used.
        goldens: the probes with their images.
        probes: their rows before the first layer.
        reporter: is told of each prompt.

    Raises:
        ParityError: a graph does not compute what torch computes.
    """
    bundle, decoder = made.bundle, made.decoder
    reporter.stage("comparing with torch", 3 * len(probes) + len(prompts.measured))
    rows = float_rows(bundle, goldens)
    with _float_decoder(bundle) as session:
        exact = _probe_logits(session, probes, reporter)
        certificate = make_goldens(bundle, goldens, session, rows, reporter)
    del session  # before the next one is opened
    session = _open_decoder(bundle)
    parity = _check_decoder(
        exact, _probe_logits(session, probes, reporter), decoder, len(probes), bundle.manifest.activations
    )
    kept = FloatLogits()
    accuracy = _measure(made, session, prompts, kept, reporter)
    reached = certify(bundle, certificate, session, prompts.probes, made.vision.rows)
    del session  # before the next one is opened
    loss = _check_kv_int8(made, probes, kept, reporter) if "int8" in bundle.manifest.kv_cache else None
    return Checks(parity, accuracy, reached, loss)


def _probe_logits(session: DecoderEngine, probes: list[Embedded], reporter: Reporter) -> Floats:
    """Logits of all probes, one after the other: [sum of T, V]."""
    made = []
    for embeds, modality in probes:
        made.append(_stepwise_logits(session, embeds, modality, session.allocate(len(embeds), None)))
        reporter.advance()
    return np.concatenate(made)


@contextlib.contextmanager
def _float_decoder(bundle: Bundle, kv_cache: KvType | None = None) -> Iterator[DecoderEngine]:
    """The decoder with float32 activations."""
    return_memory()
    with with_float_activations(bundle.decoder_graph(kv_cache)) as variant:
        options = replace(_options(bundle, None), exact=True)
        yield open_decoder(variant, bundle.manifest, options)


def _check_decoder(
    exact: Floats, actual: Floats, decoder: ExportedDecoder, probes: int, activations: FloatType
) -> Parity:
    """Compare the decoder graph with torch on the probes.

    Raises:
        ParityError: they differ.
    """
    return compare(
        spec.DECODER_GRAPH,
        exact=exact,
        actual=actual,
        stored=np.concatenate([decoder.stored_logits(i) for i in range(probes)]),
        reference=np.concatenate([decoder.reference_logits(i) for i in range(probes)]),
        activations=activations,
    )


def _check_kv_int8(made: Made, probes: list[Embedded], kept: FloatLogits, reporter: Reporter) -> KvInt8:
    """Compare the decoder with an int8 K/V cache with torch on the probes, then with its float32 one on ``kept``.

    Raises:
        ParityError: it does not compute what torch computes.
    """
    reporter.stage("int8 K/V cache", len(probes) + len(kept.prompts))
    bundle, decoder = made.bundle, made.decoder
    model, logits = bundle.manifest.model.decoder, []
    with _float_decoder(bundle, "int8") as session:
        for (embeds, modality), codes in zip(probes, made.kv_int8.codes):
            buffers = cast(OrtBuffers, session.allocate(len(embeds), None))
            logits.append(_stepwise_logits(session, embeds, modality, buffers))
            check_codes(buffers.arrays[:2], [entry.numpy() for entry in codes], model)
            reporter.advance()
    del session, buffers  # the buffers hold on to it too
    difference = compare_kv_int8(
        made=np.concatenate(logits),
        rounded=np.concatenate([decoder.kv_int8_logits(i) for i in range(len(probes))]),
        unrounded=np.concatenate([decoder.stored_logits(i) for i in range(len(probes))]),
    )
    session, apart = _open_decoder(bundle, "int8"), Divergence()
    for embeds, modality, unrounded in kept.prompts:
        apart += divergence(unrounded, _full_logits(session, embeds, modality), modality)
        reporter.advance()
    return summary(apart, difference, model, calibrated=made.calibrated)


def _open_decoder(bundle: Bundle, kv_cache: KvType | None = None) -> DecoderEngine:
    """The decoder as the runtime opens it."""
    return_memory()
    return open_decoder(bundle.decoder_graph(kv_cache), bundle.manifest, _options(bundle, kv_cache))


def _options(bundle: Bundle, kv_cache: KvType | None) -> OrtOptions:
    """As in the runtime, but without a second copy of weights in memory that are wider than 4 bits."""
    return OrtOptions(kv_cache=kv_cache, frugal=bundle.manifest.weights.decoder != "int4")


def _measure(made: Made, session: DecoderEngine, prompts: Prompts, kept: FloatLogits, reporter: Reporter) -> Accuracy:
    """Compare the whole bundle, its own vision rows and token table included, with torch on the checkpoint."""
    table = made.bundle.embeddings()
    first, name = prompts.judged
    apart = Divergence()
    for index, prompt in enumerate(prompts.measured):
        if index >= first:
            embeds, modality = embed(prompt.keys, table, made.vision.rows)
            logits = _full_logits(session, embeds, modality)
            apart += divergence(made.decoder.reference_logits(index), logits, modality)
            kept.offer(embeds, modality, logits)
        reporter.advance()
    return Accuracy.of(name, apart)


def _full_logits(session: DecoderEngine, embeds: Floats, modality: Ints) -> Floats:
    """Logits [T, V] of all positions from one prefill."""
    count = len(embeds)
    return session.prefill(embeds, modality, 0, session.allocate(count, None), np.arange(count))


def _stepwise_logits(session: DecoderEngine, embeds: Floats, modality: Ints, buffers: KvBuffers) -> Floats:
    """Logits [T, V]: most positions in one prefill, the last ones step by step from the KV cache."""
    count = len(embeds)
    text_tail = count - 1 - int(np.flatnonzero(modality)[-1]) if modality.any() else count - 1
    first = count - min(text_tail, DECODED_STEPS)
    made = [session.prefill(embeds[:first], modality[:first], 0, buffers, np.arange(first))]
    made += [session.decode(embeds[i : i + 1], i, buffers)[None] for i in range(first, count)]
    return np.concatenate(made)
