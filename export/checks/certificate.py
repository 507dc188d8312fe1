"""Writing a bundle's certificate, which :mod:`owl2.runtime.evaluation.verify` replays on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from owl2.export.checks.parity import with_float_activations
from owl2.export.job.progress import Reporter
from owl2.export.vision import run_vision
from owl2.quant.calibration.samples import probe_samples
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtOptions, open_session
from owl2.runtime.bundle import Bundle, WeightFormat
from owl2.runtime.engine import DecoderEngine, Floats
from owl2.runtime.evaluation.certificate import Baseline, Golden, golden_positions, write_goldens
from owl2.runtime.evaluation.verify import distance, run_golden
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.preprocess import load_image

NAMES = ("text", "one picture", "two pictures")

# A device passes within so many times what the exporting machine reached, and within a floor, since a handful of
# positions is a small sample. Measured with the sample model and two models of random weights, exported on a CPU with
# AVX-512 VNNI and replayed on emulated ones with SSE4 and with AVX2: int4 kernels reach 0 to 1.4 times the exporter's
# divergence, int8 vision graphs of the sample 4 to 8 times (at most 0.015 nats) on AVX2, whose int8 products saturate.
# On the random weights saturation does real harm, 0.08 to 0.4 nats, and fails. So does about every run of 64 KiB of
# wrong weights in the sample's decoder (0.2 to 6 nats, of 3 MiB). float32 graphs agree within 1e-11 on all of these.
FACTOR = 5.0
FLOOR = 1e-2
FLOAT_FLOOR = 1e-4


def limit(kl: float, weights: WeightFormat) -> float:
    """The largest divergence in nats at which a device passes.

    Args:
        kl: what the exporting machine reached.
        weights: integer ones bring int8 activations, whose rounding differs between kernels.
    """
    integer = any(kind.startswith("int") for kind in (weights.decoder, weights.head, weights.vision))
    return max(FLOOR if integer else FLOAT_FLOOR, FACTOR * kl)


def make_goldens(
    bundle: Bundle, probes: Sequence[Prompt], session: DecoderEngine, rows: Mapping[str, Floats], reporter: Reporter
) -> list[Golden]:
    """Write the golden prompts with the logits of the bundle's own graphs, activations in float32.

    Args:
        bundle: is not complete yet.
        probes: its encoded probe samples.
        session: the decoder with float32 activations.
        rows: what :func:`float_rows` returned.
        reporter: is told of each prompt.
    """
    table = bundle.embeddings()
    tokenizer = Tokenizer.load(bundle.folder)
    goldens = []
    for name, sample, prompt in zip(NAMES, probe_samples(), probes, strict=True):
        positions = golden_positions(prompt)
        embeds, modality = embed(prompt.keys, table, rows)
        buffers = session.allocate(len(embeds), None)
        goldens.append(
            Golden(
                name=name,
                prompt=sample.prompt,
                ids=np.array(tokenizer.encode_prompt(sample.prompt), dtype=np.int64),
                images=tuple(np.asarray(load_image(image)) for image in sample.images),
                positions=positions,
                # In one pass: a device replays the last positions from its K/V cache.
                logits=session.prefill(embeds, modality, 0, buffers, positions),
            )
        )
        reporter.advance()
    write_goldens(bundle.path(spec.GOLDENS), goldens)
    return goldens


def certify(
    bundle: Bundle,
    goldens: Sequence[Golden],
    session: DecoderEngine,
    probes: Sequence[Prompt],
    rows: Mapping[str, Floats],
) -> tuple[Baseline, ...]:
    """What the graphs reach as they run on this machine, and what a device has to.

    Args:
        bundle: gives the token table.
        goldens: what :func:`make_goldens` returned.
        session: the decoder as the runtime opens it.
        probes: the goldens' prompts.
        rows: of their images, from the vision graph as it runs.
    """
    reached = []
    for golden, prompt in zip(goldens, probes, strict=True):
        made = run_golden(session, bundle.embeddings(), prompt, rows, golden.positions)
        kl, agreement = distance(golden.logits, made)
        most = limit(kl, bundle.manifest.weights)
        reached.append(Baseline(golden.name, len(golden.positions), kl, agreement, most))
    return tuple(reached)


def float_rows(bundle: Bundle, probes: Sequence[Prompt]) -> dict[str, Floats]:
    """Decoder rows of the probes' images by digest, from the vision graph with activations in float32."""
    rows: dict[str, Floats] = {}
    with with_float_activations(bundle.path(spec.VISION_GRAPH)) as variant:
        session = open_session(variant, OrtOptions(frugal=True))
        for prompt in probes:
            for digest, image in prompt.images.items():
                rows[digest] = run_vision(session, image)
    return rows
