"""What decoding an image takes, known from its header, and the bounds on it."""

from __future__ import annotations

import re
from typing import BinaryIO

from PIL import Image

from owl2.runtime.errors import ImageError
from owl2.runtime.memory import host_memory

MAX_PIXELS = 16384 * 16384
"""Largest image that is decoded: 268 megapixels, more than phones deliver; the memory for them is checked besides."""

TIFF_PIXELS = 2 * 89_478_485
"""Pillow's own limit, at which it refuses a TIFF while it decodes it."""
WORK_BYTES = {"JPEG2000": 32, "WEBP": 16, "AVIF": 16, "HEIF": 16}
"""Bytes a pixel that a decoder works with besides Pillow's own copy, measured at most; 0 for the others."""
PROGRESSIVE_BYTES = 6
"""Bytes a pixel of the coefficients of a JPEG with several scans: 16 bits each, not subsampled."""
ROW_BYTES = 16
"""Bytes that Pillow takes to find each row of two copies: what an image of one column is made of."""

SMALL_BYTES = 256 << 20
"""Memory that any image may take."""
BYTES_PER_BYTE = 10_000
"""Memory that each byte of a file may take beyond that: drawings compress 1:1000, files made for attack 1:10^7."""

MAX_SCANNED = 32 * MAX_PIXELS
"""Pixels that the scans of a JPEG may go over, all together. Encoders write 10 scans or so; each takes as long as the
first, however little it holds."""

# In coded data 0xFF is followed by zero or by a restart marker. Any number of 0xFF may stand before a marker.
_MARKER = re.compile(b"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_SCAN, _END = 0xDA, 0xD9
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


def check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    """Refuse an image without pixels, or with too many.

    Raises:
        ImageError: with the figures.
    """
    if width == 0 or height == 0:
        raise ImageError(f"{name} is empty ({width} x {height}); an image needs at least one pixel")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height} pixels, the limit is {max_pixels}; scale it down first"
        )


def check_cost(image: Image.Image, file: BinaryIO, size: int, name: str) -> None:
    """Refuse an image that takes more memory than is free or than its file can be worth, or very long.

    Args:
        image: opened and not decoded yet.
        file: that it is in; its position stays.
        size: of the file, bytes.
        name: for messages.

    Raises:
        ImageError: with the figures.
    """
    pixels = image.width * image.height
    if image.format == "TIFF" and pixels > TIFF_PIXELS:
        raise ImageError(
            f"{name} has {pixels} pixels, TIFF is read up to {TIFF_PIXELS}; scale it down or save it in another format"
        )
    scans = _scans(file) if image.format in ("JPEG", "MPO") else 1
    if scans * pixels > MAX_SCANNED:
        raise ImageError(
            f"{name} has {scans} scans over {image.width} x {image.height} pixels, at most {MAX_SCANNED // pixels} are "
            "decoded; save it again, not progressive"
        )
    cost = decoding_bytes(image, scans)
    if cost > SMALL_BYTES + BYTES_PER_BYTE * size:
        raise ImageError(
            f"{name} claims {image.width} x {image.height} pixels in {size} bytes and would take {cost >> 20} MiB to "
            "decode, as no real image does; scale it down or save it in another format"
        )
    memory = host_memory()
    if memory is not None and cost > memory.available:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels, which take {cost >> 20} MiB to decode, "
            f"{memory.available >> 20} MiB are free; scale it down first"
        )


def decoding_bytes(image: Image.Image, scans: int = 1) -> int:
    """Memory to decode an image and to turn it into an upright one in RGB, at most.

    Args:
        image: opened and not decoded yet.
        scans: of a JPEG.
    """
    stored = 1 if image.mode in ("1", "L", "P") else 4
    work = WORK_BYTES.get(image.format or "", 0) + (PROGRESSIVE_BYTES if scans > 1 else 0)
    # Then a second copy: converted, without transparency or turned; of a palette with transparency, by way of a third.
    pixel_bytes = stored + max(work, 8 if image.mode == "P" else 4)
    # A TIFF's tiles may be larger than the image; they are decoded whole, with up to 4 channels of 16 bits.
    tags = getattr(image, "tag_v2", {})
    tile = 8 * tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_HEIGHT, 0)
    return int(image.height * (image.width * pixel_bytes + ROW_BYTES) + tile)


def _scans(file: BinaryIO) -> int:
    """Number of scans that the decoder goes over: 1 of an ordinary JPEG, where it stops after the first."""
    begin = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(begin)
    scans, position, components, progressive = 0, 2, 0, False
    while found := _MARKER.search(content, position):
        marker, start = found[1][0], found.end()
        if marker == _END:
            break
        length = int.from_bytes(content[start : start + 2], "big")
        if marker in _FRAMES:
            progressive, components = marker in _PROGRESSIVE, int.from_bytes(content[start + 7 : start + 8], "big")
        if marker == _SCAN:
            scans += 1
            if not progressive and content[start + 2 : start + 3] == bytes([components]):
                break
        position = start + length if marker not in (0x01, 0xD8) else start
    return scans
