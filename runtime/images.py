"""Images on their way into the decoder: preprocessed, identified by their pixels, encoded once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.config import PreprocessConfig, require
from owl2.runtime.encoded import SUFFIX, EncodedImage
from owl2.runtime.engine import Engine, Floats
from owl2.runtime.errors import ImageError
from owl2.runtime.foreign import shorten
from owl2.runtime.image_files import ImageInput, ImageRecord, ReadImage, held, is_image
from owl2.runtime.preprocess import UPRIGHT, ImageReading, digest, load_image, preprocess, read_image

GivenImage: TypeAlias = ImageInput | EncodedImage
Images = GivenImage | Sequence[GivenImage] | None
"""One image or several, each as :data:`ImageInput` or encoded before; None for none."""

DECODING = threading.BoundedSemaphore(os.cpu_count() or 1)
"""Images that are decoded at a time, whoever asks: a small file may become a gigabyte of pixels on the way."""
CACHED_IMAGES = 16
"""Images whose decoder rows are kept after they were encoded; one takes about 1 MB in the 7B model."""


@dataclass(frozen=True)
class PreparedImage:
    """A preprocessed image.

    Attributes:
        digest: of the pixels; equal pixels are the same image wherever they came from.
        pixels: float32 [3, R, R]; empty if it is encoded.
        record: what was done to it.
        encoded: its rows, if they were given.
    """

    digest: str
    pixels: Floats
    record: ImageRecord
    encoded: EncodedImage | None = None


NO_PIXELS: Floats = np.empty((3, 0, 0), dtype=np.float32)
UNREAD = PreparedImage("", NO_PIXELS, ImageRecord((0, 0), (0, 0)))
"""Stands for an image that has not been read yet, in a prompt whose length is wanted."""


def as_list(images: Images) -> list[GivenImage]:
    """The images that a caller gave, one by one; open files are read.

    Raises:
        ImageError: not an image, nor a list of them.
    """
    if images is None:
        return []
    if isinstance(images, EncodedImage):
        return [images]
    if is_image(images):
        return [held(images)]
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview):
        return [image if isinstance(image, EncodedImage) else held(image) for image in images]
    load_image(images)  # raises: it says what can be given
    raise ImageError(f"images cannot be given as {type(images).__name__}; pass one image or a list")


def prepare_images(
    images: Images, config: PreprocessConfig, mode: str | None = None, reading: ImageReading | None = None
) -> list[PreparedImage]:
    """Read and preprocess; None for ``mode`` is that of ``config``, for ``reading`` the default.

    Raises:
        ImageError: an image that cannot be read or is too large.
        ConfigError: an unknown mode, or a reading that is none.
    """
    reading = UPRIGHT if reading is None else reading
    require(isinstance(reading, ImageReading), f"reading must be an ImageReading, got {shorten(reading)}")
    prepared = []
    for source in as_list(images):
        with DECODING:
            read = open_image(source, reading)
            if isinstance(read, EncodedImage):
                prepared.append(PreparedImage(read.name, NO_PIXELS, read.record, read))
                continue
            pixels = preprocess(read.image, config, mode)
            prepared.append(PreparedImage(digest(pixels), pixels, read.record))
            del read
    return prepared


def open_image(source: GivenImage, reading: ImageReading) -> ReadImage | EncodedImage:
    """Read an image, or one that was encoded before, which is given itself or by the name of its file.

    Raises:
        ImageError: it cannot be read.
    """
    if isinstance(source, EncodedImage):
        return source
    if isinstance(source, str | os.PathLike) and str(source).endswith(SUFFIX) and str(source)[:5].lower() != "data:":
        return EncodedImage.load(source)
    return read_image(source, reading)


class ImageEncoder:
    """Runs the vision tower and caches the rows of the last images; several threads may use it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()

    def rows(
        self, images: Sequence[PreparedImage], cancellation: Cancellation = NEVER
    ) -> tuple[dict[str, Floats], int]:
        """Decoder rows of ``images`` by digest, each float32 [queries + 1, C], and how many had to be encoded.

        Raises:
            StoppedError: cancelled; images that were encoded before are kept.
        """
        result: dict[str, Floats] = {}
        encoded = 0
        for image in images:
            if image.encoded is not None:
                result[image.digest] = image.encoded.rows
                continue
            with self._lock:
                rows = self._rows.get(image.digest)
            if rows is None:
                # One at a time: the tower's memory stays that of one image however many are asked about. Without the
                # lock: another chat that waits for it could not be cancelled.
                rows = self._engine.encode_images(image.pixels[None], cancellation)[0]
                encoded += 1
            result[image.digest] = rows
            with self._lock:
                self._rows[image.digest] = rows
                self._rows.move_to_end(image.digest)
                if len(self._rows) > CACHED_IMAGES:
                    self._rows.popitem(last=False)
        return result, encoded

    def clear(self) -> None:
        """Forget all rows."""
        with self._lock:
            self._rows.clear()
