"""Pixels equal the original's bit for bit; anything that is not a usable image is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_images import png
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from PIL import Image

from owl2 import Owl2
from owl2.runtime.config import PreprocessConfig
from owl2.runtime.errors import ImageError
from owl2.runtime.image_cost import MAX_PIXELS
from owl2.runtime.image_files import FORMATS
from owl2.runtime.preprocess import (
    AS_ORIGINAL,
    MAX_CANVAS,
    MAX_STEP,
    MODES,
    digest,
    load_image,
    preprocess,
)
from owl2.runtime.resize import whole

CASES = [("a1_base_bin", 56), ("a2_fp16_safetensors", 70)]
RECORDED = ["resize", "pad", "crop"]
"""Modes that the original has, and goldens of."""
SMALL = PreprocessConfig("resize", 56, 56)


def images(golden: Path, case: str) -> list[Image.Image]:
    names = json.loads((golden / case / "checks.json").read_text())["images"]
    return [load_image(golden / "images" / name, AS_ORIGINAL) for name in names]


def as_bytes(pixels: NDArray[np.float32], config: PreprocessConfig) -> NDArray[np.uint8]:
    """Undo the normalisation: the 8-bit values before it."""
    mean, std = np.array(config.mean)[:, None, None], np.array(config.std)[:, None, None]
    values: NDArray[np.uint8] = np.rint((pixels * std + mean) * 255).astype(np.uint8)
    return values


@pytest.mark.parametrize("mode", RECORDED)
@pytest.mark.parametrize(("case", "size"), CASES)
def test_pixels_are_the_originals_bit_for_bit(golden: Path, case: str, size: int, mode: str) -> None:
    expected = np.load(golden / case / "vision.npz")
    config = PreprocessConfig(mode, size, size)
    pixels = np.stack([preprocess(image, config) for image in images(golden, case)])
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(as_bytes(pixels[0], config), expected[f"uint8_{mode}"][0])
    np.testing.assert_array_equal(pixels, expected[f"pixel_values_{mode}"])


def test_the_mode_can_be_overridden(golden: Path) -> None:
    image = load_image(golden / "images" / "00_rgb_landscape_97x61.png")
    expected = np.load(golden / "a1_base_bin" / "vision.npz")["pixel_values_pad"][0]
    np.testing.assert_array_equal(preprocess(image, SMALL, "pad"), expected)


@pytest.mark.parametrize("name", ["02_gray_L_40x75.png", "03_rgba_64x64.png", "04_palette_P_120x33.png"])
def test_pillow_image_path_and_text_path_agree(golden: Path, name: str) -> None:
    path = golden / "images" / name
    with Image.open(path) as image:
        expected = image.convert("RGB")
        assert load_image(image, AS_ORIGINAL) == expected
    assert load_image(path, AS_ORIGINAL) == load_image(str(path), AS_ORIGINAL) == expected


def test_arrays_agree_with_images(golden: Path) -> None:
    image = load_image(golden / "images" / "00_rgb_landscape_97x61.png")
    array = np.asarray(image)
    assert load_image(array) == image
    assert load_image(np.dstack([array, np.zeros(array.shape[:2], np.uint8)]), AS_ORIGINAL) == image
    assert load_image(array[:, ::-1]).getpixel((0, 0)) == tuple(array[0, -1])
    assert load_image(array[..., 0]).getpixel((3, 5)) == (array[5, 3, 0],) * 3


@pytest.mark.parametrize("mode", MODES)
def test_one_pixel_becomes_a_plain_square(mode: str) -> None:
    config = PreprocessConfig(mode, 56, 56)
    pixels = preprocess(load_image(np.full((1, 1, 3), [[[255, 0, 128]]], np.uint8)), config)
    assert pixels.shape == (3, 56, 56)
    assert (as_bytes(pixels, config) == np.array([255, 0, 128])[:, None, None]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(list(MODES)), st.integers(0, 2**32 - 1))
def test_every_shape_gives_finite_square_pixels(width: int, height: int, mode: str, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = preprocess(load_image(array), PreprocessConfig(mode, 28, 28))
    assert pixels.shape == (3, 28, 28)
    assert np.isfinite(pixels).all()


def test_crop_larger_than_the_image_is_filled_with_black() -> None:
    config = PreprocessConfig("crop", 20, 30)
    values = as_bytes(preprocess(load_image(np.full((20, 20, 3), 200, np.uint8)), config), config)
    assert values[:, 5:25, 5:25].min() == 200
    assert values.sum() == 3 * 20 * 20 * 200


def test_padding_is_centred_rounding_down() -> None:
    config = PreprocessConfig("pad", 4, 4)
    values = as_bytes(preprocess(load_image(np.zeros((1, 4, 3), np.uint8)), config), config)
    np.testing.assert_array_equal(values[0], [[122] * 4, [0] * 4, [122] * 4, [122] * 4])


def test_exif_orientation_is_ignored_like_the_original(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", AS_ORIGINAL).size == (30, 20)


def test_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([200, 100, 50] * 256)
    image.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")
    assert load_image(tmp_path / "p.png", AS_ORIGINAL).getpixel((0, 0)) == (200, 100, 50)
    assert load_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("width", "height"), [(17_000, 17_000), (30_000, 30_000), (65_000, 65_000)])
def test_too_large_is_refused_before_decoding(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    with pytest.raises(ImageError, match=rf"bomb\.png.*{width * height}.*{MAX_PIXELS}.*scale it down"):
        load_image(path)


def test_the_limit_on_pixels_is_the_callers(golden: Path) -> None:
    path = golden / "images" / "05_rgb_exact_56x56.png"
    assert load_image(path, max_pixels=56 * 56).size == (56, 56)
    for source in (path, load_image(path), np.zeros((56, 56, 3), np.uint8)):
        with pytest.raises(ImageError, match="56 x 56 = 3136 pixels, the limit is 3135"):
            load_image(source, max_pixels=56 * 56 - 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_thin_strip_does_not_explode(mode: str) -> None:
    strip = Image.new("RGB", (1, 200_000))
    limit = MAX_STEP if mode == "crop" else MAX_CANVAS
    with pytest.raises(ImageError, match=f"1 x 200000 would become .* in mode {mode}, the limit is {limit}"):
        preprocess(strip, PreprocessConfig(), mode)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "cannot be identified"),
        ("text.jpg", b"this is no image", "cannot be identified"),
        ("no_pixels.png", png(8, 8), "cannot read .*no_pixels"),
        (
            "vector.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "cannot be identified",
        ),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{reason}.*give an intact image in one of these formats"):
        load_image(tmp_path / name)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read .*nowhere\.png: it is missing"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"cannot read .*: it is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff"])
def test_truncated_files_are_refused(golden: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    load_image(golden / "images" / "07_rgb_large_301x199.png").save(path)
    assert load_image(path).size == (301, 199)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ImageError, match=f"cannot read .*cut.{suffix}"):
        load_image(path)


@pytest.mark.parametrize(
    ("array", "given_as"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\]"),
        (np.zeros(5, np.uint8), r"uint8 \[5\]"),
    ],
)
def test_arrays_of_another_kind_are_refused(array: NDArray[Any], given_as: str) -> None:
    with pytest.raises(ImageError, match=f"must be uint8 .* got {given_as}; scale values"):
        load_image(array)


def test_empty_images_are_refused() -> None:
    with pytest.raises(ImageError, match=r"the array is empty \(0 x 5\)"):
        load_image(np.zeros((5, 0, 3), np.uint8))
    with pytest.raises(ImageError, match=r"the image is empty \(0 x 0\)"):
        load_image(Image.new("RGB", (0, 0)))


def test_sixteen_bit_images_are_refused_instead_of_turning_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match=r"deep\.png has pixels of mode I;16, more than 8 bits; convert it"):
        load_image(tmp_path / "deep.png")


def test_other_types_and_unconverted_images_are_refused() -> None:
    with pytest.raises(ImageError, match="cannot be given as int; pass a path"):
        load_image(7)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="expects an RGB image, got mode L"):
        preprocess(Image.new("L", (4, 4)), SMALL)


def test_digest_tells_images_apart(golden: Path) -> None:
    first, second = (preprocess(image, SMALL) for image in images(golden, "a1_base_bin")[:2])
    assert digest(first) == digest(first.copy()) != digest(second)
    assert digest(np.asfortranarray(first)) == digest(first)
    assert digest(np.zeros(1, np.float32)) == "df3f619804a92fdb4057192dc43dd748ea778adc52bc498ce80524c014b81119"


class TestExtension:
    """A mode and a file format of another package: one entry each."""

    def test_a_mode(self, monkeypatch: pytest.MonkeyPatch, bundle_a1: Path) -> None:
        monkeypatch.setitem(MODES, "mirror", lambda image: whole(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
        image = Image.fromarray(np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3))
        mirrored = preprocess(image, SMALL, "mirror")
        np.testing.assert_array_equal(mirrored, preprocess(image, SMALL, "crop")[:, :, ::-1])
        with Owl2.load(bundle_a1) as owl:
            assert owl.logits("<|image|>?", images=image, preprocess="mirror").shape[1] == owl.config.decoder.vocab_size

    def test_a_file_format(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / "image.pcx"
        Image.new("RGB", (4, 4), (255, 0, 0)).save(path)
        with pytest.raises(ImageError, match="give an intact image in one of these formats: BMP"):
            load_image(path)
        monkeypatch.setattr("owl2.runtime.image_files.FORMATS", (*FORMATS, "PCX"))
        assert load_image(path).getpixel((0, 0)) == (255, 0, 0)
