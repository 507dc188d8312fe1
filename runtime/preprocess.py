"""From an image to the vision tower's input, byte for byte as the original implementation prepares it.

An image is read upright and without transparency, unless :class:`ImageReading` says otherwise. :data:`MODES` say what
happens next. Then the CLIP processor scales the shorter edge to ``size``, crops the centre and normalises.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor

from owl2.runtime.config import PreprocessConfig, require
from owl2.runtime.errors import ImageError
from owl2.runtime.foreign import reading as reading_foreign, shorten
from owl2.runtime.image_cost import MAX_PIXELS
from owl2.runtime.image_files import PILLOW, ImageInput, ImageRecord, ReadImage, advice, opened
from owl2.runtime.resize import Canvas, resized, stretched, tall, whole, wide

Orientation = Literal["exif", "stored"]

MAX_CANVAS = 32768 * 32768
"""Largest image made on the way, band by band. In the modes that make a square of the longer side first, that side may
have 32768 pixels."""
MAX_STEP = 8192 * 8192
"""Largest image made on the way as a whole: 256 MiB at Pillow's 4 bytes a pixel."""

SQUARE_PIXELS = MAX_STEP
"""Largest square that is made as a whole, which is faster."""

# One value per pixel with no fixed range: Pillow's conversion to RGB clips at 255, which turns them white.
WIDE_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")

PAD_COLOUR = (122, 116, 104)

