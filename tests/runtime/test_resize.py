"""Resizing in bands gives the pixels of the plain chain, whatever the shape."""

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from owl2.runtime import preprocess as preprocessing, resize
from owl2.runtime.config import PreprocessConfig
from owl2.runtime.preprocess import MODES, PAD_COLOUR, preprocess
from owl2.runtime.resize import stretched, tall, wide

BICUBIC = Image.Resampling.BICUBIC
SIZE = 28

sides = st.one_of(st.integers(1, 60), st.integers(1, 700))
images = st.builds(
    lambda width, height, seed, top: Image.fromarray(
        np.random.default_rng(seed).integers(0, top, (height, width, 3), dtype=np.uint8) * (255 // (top - 1))
    ),
    sides,
    sides,
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 256]),  # black and white overshoots the most
)


def plain(image: Image.Image, mode: str) -> Image.Image:
    """The official chain, every step at once."""
    side = max(image.size)
    if mode == "resize":
        image = image.resize((side, image.height), BICUBIC).resize((side, side), BICUBIC)
    if mode == "pad":
        canvas = Image.new("RGB", (side, side), PAD_COLOUR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    short, long = sorted(image.size)
    scaled = int(SIZE * long / short)
    size = (SIZE, scaled) if image.width == short else (scaled, SIZE)
    image = image.resize((size[0], image.height), BICUBIC).resize(size, BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return image.crop((left, top, left + SIZE, top + SIZE))


@settings(max_examples=60, deadline=None)
@given(images, st.sampled_from(sorted(MODES)), st.integers(1, 3000))
@example(Image.new("RGB", (700, 1), (9, 200, 30)), "resize", 1400)
@example(Image.new("RGB", (1, 700), (9, 200, 30)), "pad", 1)
def test_bands_of_any_height_give_the_pixels_of_the_plain_chain(image: Image.Image, mode: str, band: int) -> None:
    config = PreprocessConfig(mode, SIZE, SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        whole = preprocess(image, config)
        patch.setattr(resize, "BAND_PIXELS", band)
        patch.setattr(preprocessing, "SQUARE_PIXELS", 0)
        made = preprocess(image, config)
    np.testing.assert_array_equal(made, whole)
    expected = np.asarray(plain(image, mode)).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.rint(made * 255).astype(np.uint8), expected)


@settings(max_examples=60, deadline=None)
@given(images, st.integers(1, 900), st.floats(0, 1), st.floats(0, 1))
def test_rows_of_a_stretched_image_are_pillows(image: Image.Image, height: int, start: float, part: float) -> None:
    top = int(start * (height - 1))
    bottom = top + 1 + int(part * (height - 1 - top))
    expected = tall(image, height).crop((0, top, image.width, bottom))
    np.testing.assert_array_equal(np.asarray(stretched(image, height, top, bottom)), np.asarray(expected))


def test_two_passes_straight_to_the_target_would_give_other_pixels() -> None:
    """Why the square is made at all."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    straight = tall(wide(noise, SIZE), SIZE)
    assert np.mean(np.asarray(straight) != np.asarray(plain(noise, "resize"))) > 0.05
