"""Calibration, probe and held-out prompts, tokenized and with their images preprocessed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.scoring import preset_of
from owl2.export.checkpoint.source import needs_calibration
from owl2.export.config import ExportConfig
from owl2.quant.calibration.samples import BUILT_IN, CalibrationSet, Sample, load_calibration, probe_samples
from owl2.runtime.config import IMAGE_TOKEN, ModelConfig
from owl2.runtime.errors import CalibrationError, ImageError
from owl2.runtime.evaluation.conversations import evenly
from owl2.runtime.families.mplug_owl2.positions import Prompt, digests_of, encode_prompt
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import PreparedImage, prepare_images
from owl2.runtime.scoring.scale import USUAL, Preset, load_preset

# Rows of the calibration prompts: 32768 positions of a width of 4096. They are in memory twice.
MAX_ROW_BYTES = 512 << 20

# One of this many calibration samples is kept from the quantizer to measure with, up to MAX_HELD_OUT of them.
HELD_OUT_EVERY = 8
MAX_HELD_OUT = 16
# Fewer than these make a rough figure, and the report says so.
FIRM_SAMPLES = 8
FIRM_POSITIONS = 500


@dataclass(frozen=True)
class Prompts:
    """The prompts that pass through the model while it is exported.

    Attributes:
        calibration: the quantizer looks at these; empty where nothing is calibrated.
        probes: the graphs are compared with torch on these.
        held_out: the loss of accuracy is measured on these, which the quantizer has not seen, nor any of their images.
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
    mode = None
    if config.purpose == "scoring" and data.images:
        scorer = load_preset(preset_of(config, checkpoint.preset) or USUAL)
        data, mode = as_scored(data, scorer, config.samples), scorer.preprocess
    return prepare(data, checkpoint.config, checkpoint.tokenizer.tokenizer, calibrate=calibrate, mode=mode)


