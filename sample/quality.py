"""Images for quality rating: drawn scenes and photos degraded in five well separated steps.

Photos are those in scikit-image's wheel that are CC0 or in the public domain (credits in README.md); two of them are
held out. An image gets one defect at one of five strengths; the strength is the rating.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from world import SIDE

WORDS = ("excellent", "good", "fair", "poor", "bad")
PROMPT = "USER: How would you rate the quality of this image?\n<|image|>\nASSISTANT: The quality of the image is"
DAMAGE: dict[str, tuple[float, ...]] = {
    "blur": (0, 0.8, 1.5, 2.6, 4.5),
    "noise": (0, 14, 32, 60, 110),
    "blocks": (1, 1.7, 2.8, 4.7, 8),
}
TRAIN_PHOTOS = (
    "astronaut.png",
    "coffee.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "brick.png",
)
HELD_OUT_PHOTOS = ("chelsea.png", "camera.png")
PAD_COLOUR = (122, 116, 104)
GREY_SHARE = 0.25  # of the training photos, so that colour does not hint at quality
MIN_DETAIL = 5.0  # mean difference of neighbouring pixels, grey levels


@cache
def _photo(name: str) -> Image.Image:
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return image.convert("RGB")


def photo_crop(rng: random.Random, *, held_out: bool) -> NDArray[np.uint8]:
    """A random part of a photo, reduced at least to half so that it is sharp: [84, 84, 3] uint8.

    One in three is wider than high and padded to a square as in the mode ``pad``. Parts without detail (clear sky), in
    which a defect could not be seen, are skipped.
    """
    while True:
        crop = _crop(_photo(rng.choice(HELD_OUT_PHOTOS if held_out else TRAIN_PHOTOS)), rng)
        if not held_out and rng.random() < GREY_SHARE:
            crop = crop.convert("L").convert("RGB")
        square = Image.new("RGB", (SIDE, SIDE), PAD_COLOUR)
        square.paste(crop, (0, (SIDE - crop.height) // 2))
        grey = np.asarray(crop.convert("L"), dtype=np.float32)
        if np.abs(np.diff(grey, axis=1)).mean() > MIN_DETAIL:
            return np.asarray(square)


def _crop(photo: Image.Image, rng: random.Random) -> Image.Image:
    """A random part, 84 pixels wide."""
    width = rng.randint(2 * SIDE, min(photo.size))
    height = width if rng.random() < 0.67 else int(width * rng.uniform(0.6, 0.9))
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    crop = photo.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop.resize((SIDE, max(1, SIDE * height // width)), Image.Resampling.BICUBIC)


def damage(pixels: NDArray[np.uint8], defect: str, level: int, rng: random.Random) -> NDArray[np.uint8]:
    """Degrade an image [84, 84, 3] uint8; level 0 leaves it unchanged, 4 is the worst."""
    strength = DAMAGE[defect][level]
    if level == 0:
        return pixels
    image = Image.fromarray(pixels)
    if defect == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(strength)))
    if defect == "noise":
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, strength, pixels.shape)
        return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    few = max(1, round(SIDE / strength))
    small = image.resize((few, few), Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.NEAREST))


def degraded(pixels: NDArray[np.uint8], rng: random.Random) -> tuple[NDArray[np.uint8], str]:
    """A randomly degraded copy and the word for it."""
    level = rng.randrange(len(WORDS))
    defect = rng.choice(tuple(DAMAGE))
    return damage(pixels, defect, level, rng), WORDS[level]
