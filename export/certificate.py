"""Writing a bundle's certificate, which :mod:`owl2.runtime.certificate` replays on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from owl2.export.parity import with_float_activations
from owl2.quant.calibration import probe_samples
from owl2.runtime import spec
from owl2.runtime.backends.ort import OrtDecoder, OrtOptions, open_session
from owl2.runtime.bundle import Bundle
from owl2.runtime.certificate import (
    Golden,
    Reached,
    distance,
    golden_positions,
    run_golden,
    write_goldens,
)
from owl2.runtime.engine import Decoder, Floats
from owl2.runtime.image import load_image
from owl2.runtime.multimodal import Prompt
from owl2.runtime.tokenizer import Tokenizer

NAMES = ("text", "one picture", "two pictures")

FACTOR = 8.0
FLOOR = 1e-3


def limit(kl: float) -> float:
    """The largest divergence at which a device passes, from what the exporting machine reached."""
    return max(FLOOR, FACTOR * kl)


def make_goldens(bundle: Bundle, probes: Sequence[Prompt]) -> list[Golden]:
    """Write the golden prompts with the logits of the bundle's own graphs, activations in float32.

    One session is open at a time. ``bundle`` is not complete yet; ``probes`` are its encoded probe samples.
    """
    table = bundle.embeddings()
    rows = _float_rows(bundle, probes)
    tokenizer = Tokenizer.load(bundle.folder)
    goldens = []
    with with_float_activations(bundle.path(spec.DECODER_GRAPH)) as variant:
        session = OrtDecoder(variant, bundle.manifest.model.decoder, OrtOptions(frugal=True))
        for name, sample, prompt in zip(NAMES, probe_samples(), probes, strict=True):
            positions = golden_positions(prompt)
            goldens.append(
                Golden(
                    name=name,
                    prompt=sample.prompt,
                    ids=np.array(tokenizer.encode_prompt(sample.prompt), dtype=np.int64),
                    images=tuple(np.asarray(load_image(image)) for image in sample.images),
                    positions=positions,
                    logits=run_golden(session, table, prompt, rows, positions),
                )
            )
    write_goldens(bundle.path(spec.GOLDENS), goldens)
    return goldens


def certify(
    bundle: Bundle,
    goldens: Sequence[Golden],
    session: Decoder,
    probes: Sequence[Prompt],
    rows: Mapping[str, Floats],
) -> tuple[Reached, ...]:
    """What the graphs reach as they run on this machine, and what a device has to.

    Args:
        bundle: gives the token table.
        goldens: what :func:`make_goldens` returned.
        session: the decoder as the runtime opens it.
        probes: the goldens' prompts.
        rows: of their pictures, from the vision graph as it runs.
    """
    reached = []
    for golden, prompt in zip(goldens, probes, strict=True):
        made = run_golden(session, bundle.embeddings(), prompt, rows, golden.positions)
        kl, agreement = distance(golden.logits, made)
        reached.append(Reached(golden.name, len(golden.positions), kl, agreement, limit(kl)))
    return tuple(reached)


def _float_rows(bundle: Bundle, probes: Sequence[Prompt]) -> dict[str, Floats]:
    """Decoder rows of the probes' pictures by digest, from the vision graph with activations in float32."""
    rows: dict[str, Floats] = {}
    with with_float_activations(bundle.path(spec.VISION_GRAPH)) as variant:
        session = open_session(variant, OrtOptions(frugal=True))
        for prompt in probes:
            for digest, picture in prompt.pictures.items():
                rows[digest] = session.run([spec.IMAGE_ROWS], {spec.PIXELS: picture.pixels[None]})[0][0]
    return rows
