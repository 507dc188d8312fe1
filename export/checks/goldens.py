"""Golden prompts of a bundle and their limits, for :mod:`owl2.runtime.evaluation.verify` to replay on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from owl2.export.job.progress import Reporter
from owl2.export.job.written_bundle import WrittenBundle
from owl2.quant.calibration.samples import probe_samples
from owl2.runtime import spec
from owl2.runtime.bundle import WeightFormat
from owl2.runtime.engine import DecoderEngine, Floats
from owl2.runtime.evaluation.goldens import Baseline, Facts, Golden, golden_positions, write_goldens
from owl2.runtime.evaluation.verify import distance, run_golden
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import prepare_images
from owl2.runtime.preprocess import load_image

NAMES = ("text", "one picture", "two pictures")

# A device passes if its divergence is at most this many times the exporting machine's, or below a floor, since a
# handful of positions is a small sample. Measured with the sample model and two models of random weights, exported on a
# CPU with AVX-512 VNNI and replayed on emulated ones with SSE4 and with AVX2: int4 kernels have 0 to 1.4 times the
# exporter's divergence, int8 vision graphs of the sample 4 to 8 times (at most 0.015 nats) on AVX2, whose int8 products
# saturate. On the random weights saturation does real harm, 0.08 to 0.4 nats, and fails. So does about every run of
# 64 KiB of wrong weights in the sample's decoder (0.2 to 6 nats, of 3 MiB). float32 graphs agree within 1e-11 on all.
LIMIT_FACTOR = 5.0
LIMIT_FLOOR = 1e-2
FLOAT_LIMIT_FLOOR = 1e-4


def limit(kl: float, weights: WeightFormat) -> float:
    """The largest divergence at which a device passes, from the exporting machine's, both in nats."""
    # Integer weights bring int8 activations, whose rounding differs between kernels.
    integer = any(stored.startswith("int") for stored in (weights.decoder, weights.head, weights.vision))
    return max(LIMIT_FLOOR if integer else FLOAT_LIMIT_FLOOR, LIMIT_FACTOR * kl)


def make_goldens(
    bundle: WrittenBundle,
    probe_prompts: Sequence[Prompt],
    rows: Mapping[str, Floats],
    decoder: DecoderEngine,
    reporter: Reporter,
) -> list[Golden]:
    """Write the golden prompts with the logits of the bundle's own graphs, activations in float32.

    Args:
        rows: of the prompts' images by digest, from the vision graph with float32 activations.
        decoder: with float32 activations.
    """
    table = bundle.token_table()
    tokenizer = Tokenizer.load(bundle.folder)
    goldens = []
    for name, sample, prompt in zip(NAMES, probe_samples(), probe_prompts, strict=True):
        positions = golden_positions(prompt)
        embeds, modality = embed(prompt.keys, table, rows)
        buffers = decoder.allocate(len(embeds), None)
        goldens.append(
            Golden(
                name=name,
                prompt=sample.prompt,
                ids=np.array(tokenizer.encode_prompt(sample.prompt), dtype=np.int64),
                images=tuple(np.asarray(load_image(image)) for image in sample.images),
                pixels=tuple(image.digest for image in prepare_images(sample.images, bundle.model.preprocess, None)),
                positions=positions,
                # In one pass: a device replays the last positions from its K/V cache.
                logits=decoder.prefill(embeds, modality, 0, buffers, positions),
            )
        )
        reporter.advance()
    write_goldens(bundle.path(spec.GOLDENS), goldens, Facts.of(bundle.model))
    return goldens


def measure_baselines(
    bundle: WrittenBundle,
    goldens: Sequence[Golden],
    decoder: DecoderEngine,
    probe_prompts: Sequence[Prompt],
    rows: Mapping[str, Floats],
) -> tuple[Baseline, ...]:
    """Results of the graphs as they run on this machine, and the limits for a device.

    Args:
        decoder: as the runtime opens it.
        rows: of the prompts' images by digest, from the vision graph as it runs.
    """
    baselines = []
    for golden, prompt in zip(goldens, probe_prompts, strict=True):
        logits = run_golden(decoder, bundle.token_table(), prompt, rows, golden.positions)
        kl, agreement = distance(golden.logits, logits)
        baselines.append(Baseline(golden.name, len(golden.positions), kl, agreement, limit(kl, bundle.weights)))
    return tuple(baselines)
