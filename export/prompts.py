"""Calibration and probe prompts, tokenized and with their images preprocessed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from owl2.quant.calibration.samples import CalibrationSet, Sample, probe_samples
from owl2.runtime.config import ModelConfig
from owl2.runtime.families.mplug_owl2.positions import Prompt, encode_prompt
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import PreparedImage, prepare_images

# Rows of the calibration prompts: 32768 positions of a width of 4096. They are in memory twice.
MOST_ROW_BYTES = 512 << 20

# One in so many calibration samples is kept from the quantizer to measure with, at most HELD_OUT of them.
HELD_OUT_EVERY = 8
HELD_OUT = 16


@dataclass(frozen=True)
class Prompts:
    """What passes through the model while it is exported.

    Attributes:
        calibration: the quantizer looks at these; empty where nothing is calibrated.
        probes: the graphs are compared with torch on these.
        held_out: the loss of accuracy is measured on these, which the quantizer has not seen.
        notes: what a reader of the report should know, a sentence each.
    """

    calibration: list[Prompt]
    probes: list[Prompt]
    held_out: list[Prompt]
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> list[Prompt]:
        """Probes and held-out prompts, in this order."""
        return self.probes + self.held_out

    @property
    def judged(self) -> tuple[int, str]:
        """Where in :attr:`measured` those begin that the loss of accuracy is measured on, and what they are."""
        return (len(self.probes), "held-out calibration samples") if self.held_out else (0, "built-in probes")

    @property
    def images(self) -> dict[str, PreparedImage]:
        """All images by digest."""
        return images_of([*self.calibration, *self.measured])

    def without_images(self) -> Prompts:
        """The same positions without any pixels, which are no longer needed once all images are encoded."""
        kinds = (self.calibration, self.probes, self.held_out)
        calibration, probes, held_out = ([Prompt(prompt.keys, {}) for prompt in kind] for kind in kinds)
        return Prompts(calibration, probes, held_out, self.notes)


def images_of(prompts: Iterable[Prompt]) -> dict[str, PreparedImage]:
    """Images of ``prompts`` by digest, each once."""
    return {digest: image for prompt in prompts for digest, image in prompt.images.items()}


def prepare(data: CalibrationSet, config: ModelConfig, tokenizer: Tokenizer, *, calibrate: bool) -> Prompts:
    """Encode the samples; what exceeds the context is cut at its end.

    Raises:
        ImageError, PromptError: a sample cannot be used.
    """

    samples = data.samples
    places = range(HELD_OUT_EVERY - 1, len(samples), HELD_OUT_EVERY)[:HELD_OUT]
    held_out = [samples[i] for i in places]
    rest = [sample for i, sample in enumerate(samples) if i not in places]
    if not any(sample.images for sample in rest):  # the quantizer needs what few images there are
        held_out, rest = [], list(samples)

    def encode(chosen: Iterable[Sample]) -> list[Prompt]:
        return encode_samples(chosen, config, tokenizer)

    calibration = encode(rest) if calibrate else []
    used = _bounded(calibration, MOST_ROW_BYTES // (4 * config.decoder.hidden_size))
    notes: tuple[str, ...] = ()
    if len(used) < len(calibration):
        notes = (
            f"{len(used)} of {len(calibration)} calibration samples were used, spread evenly: the rows of more would "
            f"take over {MOST_ROW_BYTES >> 20} MiB of memory, twice",
        )
    return Prompts(used, encode(probe_samples()), encode(held_out), notes)


def _bounded(prompts: list[Prompt], most: int) -> list[Prompt]:
    """As many prompts, evenly spread, as have about ``most`` positions together; one with an image among them."""
    positions = sum(len(prompt.keys) for prompt in prompts)
    if positions <= most:
        return prompts
    count = max(1, len(prompts) * most // positions)
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    if not any(prompt.images for prompt in chosen):
        chosen[0] = next((prompt for prompt in prompts if prompt.images), chosen[0])
    return chosen


def encode_samples(samples: Iterable[Sample], config: ModelConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """Tokenize prompts and preprocess their images; raises as :func:`prepare`."""
    return [_encode(sample, config, tokenizer) for sample in samples]


def _encode(sample: Sample, config: ModelConfig, tokenizer: Tokenizer) -> Prompt:
    images = prepare_images(sample.images, config.preprocess, None)
    prompt = encode_prompt(sample.prompt, images, tokenizer, config.rows_per_image)
    return Prompt(prompt.keys[: config.decoder.max_position_embeddings], prompt.images)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 (hex) of all positions, which name token ids and the digests of images."""
    return hashlib.sha256(repr([prompt.keys for prompt in prompts]).encode()).hexdigest()
