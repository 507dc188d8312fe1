"""Bicubic resizing with the pixels of Pillow's, in bounded memory.

Pillow resizes rows first, then columns, and rounds to 8 bits after each pass. A chain of resizes cannot be shortened:
two passes straight to its last size give other pixels. It can be cut into bands of rows, because the first pass treats
each row by itself, and :func:`stretched` makes any rows of the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BAND_PIXELS = 1 << 22
"""Pixels of a canvas that are in memory at a time: 16 MiB at Pillow's 4 bytes a pixel."""

PRECISION = 22
"""Bits after the point of a weight: ``PRECISION_BITS`` in Pillow's Resample.c."""
SHARPNESS = -0.5
"""The parameter ``a`` of Pillow's bicubic filter; Keys, "Cubic convolution interpolation" (1981)."""


@dataclass(frozen=True)
class Canvas:
    """An RGB image that is made band by band.

    Attributes:
        width, height: of the whole.
        rows: makes rows ``top`` to ``bottom`` (exclusive).
        band: rows to make at a time; 0 for as many as :data:`BAND_PIXELS` hold.
    """

    width: int
    height: int
    rows: Callable[[int, int], Image.Image]
    band: int = 0


def whole(image: Image.Image) -> Canvas:
    """An image that exists already, as a canvas."""
    return Canvas(image.width, image.height, lambda top, bottom: image.crop((0, top, image.width, bottom)))


def resized(canvas: Canvas, width: int, height: int) -> Image.Image:
    """Bicubic resize of a canvas, rows first."""
    narrow = Image.new("RGB", (width, canvas.height))
    step = canvas.band or max(1, BAND_PIXELS // canvas.width)
    for top in range(0, canvas.height, step):
        bottom = min(top + step, canvas.height)
        narrow.paste(wide(canvas.rows(top, bottom), width), (0, top))
    return tall(narrow, height)


def wide(image: Image.Image, width: int) -> Image.Image:
    """The first pass alone: every row to a new width.

    A call for each direction, because recent Pillow versions sometimes swap the passes, which shows in the result.
    """
    return image.resize((width, image.height), Image.Resampling.BICUBIC)


def tall(image: Image.Image, height: int) -> Image.Image:
    """The second pass alone: every column to a new height."""
    return image.resize((image.width, height), Image.Resampling.BICUBIC)


def stretched(image: Image.Image, height: int, top: int, bottom: int) -> Image.Image:
    """Rows ``top`` to ``bottom`` of ``tall(image, height)``, without making the others.

    The arithmetic is that of Pillow's Resample.c in whole numbers, so that the result is exact.
    """
    first, weights = vertical_weights(image.height, height, top, bottom)
    used = (weights != 0) * (np.arange(weights.shape[1]) + first[:, None])
    above, below = int(first[0]), int(used.max()) + 1
    source = np.asarray(image.crop((0, above, image.width, below))).astype(np.int32)
    result = np.empty((bottom - top, *source.shape[1:]), dtype=np.uint8)
    for row, (start, row_weights) in enumerate(zip(first - above, weights)):
        total = np.full(source.shape[1:], 1 << (PRECISION - 1), dtype=np.int32)
        for offset in np.flatnonzero(row_weights):
            total += source[start + offset] * row_weights[offset]
        total >>= PRECISION
        result[row] = np.clip(total, 0, 255, out=total)
    return Image.fromarray(result)


def vertical_weights(old: int, new: int, top: int, bottom: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Weights of the source rows that make rows ``top`` to ``bottom`` when ``old`` rows become ``new``.

    Returns:
        The first source row of each new one, and the weights from there on, in units of 2^-``PRECISION``.
    """
    scale = old / new
    filter_scale = max(scale, 1.0)
    reach = 2 * filter_scale
    centre = (np.arange(top, bottom) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach + 0.5).astype(np.int64), old)
    offsets = np.arange(int(np.ceil(reach)) * 2 + 1)
    distance = np.abs((offsets + first[:, None] - centre[:, None] + 0.5) * (1 / filter_scale))
    near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * SHARPNESS
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights[offsets >= (end - first)[:, None]] = 0.0
    # One by one, as C adds them: numpy's own sum has another order.
    total = np.add.accumulate(weights, axis=1)[:, -1:]
    scaled = weights / total * (1 << PRECISION)
    return first, np.trunc(np.where(scaled < 0, scaled - 0.5, scaled + 0.5)).astype(np.int32)
