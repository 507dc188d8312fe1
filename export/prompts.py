"""Calibration, probe and held-out prompts, tokenized and with their images preprocessed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.files import TOKENIZER_DEFAULTS
from owl2.export.checkpoint.source import needs_calibration
from owl2.export.config import ExportConfig
from owl2.quant.calibration.samples import CalibrationSet, Sample, load_calibration, probe_samples
from owl2.runtime.config import ModelConfig
from owl2.runtime.errors import BundleError, CheckpointError
from owl2.runtime.evaluation.conversations import evenly
from owl2.runtime.families.mplug_owl2.positions import Prompt, digests_of, encode_prompt
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import PreparedImage, prepare_images

# Rows of the calibration prompts: 32768 positions of a width of 4096. They are in memory twice.
MAX_ROW_BYTES = 512 << 20

# One of this many calibration samples is kept from the quantizer to measure with, up to MAX_HELD_OUT of them.
HELD_OUT_EVERY = 8
MAX_HELD_OUT = 16


@dataclass(frozen=True)
class Prompts:
    """The prompts that pass through the model while it is exported.

    Attributes:
        calibration: the quantizer looks at these; empty where nothing is calibrated.
        probes: the graphs are compared with torch on these.
        held_out: the loss of accuracy is measured on these, which the quantizer has not seen.
        images: those of all prompts by digest; emptied once all of them are encoded.
        source: of the calibration samples.
        notes: remarks on the calibration data for readers of the report, a sentence each.
    """

    calibration: list[Prompt]
    probes: list[Prompt]
    held_out: list[Prompt]
    images: dict[str, PreparedImage]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> list[Prompt]:
        """Probes and held-out prompts, in this order."""
        return self.probes + self.held_out

    @property
    def judged(self) -> tuple[int, str]:
        """First index in :attr:`measured` of the prompts that the loss of accuracy is measured on, and their name."""
        return (len(self.probes), "held-out calibration samples") if self.held_out else (0, "built-in probes")

    def images_of(self, prompts: Sequence[Prompt]) -> dict[str, PreparedImage]:
        """Images of some of the prompts by digest, each once."""
        return {digest: self.images[digest] for digest in digests(prompts)}


def digests(prompts: Sequence[Prompt]) -> list[str]:
    """The images of ``prompts``, each once, in order of appearance."""
    return digests_of([key for prompt in prompts for key in prompt.keys])


def load_prompts(config: ExportConfig, checkpoint: Checkpoint) -> Prompts:
    """Load the calibration data and encode it, the probes too."""
    calibrate = needs_calibration(config, checkpoint)
    data = load_calibration(config.calibration, config.samples, need_images=calibrate)
    try:
        tokenizer = Tokenizer.load(checkpoint.folder, TOKENIZER_DEFAULTS)
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    decoder = checkpoint.config.decoder
    if tokenizer.vocab_size > decoder.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder}: tokenizer.model has {tokenizer.vocab_size} pieces, config.json a vocab_size of "
            f"{decoder.vocab_size}; they do not belong together"
        )
    return prepare(data, checkpoint.config, tokenizer, calibrate=calibrate)


def prepare(data: CalibrationSet, config: ModelConfig, tokenizer: Tokenizer, *, calibrate: bool) -> Prompts:
    """Divide the samples and encode them, with the probes; what exceeds the context is cut at its end."""
    samples = data.samples
    chosen = range(HELD_OUT_EVERY - 1, len(samples), HELD_OUT_EVERY)[:MAX_HELD_OUT]
    held_out = [samples[i] for i in chosen]
    rest = [sample for i, sample in enumerate(samples) if i not in chosen]
    if not any(sample.images for sample in rest):  # the quantizer needs what few images there are
        held_out, rest = [], list(samples)
    calibration = encode_samples(rest, config, tokenizer) if calibrate else []
    used = _bounded(calibration, MAX_ROW_BYTES // (4 * config.decoder.hidden_size))
    notes = data.notes
    if len(used) < len(calibration):
        notes += (
            f"{len(used)} of {len(calibration)} calibration samples were used, spread evenly: the rows of more would "
            f"take over {MAX_ROW_BYTES >> 20} MiB of memory, twice",
        )
    parts = (used, encode_samples(probe_samples(), config, tokenizer), encode_samples(held_out, config, tokenizer))
    images = {digest: image for part in parts for prompt in part for digest, image in prompt.images.items()}
    calibration, probes, held = ([Prompt(prompt.keys, {}) for prompt in part] for part in parts)
    return Prompts(calibration, probes, held, images, data.source, notes)


def _bounded(prompts: list[Prompt], max_positions: int) -> list[Prompt]:
    """Evenly spread prompts of about ``max_positions`` positions together; one with an image among them."""
    positions = sum(len(prompt.keys) for prompt in prompts)
    if positions <= max_positions:
        return prompts
    chosen = evenly(prompts, max(1, len(prompts) * max_positions // positions))
    if not any(prompt.images for prompt in chosen):
        chosen[0] = next((prompt for prompt in prompts if prompt.images), chosen[0])
    return chosen


def encode_samples(samples: Iterable[Sample], config: ModelConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """Tokenize prompts and preprocess their images, cut where the context ends."""
    prompts = []
    for sample in samples:
        images = prepare_images(sample.images, config.preprocess, None)
        prompt = encode_prompt(sample.prompt, images, tokenizer, config.rows_per_image)
        prompts.append(Prompt(prompt.keys[: config.decoder.max_position_embeddings], prompt.images))
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 (hex) of all positions, which name token ids and the digests of images."""
    return hashlib.sha256(repr([prompt.keys for prompt in prompts]).encode()).hexdigest()
