"""Images as callers give them: opened, with their headers checked, before any pixel is decoded."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, TypeGuard
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from owl2.runtime.errors import ImageError
from owl2.runtime.foreign import ForeignError, cut, open_file, reading
from owl2.runtime.harmless import harmless
from owl2.runtime.image_cost import check_cost, check_size


class BinaryFile(Protocol):
    """An open file: what has :meth:`read`."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What was done to an image before the model saw it.

    Attributes:
        stored: width and height in the file.
        shown: width and height after it was turned.
        orientation: EXIF orientation that was applied; 1 if it was not turned.
        transparent: whether some of its pixels are not opaque.
        background: the colour that was laid under them; None if there are none or their transparency was dropped.
    """

    stored: tuple[int, int]
    shown: tuple[int, int]
    orientation: int = 1
    transparent: bool = False
    background: str | None = None


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image that has been read: in RGB, with what was done to it."""

    image: Image.Image
    record: ImageRecord


ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | Image.Image | NDArray[np.uint8] | ReadImage
)
"""A path, a ``data:`` URI, a file's bytes, an open binary file, a Pillow image or a uint8 array [H, W, 3]."""

FILE_BYTES = 1 << 30
"""Largest image file that is read: :data:`image_cost.MAX_PIXELS` without compression take 0.8 GB."""
NAME_SHOWN = 400
"""Characters of a path that a message repeats."""

_AVIF = ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()  # since Pillow 11.3
# The raster formats people have. Pillow's full list includes EPS, which runs Ghostscript on the file.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", *_AVIF)

# A path loses one of the two slashes; a single letter before a colon is a drive of Windows.
_URL = re.compile(r"(https?|ftps?|file):/|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
PILLOW = threading.Lock()
"""Held where Pillow's pixel limit or Python's warning filters are changed, which are those of the whole process."""


def held(source: ImageInput) -> ImageInput:
    """An image that can be read again: of an open file or a buffer, its content.

    Raises:
        ImageError: an open file that cannot be read, is not binary or holds too much.
    """
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if hasattr(source, "read") and not isinstance(source, Image.Image | os.PathLike):
        with reading("the open file", ImageError, "give a file opened in binary mode, at the start of an image"):
            content = bytearray()
            while block := source.read(FILE_BYTES + 1 - len(content)):  # a pipe gives a part at a time
                if not isinstance(block, bytes | bytearray):
                    raise ForeignError(f"it gives {type(block).__name__}, not bytes")
                content += block
                if len(content) > FILE_BYTES:
                    raise ForeignError(f"it has more than {FILE_BYTES} bytes")
            return bytes(content)
    return source


def is_image(source: object) -> TypeGuard[ImageInput]:
    """Whether ``source`` is of a type that can be one image, and not a list of them."""
    return hasattr(source, "read") or isinstance(
        source, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | np.ndarray | ReadImage
    )


@contextmanager
def opened(source: ImageInput, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """Open an image and check what its header says; no pixel is decoded.

    Yields:
        The image, and a name for messages.

    Raises:
        ImageError: it cannot be opened, or would take too much.
    """
    source = held(source)
    match source:
        case Image.Image():
            check_size(source.width, source.height, max_pixels, "the image")
            file = getattr(source, "fp", None)
            if file is not None and getattr(source, "tile", None):  # opened, but not decoded yet
                with reading("the image", ImageError, advice()):
                    check_cost(source, file, _size_of(file), "the image")
            yield source, "the image"
        case np.ndarray():
            yield _from_array(source, max_pixels), "the array"
        case bytes():
            with _from_file(io.BytesIO(source), len(source), "the image in bytes", max_pixels) as image:
                yield image, "the image in bytes"
        case str() if source[:5].lower() == "data:":
            content = _from_data_uri(source)
            with _from_file(io.BytesIO(content), len(content), "the data: URI", max_pixels) as image:
                yield image, "the data: URI"
        case str() | os.PathLike():
            with _from_path(source, max_pixels) as (image, name):
                yield image, name
        case _:
            raise ImageError(
                f"an image cannot be given as {type(source).__name__}; pass a path, a data: URI, the bytes of a file, "
                "a file opened in binary mode, a PIL.Image.Image or a uint8 array [H, W, 3]"
            )


def _size_of(file: BinaryIO) -> int:
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size


def _from_array(array: NDArray[np.uint8], max_pixels: int) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_fits:
        raise ImageError(
            f"an image given as an array must be uint8 with shape [H, W, 3], [H, W, 4] or [H, W], "
            f"got {array.dtype} {list(array.shape)}; scale values to 0..255 and put the channels last"
        )
    check_size(array.shape[1], array.shape[0], max_pixels, "the array")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_data_uri(uri: str) -> bytes:
    """Content of a ``data:`` URI (RFC 2397); what it says about its type is ignored."""
    with reading("the data: URI", ImageError, "write data:image/png;base64, and the file in base64"):
        if len(uri) > 2 * FILE_BYTES:
            raise ForeignError(f"it has {len(uri)} characters, at most {2 * FILE_BYTES} are read")
        head, comma, data = uri.partition(",")
        if not comma:
            raise ForeignError("it has no comma before the data")
        content = unquote_to_bytes(data)
        if not head.lower().rstrip().endswith(";base64"):
            return content
        # As browsers read it: in either alphabet, with or without padding.
        content = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)


@contextmanager
def _from_path(source: str | os.PathLike[str], max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    path = os.fspath(source)
    name = cut(harmless(str(path)), NAME_SHOWN)
    if _URL.match(name):
        raise ImageError(f"owl2 opens no URLs; download {cut(name)} first and give the file")
    with reading(name, ImageError, advice()):
        file = open_file(Path(path), FILE_BYTES)
    with file, _from_file(file, os.fstat(file.fileno()).st_size, name, max_pixels) as image:
        yield image, name


@contextmanager
def _from_file(file: BinaryIO, size: int, name: str, max_pixels: int) -> Iterator[Image.Image]:
    with reading(name, ImageError, advice()):
        image = _identified(file, name, max_pixels)
    with image:
        check_size(image.width, image.height, max_pixels, name)
        with reading(name, ImageError, advice()):
            check_cost(image, file, size, name)
        yield image


def advice() -> str:
    """What to do about an image that cannot be read."""
    return f"give an intact image in one of these formats: {', '.join(FORMATS)}"


def _identified(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    start = file.read(64)
    file.seek(0)
    heic = start[4:8] == b"ftyp" and any(brand in start[8:] for brand in _HEIC_BRANDS)
    if heic:
        _register_heic(name)
    with PILLOW, warnings.catch_warnings():
        # About broken metadata. And Pillow's own limit is of the whole process: it warns from one, refuses from two
        # times it; ours comes after.
        warnings.simplefilter("ignore")
        theirs = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            return Image.open(file, formats=(*FORMATS, "HEIF") if heic else FORMATS)
        except UnidentifiedImageError:
            raise ForeignError("its format cannot be identified") from None
        except Image.DecompressionBombError as error:
            raise ImageError(
                f"{name} is far too large ({error}); the limit here is {max_pixels} pixels: scale it down first"
            ) from error
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


def _register_heic(name: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(
            f"{name} is a HEIC image, which needs another package: pip install 'owl2[heic]', or save it as JPEG"
        ) from None
    pillow_heif.register_heif_opener()
