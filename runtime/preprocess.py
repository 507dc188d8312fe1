"""From an image to the vision tower's input, byte for byte as the original implementation prepares it.

:data:`MODES` say what happens first. Then the CLIP processor scales the shorter edge to ``size``, crops the centre and
normalises.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from owl2.runtime.config import PreprocessConfig, require
from owl2.runtime.errors import ImageError

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

MAX_PIXELS = 8192 * 8192
"""Largest image that is decoded or made on the way: 67 megapixels, 256 MiB at Pillow's 4 bytes a pixel.

More than most cameras deliver, and small enough that a hostile file cannot exhaust a small device. In the modes
that make a square of the longer side first, that side may have 8192 pixels.
"""

# The raster formats people have. Pillow's full list includes EPS, which runs Ghostscript on the file.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# One value per pixel with no fixed range: Pillow's conversion to RGB clips at 255, which turns them white.
WIDE_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")

PAD_COLOUR = (122, 116, 104)


def load_image(source: ImageInput, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image and convert it to RGB, checking its size before decoding it.

    The original does not apply the EXIF orientation, so neither does this. Alpha is dropped.

    Args:
        source: a path, a Pillow image, or a uint8 array [H, W, 3], [H, W, 4] or [H, W] (grey).
        max_pixels: largest width × height that is decoded.

    Raises:
        ImageError: missing, unreadable, truncated, too large or empty; or an array of another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, max_pixels), "the array")
    if isinstance(source, Image.Image):
        _check_size(source.width, source.height, max_pixels, "the image")
        return _to_rgb(source, "the image")
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source), max_pixels)
    raise ImageError(
        f"an image cannot be given as {type(source).__name__}; pass a path, a PIL.Image.Image or a uint8 array "
        "[H, W, 3]; PIL.Image.open(file) reads an open file, and io.BytesIO(data) makes one of bytes"
    )


def preprocess(image: Image.Image, config: PreprocessConfig, mode: str | None = None) -> NDArray[np.float32]:
    """Turn an RGB image into the vision tower's input.

    Args:
        image: in mode RGB, as :func:`load_image` returns it.
        config: sizes, mean and standard deviation.
        mode: replaces ``config.mode`` when given.

    Returns:
        [3, R, R] float32 with R = ``config.crop_size``, normalised, channels in the order R, G, B.

    Raises:
        ImageError: the image is not RGB, or so long that a step would exceed ``MAX_PIXELS``.
        ConfigError: an unknown mode.
    """
    if image.mode != "RGB":
        raise ImageError(f"preprocess expects an RGB image, got mode {image.mode}; pass it through load_image")
    mode = config.mode if mode is None else mode
    check_mode(mode)
    image = MODES[mode](image)
    # The shorter edge becomes ``size``, the longer one is truncated to whole pixels.
    short, long = sorted(image.size)
    scaled = int(config.size * long / short)
    width, height = (config.size, scaled) if image.width == short else (scaled, config.size)
    # The first pass makes an image of the new width and the old height.
    check_step(image, width, max(height, image.height), mode)
    image = _resampled(image, width, height)
    side = config.crop_size
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = np.asarray(image.crop((left, top, left + side, top + side)))
    # As in CLIP, the scaling to 0..1 is done in float64, the rest in float32.
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    return np.ascontiguousarray((((cropped * (1 / 255)).astype(np.float32) - mean) / std).transpose(2, 0, 1))


def check_mode(mode: str) -> None:
    """Refuse a mode of preprocessing that is not one of :data:`MODES`.

    Raises:
        ConfigError: with the known ones.
    """
    require(isinstance(mode, str) and mode in MODES, f"preprocess {mode!r} is not known; use {', '.join(MODES)}")


def digest(pixels: NDArray[np.float32]) -> str:
    """SHA-256 (hex) of preprocessed pixels: equal digests mean equal rows in the decoder."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype="<f4").tobytes()).hexdigest()


def _from_array(array: NDArray[np.uint8], max_pixels: int) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_fits:
        raise ImageError(
            f"an image given as an array must be uint8 with shape [H, W, 3], [H, W, 4] or [H, W], "
            f"got {array.dtype} {list(array.shape)}; scale values to 0..255 and put the channels last"
        )
    _check_size(array.shape[1], array.shape[0], max_pixels, "the array")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_file(path: Path, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns between one and two times its own pixel limit; ours is checked below.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError(
                f"{path} is far too large ({error}); the limit here is {max_pixels} pixels: scale it down first"
            ) from error
        except Exception as error:
            raise _unreadable(str(path), error) from error
    with image:
        _check_size(image.width, image.height, max_pixels, str(path))
        return _to_rgb(image, str(path))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in WIDE_MODES:
        raise ImageError(
            f"{name} has pixels of mode {image.mode}, more than 8 bits; convert it to 8-bit grey or RGB first"
        )
    with warnings.catch_warnings():
        # About metadata and about palettes with transparency, which is dropped on purpose.
        warnings.simplefilter("ignore")
        try:
            return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged data.
            raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ImageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ImageError(
        f"cannot read {name}: {reason or type(error).__name__}; "
        f"give an intact image in one of these formats: {', '.join(FORMATS)}"
    )


def _check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    if width == 0 or height == 0:
        raise ImageError(f"{name} is empty ({width} x {height}); an image needs at least one pixel")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height} pixels, the limit is {max_pixels}; scale it down first"
        )


def check_step(image: Image.Image, width: int, height: int, mode: str) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"an image of {image.width} x {image.height} would become {width} x {height} on the way in "
            f"mode {mode}, the limit is {MAX_PIXELS} pixels; scale its longer side down or cut it first"
        )


def _resampled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic resize, rows first.

    Two calls with one direction each, because recent Pillow versions sometimes swap the passes, and each pass
    rounds to 8 bits: the order shows in the result.
    """
    bicubic = Image.Resampling.BICUBIC
    return image.resize((width, image.height), bicubic).resize((width, height), bicubic)


def _squared(image: Image.Image) -> Image.Image:
    side = max(image.size)
    check_step(image, side, side, "resize")
    return _resampled(image, side, side)


def _padded(image: Image.Image) -> Image.Image:
    side = max(image.size)
    check_step(image, side, side, "pad")
    canvas = Image.new("RGB", (side, side), PAD_COLOUR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resize": _squared,  # to its longer side, without keeping the proportions: the official quick start
    "pad": _padded,  # pasted on a square of the mean colour: Q-Align
    "crop": lambda image: image,
}
"""Modes of preprocessing by name: from an RGB image to the one that the CLIP processor gets."""
