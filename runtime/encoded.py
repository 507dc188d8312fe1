"""Images that went through the vision tower already: saved, sent to another device, asked about there."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owl2.runtime.engine import Floats
from owl2.runtime.errors import ImageError
from owl2.runtime.foreign import ForeignError, reading
from owl2.runtime.image_files import ImageRecord
from owl2.runtime.stored import Stored, read_stored, write_stored

KIND = "image"
SUFFIX = ".owl2image"
"""Of the names of files that the commands take for encoded images."""
ADVICE = "encode the image again: owl.encode(image).save(path)"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What the decoder sees of an image; can be given wherever an image can.

    Rows are rounded to float16 when they are made, so that an answer is the same before and after saving.

    Attributes:
        rows: float32 [queries + 1, C].
        digest: of the pixels.
        vision: fingerprint of the tower and abstractor that made them.
        record: what was done to the image before.
    """

    rows: Floats
    digest: str
    vision: str
    record: ImageRecord

    @property
    def name(self) -> str:
        """Tells images apart whose rows differ, as rounded ones do from those of an image that is encoded here."""
        return f"encoded {hashlib.sha256(np.ascontiguousarray(self.rows).data).hexdigest()}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file of half a megabyte (7B shapes), as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        description = {"digest": self.digest, "vision": self.vision, "record": asdict(self.record)}
        write_stored(Path(path), KIND, Stored(description, {"rows": self.rows.astype(np.float16)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedImage:
        """Read a file that :meth:`save` wrote.

        Raises:
            ImageError: it is damaged, or something else.
        """
        with reading(path, ImageError, ADVICE):
            stored = read_stored(Path(path), KIND)
            match stored.description, dict(stored.arrays):
                case {"digest": str(digest), "vision": str(vision), "record": record}, {"rows": rows} if rows.ndim == 2:
                    return cls(rows.astype(np.float32), digest, vision, record_of(record))
            raise ForeignError("it has no rows of an image")


def record_of(data: Any) -> ImageRecord:  # noqa: ANN401 - JSON
    """The inverse of ``asdict``, for JSON.

    Raises:
        ForeignError: it is not one.
    """
    match data:
        case {
            "stored": [int(), int()] as stored,
            "shown": [int(), int()] as shown,
            "orientation": int(orientation),
            "transparent": bool(transparent),
            "background": None | str() as background,
        }:
            return ImageRecord(tuple(stored), tuple(shown), orientation, transparent, background)
    raise ForeignError("it does not say what was done to the image")