# What makes an image upright, by the value of the EXIF tag; as PIL.ImageOps.exif_transpose, which fails on broken EXIF.
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_WITHOUT_WARNINGS = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
"""Formats of photos, whose pixels Pillow decodes without a warning."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageReading:
    """How the pixels of an image are read.

    Attributes:
        orientation: ``exif`` turns an image as its EXIF orientation says, ``stored`` ignores that, as the original.
        background: colour to lay under transparency, as Pillow names it (``white``, ``#rrggbb``); None drops
            transparency, as the original does, and shows what colours the file has there.
    """

    orientation: Orientation = "exif"
    background: str | None = "white"

    def __post_init__(self) -> None:
        known = get_args(Orientation)
        require(
            isinstance(self.orientation, str) and self.orientation in known,
            f"orientation {shorten(self.orientation)} is not known; use {' or '.join(known)}",
        )
        try:
            possible = self.background is None or isinstance(ImageColor.getrgb(self.background), tuple)
        except (ValueError, TypeError, AttributeError):  # it takes anything
            possible = False
        require(possible, f"background {shorten(self.background)} is no colour; write white, #rrggbb or another name")


UPRIGHT = ImageReading()
"""The default."""
AS_ORIGINAL = ImageReading("stored", None)
"""As the original implementation reads images."""


def load_image(source: ImageInput, reading: ImageReading = UPRIGHT, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as :func:`read_image`, without the record."""
    return read_image(source, reading, max_pixels=max_pixels).image


def read_image(source: ImageInput, reading: ImageReading = UPRIGHT, *, max_pixels: int = MAX_PIXELS) -> ReadImage:
    """Read an image, of several frames the first, upright and in RGB; what it will take is checked before.

    Colours are taken as they are stored, as in the original: there is no colour management.

    Args:
        source: a path, a ``data:`` URI, the bytes of a file, a file opened in binary mode (read from its position on),
            a Pillow image, or a uint8 array [H, W, 3], [H, W, 4] or [H, W] (grey). One that was read already stays.
        reading: what to make of orientation and transparency.
        max_pixels: largest width × height that is decoded.

    Returns:
        The image without the file's other contents, and what was done to it.

    Raises:
        ImageError: missing, unreadable, truncated, too large or empty; or an array of another shape or dtype.
    """
    if isinstance(source, ReadImage):
        return source
    with opened(source, max_pixels) as (image, name):
        _check_depth(image, name)
        with reading_foreign(name, ImageError, advice()):
            with _quiet():
                tags, orientation = getattr(image, "tag_v2", {}), _orientation(image)
            # Pillow gives a TIFF the size that it will have when turned.
            stored = (int(tags.get(_TIFF_WIDTH, image.width)), int(tags.get(_TIFF_HEIGHT, image.height)))
            # Photos are decoded in several threads at a time.
            with nullcontext() if image.format in _WITHOUT_WARNINGS else _quiet():
                return _upright(image, reading, stored, orientation)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Pillow warns of, in metadata and palettes, from the user; one thread at a time."""
    with PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_image(source: ImageInput, config: PreprocessConfig, mode: str | None = None) -> None:
    """Check an image by its header, which takes no time: whether it can be opened, and its bounds up to the tower.

    Damage beyond the header is not found.

    Raises:
        ImageError: as :func:`read_image` and :func:`preprocess`.
        ConfigError: an unknown mode.
    """
    with opened(source, MAX_PIXELS) as (image, name):
        _check_depth(image, name)
        _plan(image, config, mode)


def preprocess(image: Image.Image, config: PreprocessConfig, mode: str | None = None) -> NDArray[np.float32]:
    """Turn an RGB image into the vision tower's input.

    Args:
        image: in mode RGB, as :func:`load_image` returns it.
        config: sizes, mean and standard deviation.
        mode: replaces ``config.mode`` when given.

    Returns:
        [3, R, R] float32 with R = ``config.crop_size``, normalised, channels in the order R, G, B.

    Raises:
        ImageError: the image is not RGB, or so long that a step would exceed ``MAX_CANVAS`` or ``MAX_STEP``.
        ConfigError: an unknown mode.
    """
    if image.mode != "RGB":
        raise ImageError(f"preprocess expects an RGB image, got mode {image.mode}; pass it through load_image")
    cropped = np.asarray(as_seen(image, config, mode))
    # As in CLIP, the scaling to 0..1 is done in float64, the rest in float32.
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    return np.ascontiguousarray((((cropped * (1 / 255)).astype(np.float32) - mean) / std).transpose(2, 0, 1))


def as_seen(image: Image.Image, config: PreprocessConfig, mode: str | None = None) -> Image.Image:
    """What the model sees of an RGB image: R x R; arguments and errors as :func:`preprocess`."""
    canvas, width, height = _plan(image, config, mode)
    side = config.crop_size
    left, top = (width - side) // 2, (height - side) // 2
    return resized(canvas, width, height).crop((left, top, left + side, top + side))


def check_mode(mode: str) -> None:
    """Refuse a mode of preprocessing that is not one of :data:`MODES`.

    Raises:
        ConfigError: with the known ones.
    """
    known = isinstance(mode, str) and mode in MODES
    require(known, f"preprocess {shorten(mode)} is not known; use {', '.join(MODES)}")


def digest(pixels: NDArray[np.float32]) -> str:
    """SHA-256 (hex) of preprocessed pixels: equal digests mean equal rows in the decoder."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype="<f4").tobytes()).hexdigest()


def _check_depth(image: Image.Image, name: str) -> None:
    if image.mode in WIDE_MODES:
        raise ImageError(
            f"{name} has pixels of mode {image.mode}, more than 8 bits; convert it to 8-bit grey or RGB first"
        )


def _upright(image: Image.Image, reading: ImageReading, stored: tuple[int, int], orientation: int) -> ReadImage:
    image.load()
    # Pillow turns a TIFF while it decodes it, and removes the orientation.
    turned = image.format == "TIFF" and orientation != _orientation(image)
    if reading.orientation == "stored" and not turned:
        orientation = 1
    transparent, background = False, None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        transparent = image.getchannel("A").getextrema() != (255, 255)
        if transparent and reading.background is not None:
            background = reading.background
            opaque = Image.new("RGB", image.size, background)
            opaque.paste(image, mask=image)
            image = opaque
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in _TURNS and not turned:
        image = image.transpose(_TURNS[orientation])
    # A copy would double the memory, and what else the file says must not be applied again.
    image = image._new(image.im)
    image.info = {}
    return ReadImage(image, ImageRecord(stored, image.size, orientation, transparent, background))


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF, which many files have, says nothing
        return 1
    return orientation if orientation in _TURNS else 1


def _plan(image: Image.Image, config: PreprocessConfig, mode: str | None) -> tuple[Canvas, int, int]:
    """What the CLIP processor gets, and the width and height that it scales this to; no pixel is touched."""
    mode = config.mode if mode is None else mode
    check_mode(mode)
    canvas = MODES[mode](image)
    # The shorter edge becomes ``size``, the longer one is truncated to whole pixels.
    short, long = sorted((canvas.width, canvas.height))
    scaled = int(config.size * long / short)
    width, height = (config.size, scaled) if canvas.width == short else (scaled, config.size)
    # The first pass makes an image of the new width and the old height.
    steps = ((canvas.width, canvas.height, MAX_CANVAS), (width, max(height, canvas.height), MAX_STEP))
    for step_width, step_height, limit in steps:
        if step_width * step_height > limit:
            raise ImageError(
                f"an image of {image.width} x {image.height} would become {step_width} x {step_height} on the way in "
                f"mode {mode}, the limit is {limit} pixels; scale its longer side down or cut it first"
            )
    return canvas, width, height


def _squared(image: Image.Image) -> Canvas:
    side = max(image.size)
    if image.height == side:
        return Canvas(side, side, lambda top, bottom: wide(image.crop((0, top, image.width, bottom)), side))
    if side * side <= SQUARE_PIXELS:  # Pillow makes all rows at once, which is faster
        return Canvas(side, side, lambda _top, _bottom: tall(image, side), band=side)
    return Canvas(side, side, lambda top, bottom: stretched(image, side, top, bottom))


def _padded(image: Image.Image) -> Canvas:
    side = max(image.size)
    left, above = (side - image.width) // 2, (side - image.height) // 2

    def rows(top: int, bottom: int) -> Image.Image:
        band = Image.new("RGB", (side, bottom - top), PAD_COLOUR)
        band.paste(image, (left, above - top))
        return band

    return Canvas(side, side, rows)


MODES: dict[str, Callable[[Image.Image], Canvas]] = {
    "resize": _squared,  # to its longer side, without keeping the proportions: the official quick start
    "pad": _padded,  # pasted on a square of the mean colour: Q-Align
    "crop": whole,
}
"""Modes of preprocessing by name: from an RGB image to the one that the CLIP processor gets."""
