"""Degraded images: deterministic, and worse with every step."""

import random

import numpy as np
import pytest
from numpy.typing import NDArray
from quality import DAMAGE, WORDS, damage, degraded
from world import draw, random_scene


def scene_pixels(seed: int) -> NDArray[np.uint8]:
    rng = random.Random(seed)
    return draw(random_scene(rng, 4, held_out=False), rng)


@pytest.mark.parametrize("defect", list(DAMAGE))
def test_each_level_is_further_from_the_original(defect: str) -> None:
    pixels = scene_pixels(0)
    errors = [
        np.abs(damage(pixels, defect, level, random.Random(1)).astype(int) - pixels).mean()
        for level in range(len(WORDS))
    ]
    assert errors[0] == 0
    assert len(set(errors)) == len(errors)
    assert errors == sorted(errors)


def test_the_same_seed_gives_the_same_image_and_every_word_comes() -> None:
    words = set()
    for seed in range(60):
        pixels = scene_pixels(seed)
        first, second = (degraded(pixels, random.Random(seed)) for _ in range(2))
        np.testing.assert_array_equal(first[0], second[0])
        assert first[1] == second[1]
        words.add(first[1])
    assert words == set(WORDS)


def test_photos_of_the_two_sides_differ() -> None:
    pytest.importorskip("skimage")
    from quality import HELD_OUT_PHOTOS, TRAIN_PHOTOS, photo_crop

    assert not set(TRAIN_PHOTOS) & set(HELD_OUT_PHOTOS)
    for held_out in (False, True):
        crop = photo_crop(random.Random(0), held_out=held_out)
        assert crop.shape == (84, 84, 3)
        assert crop.dtype == np.uint8
