"""Images: every format, in the sizes and kinds that programs write, given in every way that the API takes."""

import base64
import io
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fuzz import binary, mutate
from fuzz.surface import Input, Surface
from owl2.runtime.config import PreprocessConfig
from owl2.runtime.image_files import FORMATS
from owl2.runtime.images import prepare_images

MODES = ("resize", "pad", "crop")
WAYS = ("path",) * 9 + ("bytes", "file", "uri")
SIDES = (0, 1, 2, 97, 8192, 8193, 16_384, 30_000, 65_535, 2**31 - 1)
KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("BMP", "RGB", {}), ("BMP", "1", {}), ("BMP", "P", {}),
    ("GIF", "P", {}), ("GIF", "P", {"save_all": 3, "loop": 0}), ("GIF", "P", {"transparency": 3}),
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"exif": 6}), ("JPEG", "RGB", {"subsampling": 0, "optimize": True, "comment": b"made"}),
    ("JPEG2000", "RGB", {}), ("JPEG2000", "RGBA", {"irreversible": True}), ("JPEG2000", "I;16", {}),
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "LA", {}), ("PNG", "I;16", {}),
    ("PNG", "1", {}), ("PNG", "RGB", {"save_all": 3}), ("PNG", "RGB", {"exif": 8}),
    ("PPM", "RGB", {}), ("PPM", "L", {}), ("PPM", "1", {}),
    ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}), ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "I;16", {}), ("TIFF", "F", {}), ("TIFF", "CMYK", {}), ("TIFF", "RGB", {"exif": 3}),
    ("TIFF", "RGB", {"compression": "packbits", "save_all": 2}), ("TIFF", "LAB", {}), ("TIFF", "P", {}),
    ("WEBP", "RGB", {}), ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {}), ("WEBP", "RGB", {"save_all": 3}),
    ("WEBP", "RGB", {"exif": 5}),
    ("AVIF", "RGB", {}), ("AVIF", "RGBA", {"exif": 6}),
)  # fmt: skip


def open_surface(_: Path, scratch: Path) -> Surface:
    """All kinds of files of a drawing, small and middle-sized."""
    rng = np.random.default_rng(0)
    drawing = Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)).resize((97, 61))
    seeds = [
        (form, _encoded(form, drawing.resize(size), mode, options))
        for form, mode, options in KINDS
        for size in ((97, 61), (3, 40))
        if form in FORMATS
    ]
    config, path = PreprocessConfig(size=28, crop_size=28), scratch / "image"

    def make(rng: random.Random) -> Input:
        form, content = rng.choice(seeds)
        target = f"{rng.choice(WAYS)}.{rng.choice(MODES)}"
        if rng.random() < 0.02:
            return Input(target, mutate.nothing_but_noise(rng, content))
        return Input(target, _changed(rng, form, content))

    def run(given: Input) -> None:
        way, mode = given.target.split(".")
        path.write_bytes(given.content)
        ways: dict[str, Callable[[], Any]] = {
            "path": lambda: path,
            "bytes": lambda: given.content,
            "file": lambda: io.BytesIO(given.content),
            "uri": lambda: "data:image/png;base64," + base64.b64encode(given.content).decode(),
        }
        prepare_images([ways[way]()], config, mode)

    return Surface(make, run)


def _encoded(form: str, image: Image.Image, mode: str, options: dict[str, Any]) -> bytes:
    options = dict(options)
    if "exif" in options:
        exif = Image.Exif()
        exif[274], exif[0x8769] = options["exif"], {0x9286: b"ASCII\0\0\0hello"}
        options["exif"] = exif.tobytes()
    if count := options.pop("save_all", 0):
        options |= {"save_all": True, "append_images": [image.rotate(90 * turn).convert(mode) for turn in range(count)]}
    if mode in ("I;16", "F"):
        values = np.asarray(image.convert("L"), dtype=np.uint16 if mode == "I;16" else np.float32)
        image = Image.fromarray(values * 200)
    elif mode == "LAB":
        image = Image.merge("LAB", image.split())
    else:
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _changed(rng: random.Random, form: str, content: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.1:
        return _resized(rng, form, content)
    if form == "PNG" and kind < 0.7:
        return binary.change_png(rng, content)
    if form in ("TIFF", "WEBP", "BMP", "GIF", "JPEG2000") and kind < 0.6:
        # Headers are short and data long: aim at the former.
        length = min(len(content), rng.choice((16, 64, 200)))
        if form == "TIFF" and rng.random() < 0.7:
            start = int.from_bytes(content[4:8], "little")
            return content[:start] + mutate.insert(rng, content[start : start + 200]) + content[start + 200 :]
        return mutate.flip(rng, content[:length]) + content[length:]
    return mutate.change_bytes(rng, content)


def _resized(rng: random.Random, form: str, content: bytes) -> bytes:
    """With other sides in its header, where they have a fixed place."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    changed = bytearray(content)
    match form:
        case "BMP":
            changed[18:26] = struct.pack("<ii", width, rng.choice((1, -1)) * height)
        case "GIF":
            changed[6:10] = struct.pack("<HH", width & 65535, height & 65535)
        case "PPM":
            return content.replace(b"97 61", b"%d %d" % (width, height), 1)
        case "JPEG":
            for mark in (b"\xff\xc0", b"\xff\xc2"):
                if (place := content.find(mark)) > 0:
                    changed[place + 5 : place + 9] = struct.pack(">HH", height & 65535, width & 65535)
        case "WEBP":
            place = content.find(b"\x9d\x01\x2a")
            if place > 0:
                changed[place + 3 : place + 7] = struct.pack("<HH", width & 16383, height & 16383)
            elif (place := content.find(b"VP8L")) > 0:
                changed[place + 9 : place + 13] = ((width & 16383) | (height & 16383) << 14).to_bytes(4, "little")
        case _:
            return mutate.change_bytes(rng, content)
    return bytes(changed)
