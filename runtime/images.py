"""Images on their way into the decoder: preprocessing, identity, encoding, and a small memory of results."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from owl2.runtime.config import PreprocessConfig, PreprocessMode
from owl2.runtime.engine import Engine, Floats
from owl2.runtime.preprocess import ImageInput, digest, load_image, preprocess

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Images = ImageInput | Sequence[ImageInput]
"""One image or several: paths, PIL images or uint8 arrays [H, W, 3]."""

# Images whose decoder rows are kept after the vision tower ran; one takes about 1 MB in the 7B model.
KEPT_IMAGES = 16


@dataclass(frozen=True)
class PreparedImage:
    """A preprocessed image.

    Attributes:
        digest: of the pixels; equal pixels are the same image wherever they came from.
        pixels: float32 [3, R, R].
    """

    digest: str
    pixels: Floats


def prepare_images(images: Images, config: PreprocessConfig, mode: PreprocessMode | None) -> list[PreparedImage]:
    """Load and preprocess.

    Raises:
        ImageError: an image that cannot be read or is too large.
        ConfigError: an unknown mode.
    """
    sources = [images] if _is_single(images) else images
    pixels = [preprocess(load_image(source), config, mode) for source in sources]
    return [PreparedImage(digest(array), array) for array in pixels]


def _is_single(images: Images) -> TypeIs[ImageInput]:
    return isinstance(images, str | os.PathLike | Image.Image | np.ndarray)


class ImageEncoder:
    """Runs the vision tower, and remembers the rows of the last images."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: OrderedDict[str, Floats] = OrderedDict()

    def rows(self, images: Sequence[PreparedImage]) -> tuple[dict[str, Floats], int]:
        """Decoder rows of ``images`` by digest, each float32 [queries + 1, C], and how many had to be encoded."""
        result = {}
        encoded = 0
        for image in images:
            if image.digest not in self._rows:
                # One at a time: the tower's memory stays that of one image however many are asked about.
                self._rows[image.digest] = self._engine.encode_images(image.pixels[None])[0]
                encoded += 1
            self._rows.move_to_end(image.digest)
            result[image.digest] = self._rows[image.digest]
            if len(self._rows) > KEPT_IMAGES:
                self._rows.popitem(last=False)
        return result, encoded