def as_scored(data: CalibrationSet, preset: Preset, limit: int) -> CalibrationSet:
    """The images of a set, asked as a scorer asks instead of talked about.

    Weights are rounded for the rows that they are calibrated on, and a scorer's prompts are always the same ones.
    """
    images = [image for sample in data.samples for image in sample.images]
    images = evenly(images, max(1, limit // len(preset.image)))  # each is asked everything
    samples = [
        Sample(prompt, tuple(images[(place + other) % len(images)] for other in range(prompt.count(IMAGE_TOKEN))))
        for place in range(len(images))
        for prompt in preset.image.values()
    ]
    # Other notes are on texts, which nobody reads here.
    return CalibrationSet(data.source, tuple(samples), data.notes if data.source == BUILT_IN else ())


def prepare(
    data: CalibrationSet, config: ModelConfig, tokenizer: Tokenizer, *, calibrate: bool, mode: str | None = None
) -> Prompts:
    """Encode the samples and divide them, without exact copies; what exceeds the context is cut at its end.

    ``mode`` is how their images are preprocessed; None for the model's own way.
    """
    encoded = encode_samples(data.samples, config, tokenizer, mode)
    contents = {tuple(prompt.keys): _content(sample, prompt) for sample, prompt in zip(data.samples, encoded)}
    distinct = list({tuple(prompt.keys): prompt for prompt in encoded}.values())
    chosen, obstacle = _set_aside(list(contents.values()))
    held_out = [prompt for i, prompt in enumerate(distinct) if i in chosen]
    rest = [prompt for i, prompt in enumerate(distinct) if i not in chosen]
    if not any(prompt.images for prompt in rest):  # the quantizer needs what few images there are
        held_out, rest, obstacle = [], distinct, obstacle or "none of those left to the quantizer would have an image"
    used = _bounded(rest, MAX_ROW_BYTES // (4 * config.decoder.hidden_size)) if calibrate else []
    probes = encode_samples(probe_samples(), config, tokenizer)
    notes = list(data.notes) if calibrate else []
    if copies := len(data.samples) - len(distinct):
        notes.append(
            f"{copies} of {len(data.samples)} calibration samples are exact copies of others and were left out"
        )
    if calibrate and len(used) < len(rest):
        notes.append(
            f"{len(used)} of {len(rest)} calibration samples were used, spread evenly: the rows of more would "
            f"take over {MAX_ROW_BYTES >> 20} MiB of memory, twice"
        )
    notes += _remarks(held_out, rest, len(probes), obstacle)
    parts = used, probes, held_out
    images = {digest: image for part in parts for prompt in part for digest, image in prompt.images.items()}
    calibration, probes, held_out = ([Prompt(prompt.keys, {}) for prompt in part] for part in parts)
    return Prompts(calibration, probes, held_out, images, data.source, tuple(notes))


def _content(sample: Sample, prompt: Prompt) -> Collection[str]:
    """What a sample must not share with one on the other side: its images by digest, or without any its first question.

    Questions about images do not count, since data may ask the same one about every image.
    """
    return list(prompt.images) or [sample.prompt.partition(" ASSISTANT:")[0]]


def _set_aside(contents: Sequence[Collection[str]]) -> tuple[set[int], str]:
    """Indices of the samples to keep from the quantizer, and why there are none.

    None of them has content in common with any other sample.
    """
    if len(contents) < HELD_OUT_EVERY:
        return set(), f"it takes at least {HELD_OUT_EVERY}"
    room = min(MAX_HELD_OUT, len(contents) // HELD_OUT_EVERY)
    # A larger group would take too much from the quantizer.
    groups = [group for group in _groups(contents) if len(group) <= room]
    if len(groups) < HELD_OUT_EVERY:
        return set(), (
            f"too many share an image or a first question: {len(groups)} groups of at most {room} samples have neither "
            f"in common with others, and it takes {HELD_OUT_EVERY}"
        )
    chosen: set[int] = set()
    for group in groups[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]:
        if len(chosen) + len(group) <= room:
            chosen.update(group)
    return chosen, ""


def _groups(contents: Sequence[Collection[str]]) -> list[list[int]]:
    """Indices of samples that have content in common, with each other or through others between them."""
    parents, first = list(range(len(contents))), dict[str, int]()

    def root(index: int) -> int:
        while parents[index] != index:
            index = parents[index]
        return index

    for index, content in enumerate(contents):
        for part in content:
            one, other = root(index), root(first.setdefault(part, index))
            parents[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for index in range(len(contents)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def _remarks(held_out: Sequence[Prompt], rest: Sequence[Prompt], probes: int, obstacle: str) -> list[str]:
    """What readers of the accuracy should know about the prompts that it was measured on.

    ``obstacle`` says why none is held out, if so.
    """
    if not held_out:
        return [
            f"the accuracy is measured on {probes} built-in probes and says little about your data: of {len(rest)} "
            f"calibration samples none could be held out: {obstacle}"
        ]
    remarks = []
    positions = sum(len(prompt.keys) for prompt in held_out)
    if len(held_out) < FIRM_SAMPLES or positions < FIRM_POSITIONS:
        remarks.append(
            f"the accuracy is a rough figure: it is measured on {len(held_out)} held-out samples with {positions} "
            f"positions, and takes {FIRM_SAMPLES} with {FIRM_POSITIONS} to be firm"
        )
    if not any(prompt.images for prompt in held_out) and any(prompt.images for prompt in rest):
        remarks.append("none of the held-out samples has an image: the accuracy at image positions is not known")
    return remarks


def _bounded(prompts: list[Prompt], max_positions: int) -> list[Prompt]:
    """Evenly spread prompts of about ``max_positions`` positions together; one with an image among them."""
    positions = sum(len(prompt.keys) for prompt in prompts)
    if positions <= max_positions:
        return prompts
    chosen = evenly(prompts, max(1, len(prompts) * max_positions // positions))
    if not any(prompt.images for prompt in chosen):
        chosen[0] = next((prompt for prompt in prompts if prompt.images), chosen[0])
    return chosen


def encode_samples(
    samples: Iterable[Sample], config: ModelConfig, tokenizer: Tokenizer, mode: str | None = None
) -> list[Prompt]:
    """Tokenize prompts and preprocess their images, cut where the context ends."""
    prompts = []
    known: dict[str, PreparedImage] = {}  # the pixels of an image are kept once, however many samples it has
    for sample in samples:
        try:
            images = [known.setdefault(x.digest, x) for x in prepare_images(sample.images, config.preprocess, mode)]
        except ImageError as error:
            raise CalibrationError(": ".join(filter(None, (sample.where, str(error))))) from error
        prompt = encode_prompt(sample.prompt, images, tokenizer, config.rows_per_image)
        prompts.append(Prompt(prompt.keys[: config.decoder.max_position_embeddings], prompt.images))
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 (hex) of all positions, which name token ids and the digests of images."""
    return hashlib.sha256(repr([prompt.keys for prompt in prompts]).encode()).hexdigest()
