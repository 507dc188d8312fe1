"""How long each part of a score takes, by the number of images that share a step."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from owl2.runtime.kv_cache import KvCache
from owl2.runtime.owl import Owl2
from owl2.runtime.scoring.scorer import last_logits

BATCHES = (1, 4, 16, 64)
PHOTO = (1024, 768)
"""Size of the JPEG that is read."""


@dataclass(frozen=True)
class ScoreSpeed:
    """Seconds an image, medians.

    Attributes:
        positions: of a prompt.
        read: to read and preprocess a JPEG of 1024 x 768, in one thread; runs ahead of the rest.
        vision: in the tower, which sees one image at a time.
        decoder: by the images that share a step.
    """

    positions: int
    read: float
    vision: float
    decoder: dict[int, float]

    def per_second(self, batch: int) -> float:
        """Images a second where reading hides behind the rest."""
        return 1 / (self.vision + self.decoder[batch])


def measure_speed(owl: Owl2, batches: Sequence[int] = BATCHES, rounds: int = 5) -> ScoreSpeed:
    """Measure a loaded bundle with random images, all parts in turn; a first round does not count."""
    dice, scorer = np.random.default_rng(0), owl.scorer()
    photo = io.BytesIO()
    pixels = dice.integers(0, 256, (PHOTO[1] // 8, PHOTO[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(PHOTO, Image.Resampling.BICUBIC).save(photo, "JPEG")
    noise = [dice.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2 * max(batches))]
    items = [scorer.prepare(image) for image in noise]
    # The decoder's time does not depend on what an image is: no tower needs to run a hundred times.
    shape = (owl.config.rows_per_image, owl.config.decoder.hidden_size)
    rows = {image.digest: dice.standard_normal(shape, np.float32) for item in items for image in item}
    prompts = [scorer.prompt(scorer.scales[0], item) for item in items]
    read, vision = list[float](), list[float]()
    decoder: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(rounds + 1):
        read.append(_seconds(lambda: scorer.prepare(photo.getvalue())))
        owl.model.encoder.clear()
        vision.append(_seconds(lambda: owl.model.encoder.rows(items[0])))
        for batch in batches:
            caches = list[KvCache]()
            last_logits(owl.model, caches, prompts[-batch:], rows)  # what stands before the image
            found = _seconds(lambda: last_logits(owl.model, caches, prompts[:batch], rows))  # noqa: B023 - at once
            decoder[batch].append(found / batch)
    return ScoreSpeed(
        positions=len(prompts[0].keys),
        read=statistics.median(read[1:]),
        vision=statistics.median(vision[1:]),
        decoder={batch: statistics.median(found[1:]) for batch, found in decoder.items()},
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
