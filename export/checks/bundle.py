"""Comparing the files of a bundle with torch: do they compute the same, and how much accuracy do their weights cost?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from owl2.export.checks.engines import encode_images_in_float, float_decoder, open_bundle_decoder
from owl2.export.checks.goldens import make_goldens, measure_baselines
from owl2.export.checks.kv_int8 import FloatLogits, check_codes, compare as compare_kv_int8, summary
from owl2.export.checks.parity import compare
from owl2.export.decoder import ExportedDecoder
from owl2.export.job.job import ExportJob
from owl2.export.job.written_bundle import WrittenBundle
from owl2.export.report import Accuracy, Checks, KvInt8
from owl2.export.streams import Embedded
from owl2.export.vision import ExportedVision
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtBuffers
from owl2.runtime.engine import DecoderEngine, Floats, Ints
from owl2.runtime.evaluation.divergence import Divergence, divergence
from owl2.runtime.evaluation.verify import stepwise_logits
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.images import PreparedImage


def check_bundle(
    job: ExportJob,
    bundle: WrittenBundle,
    expected: ExportedDecoder,
    vision: ExportedVision,
    probes: list[Embedded],
    probe_images: Mapping[str, PreparedImage],
) -> Checks:
    """Run every graph and compare it with torch; write the golden prompts. One decoder is open at a time.

    Args:
        expected, vision: torch's results.
        probes: the probe prompts before the first layer.
        probe_images: their images by digest.
    """
    prompts, reporter = job.prompts, job.reporter
    reporter.stage("comparing with torch", 3 * len(probes) + len(prompts.measured))
    rows = encode_images_in_float(bundle.path(spec.VISION_GRAPH), probe_images, bundle.model)
    with float_decoder(bundle, bundle.activations) as decoder:
        exact = _probe_logits(job, decoder, probes)
        goldens = make_goldens(bundle, prompts.probes, rows, decoder, reporter)
    del decoder  # before the next one is opened
    decoder = open_bundle_decoder(bundle, bundle.activations)
    parity = compare(
        spec.DECODER_GRAPH,
        exact=exact,
        actual=_probe_logits(job, decoder, probes),
        quantized=np.concatenate([expected.quantized_logits(i) for i in range(len(probes))]),
        original=np.concatenate([expected.original_logits(i) for i in range(len(probes))]),
        activations=bundle.activations,
    )
    unrounded = FloatLogits()
    accuracy = _measure(job, bundle, decoder, expected, vision, unrounded)
    baselines = measure_baselines(bundle, goldens, decoder, prompts.probes, vision.rows)
    del decoder  # before the next one is opened
    kv_int8 = _check_kv_int8(job, bundle, expected, probes, unrounded) if "int8" in bundle.kv_cache else None
    return Checks(accuracy, (vision.parity, parity), baselines, kv_int8)


def _probe_logits(job: ExportJob, decoder: DecoderEngine, probes: list[Embedded]) -> Floats:
    """Logits of all probes, one after the other: [sum of T, V]."""
    logits = []
    for embeds, modality in probes:
        count = len(embeds)
        logits.append(stepwise_logits(decoder, embeds, modality, np.arange(count), decoder.allocate(count, None)))
        job.reporter.advance()
    return np.concatenate(logits)


def _measure(
    job: ExportJob,
    bundle: WrittenBundle,
    decoder: DecoderEngine,
    expected: ExportedDecoder,
    vision: ExportedVision,
    unrounded: FloatLogits,
) -> Accuracy:
    """Compare the whole bundle, its own vision rows and token table included, with torch on the checkpoint."""
    table = bundle.token_table()
    first, _ = job.prompts.judged
    total = Divergence()
    for index, prompt in enumerate(job.prompts.measured):
        if index >= first:
            embeds, modality = embed(prompt.keys, table, vision.rows)
            logits = _full_logits(decoder, embeds, modality)
            total += divergence(expected.original_logits(index), logits, modality)
            unrounded.offer(embeds, modality, logits)
        job.reporter.advance()
    return Accuracy.of(job.prompts, total)


def _check_kv_int8(
    job: ExportJob,
    bundle: WrittenBundle,
    expected: ExportedDecoder,
    probes: list[Embedded],
    unrounded: FloatLogits,
) -> KvInt8:
    job.reporter.stage("int8 K/V cache", len(probes) + len(unrounded.prompts))
    model, logits = bundle.model.decoder, []
    with float_decoder(bundle, "int8") as decoder:
        for (embeds, modality), codes in zip(probes, expected.kv_codes):
            buffers = cast(OrtBuffers, decoder.allocate(len(embeds), None))
            logits.append(stepwise_logits(decoder, embeds, modality, np.arange(len(embeds)), buffers))
            check_codes(buffers.arrays[:2], [entry.numpy() for entry in codes], model)
            job.reporter.advance()
    del decoder, buffers  # the buffers hold on to it too
    difference = compare_kv_int8(
        graph=np.concatenate(logits),
        rounded=np.concatenate([expected.kv_int8_logits(i) for i in range(len(probes))]),
        unrounded=np.concatenate([expected.quantized_logits(i) for i in range(len(probes))]),
    )
    decoder, total = open_bundle_decoder(bundle, "int8"), Divergence()
    for embeds, modality, exact in unrounded.prompts:
        total += divergence(exact, _full_logits(decoder, embeds, modality), modality)
        job.reporter.advance()
    return summary(total, difference, model, calibrated=bool(job.prompts.calibration))


def _full_logits(decoder: DecoderEngine, embeds: Floats, modality: Ints) -> Floats:
    """Logits [T, V] of all positions from one prefill."""
    count = len(embeds)
    return decoder.prefill(embeds, modality, 0, decoder.allocate(count, None), np.arange(count))
