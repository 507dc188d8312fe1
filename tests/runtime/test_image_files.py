"""Images from wherever people have them, read upright and on white, and what is refused before it costs anything."""

import base64
import io
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunCommand
from hostile_images import encoded, jpeg_of_scans, png, tiff_of_one_tile
from PIL import Image, ImageOps

from owl2 import ImageReading, ImageRecord
from owl2.runtime import image_cost
from owl2.runtime.config import PreprocessConfig
from owl2.runtime.errors import ConfigError, ImageError
from owl2.runtime.image_cost import decoding_bytes
from owl2.runtime.memory import HostMemory
from owl2.runtime.preprocess import AS_ORIGINAL, check_image, load_image, read_image

IMAGES = Path(__file__).parent / "images"
CONFIG = PreprocessConfig("resize", 56, 56)
WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize("name", ["upright.png", "turned.jpg", "transparent.png", "scene.avif", "scene.heic"])
def test_the_sample_model_describes_an_image_in_every_form(run: RunCommand, sample_bundle: Path, name: str) -> None:
    result = run("ask", sample_bundle, "Describe the picture.", "--image", IMAGES / name)
    assert result.stdout == (
        "a big blue triangle at the top left, a big red cross at the bottom left and a small purple star at the bottom "
        "right\n"
    )
    told = {"turned.jpg": "turned as its EXIF orientation 6 says", "transparent.png": "its transparency laid on white"}
    assert result.stderr == (f"owl2: {IMAGES / name}: {told[name]}\n" if name in told else "")


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_every_value_is_applied_as_pillow_does(self, orientation: int, file_format: str) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(image, file_format, exif=exif)
        read = read_image(content)
        with Image.open(io.BytesIO(content)) as stored:
            assert read.image.tobytes() == ImageOps.exif_transpose(stored).convert("RGB").tobytes()
        if file_format != "TIFF":  # Pillow turns these itself
            assert read.record == ImageRecord((30, 20), read.image.size, orientation)
            assert load_image(content, AS_ORIGINAL).size == (30, 20)
        assert load_image(read.image) == read.image  # not twice

    @pytest.mark.parametrize(
        "exif",
        [
            b"Exif\0\0MM\0*\0\0\0\x08",
            b"Exif\0\0broken",
            b"",
            b"Exif\0\0II*\0" + b"\xff" * 40,
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\0\0\0\0",  # a text
        ],
    )
    def test_broken_exif_says_nothing(self, exif: bytes) -> None:
        assert read_image(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).record.orientation == 1

    def test_a_pillow_image_is_turned_too(self) -> None:
        with Image.open(IMAGES / "turned.jpg") as image:
            assert load_image(image) == load_image(IMAGES / "turned.jpg")


class TestTransparency:
    @pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "PA", "P", "L", "RGB"])
    def test_every_kind_is_laid_on_the_background(self, mode: str) -> None:
        image = Image.new(mode, (4, 2))  # black
        if mode in ("P", "L", "RGB"):
            image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
        record = ImageRecord((4, 2), (4, 2), transparent=True, background="#ff0000")
        read = read_image(image, ImageReading(background="#ff0000"))
        assert (read.image.getpixel((0, 0)), read.record) == (RED, record)
        assert load_image(image).getpixel((3, 1)) == WHITE
        dropped = read_image(image, ImageReading(background=None))
        assert (dropped.image.getpixel((0, 0)), dropped.record.transparent, dropped.record.background) == (
            (0, 0, 0),
            True,
            None,
        )

    def test_half_transparent_pixels_are_mixed_and_opaque_ones_stay(self) -> None:
        image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
        assert read_image(image).record == ImageRecord((2, 1), (2, 1))  # an alpha channel alone changes nothing
        image.putpixel((1, 0), (0, 0, 0, 128))
        mixed = load_image(image)
        assert mixed.getpixel((0, 0)) == (10, 20, 30)
        assert mixed.getpixel((1, 0)) == (127, 127, 127)

    @pytest.mark.parametrize("background", ["no colour", 7, "x" * 5000, "#12", ""])
    def test_what_is_no_colour(self, background: Any) -> None:
        with pytest.raises(ConfigError, match=r"background .{,90} is no colour; write white, #rrggbb"):
            ImageReading(background=background)

    def test_what_is_no_orientation(self) -> None:
        with pytest.raises(ConfigError, match="orientation 'up' is not known; use exif or stored"):
            ImageReading("up")  # type: ignore[arg-type]


class Stream(io.RawIOBase):
    """A file that can only be read on, as of a connection."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(buffer)


class TestSources:
    def test_all_give_the_same_image(self) -> None:
        path = IMAGES / "upright.png"
        content, expected = path.read_bytes(), load_image(path)
        text = base64.b64encode(content).decode()
        escaped = "".join(f"%{byte:02x}" for byte in content)
        uris = (
            f"data:image/png;base64,{text}",
            f"DATA:text/plain;charset=utf-8;base64,{text.rstrip('=')}",
            f"data:;base64,{text.replace('+', '-').replace('/', '_')}",
            f"data:;base64,{text[:40]}\n {text[40:]}",
            f"data:,{escaped}",
        )
        for source in (content, bytearray(content), memoryview(content), io.BytesIO(content), Stream(content), *uris):
            assert load_image(source) == expected

    def test_an_open_file_is_read_from_its_position_and_stays_open(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"head" + (IMAGES / "upright.png").read_bytes())
        with (tmp_path / "a").open("rb") as file:
            file.seek(4)
            assert load_image(file) == load_image(IMAGES / "upright.png")
            assert not file.closed

    @pytest.mark.parametrize(
        "url", ["http://a.org/b.png", "https:/a.org/b.png", "ftp://a/b", "FILE:///tmp/a.png", "s3://bucket/a.png"]
    )
    @pytest.mark.parametrize("kind", [str, Path])
    def test_urls_are_refused(self, url: str, kind: Callable[[str], Any]) -> None:
        if kind is Path and url.startswith("s3"):
            return  # with one slash less it is a path like another
        with pytest.raises(ImageError, match=r"owl2 opens no URLs; download .* first and give the file"):
            load_image(kind(url))

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            (b"\0" * 50_000_000, "the image in bytes: its format cannot be identified"),
            ("data:image/png;base64," + "A" * 4_000_000, "the data: URI: its format cannot be identified"),
            ("data:image/png;base64,%%%", "cannot read the data: URI"),
            ("data:image/png;base64", "it has no comma"),
            ("A" * 1_000_000, "File name too long"),
            ("a\0b.png", "embedded null"),
            ("\x1b[31m.png", r"cannot read \\x1b\[31m.png"),
            (io.StringIO("text"), "the open file: it gives str, not bytes"),
        ],
    )
    def test_what_cannot_be_read_is_not_repeated_in_full(self, source: Any, reason: str) -> None:
        with pytest.raises(ImageError, match=reason) as caught:
            load_image(source)
        assert len(str(caught.value)) < 700

    def test_a_pipe_is_refused_without_waiting(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ImageError, match=r"pipe\.png: it is not a regular file"):
            load_image(tmp_path / "pipe.png")

    def test_heic_names_the_extra_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ImageError, match=r"scene\.heic is a HEIC image, .*pip install 'owl2\[heic\]'"):
            load_image(IMAGES / "scene.heic")


HOSTILE = {
    "webp": encoded(Image.new("RGB", (8192, 8192)), "WEBP", lossless=True, quality=0, method=0),
    "png": png(8190, 8190, b"\0" * 30_000),
    "png_rows": png(1, 67_108_864, b"\0" * 8000),
    "png_row": png(67_108_864, 1, b"\0" * 8000),
    "jpeg_scans": jpeg_of_scans(2048, 19_000),
    "tiff_tile": tiff_of_one_tile(16, 26_000),
}
MEASURE = """
import resource, sys
from owl2.runtime.errors import ImageError
from owl2.runtime.preprocess import load_image
def used(): return resource.getrusage(resource.RUSAGE_SELF)
load_image(sys.argv[1]); before = used()
try: load_image(sys.argv[2])
except ImageError as error: print(error, file=sys.stderr)
print(used().ru_maxrss - before.ru_maxrss, used().ru_utime - before.ru_utime)
"""


class TestBounds:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_small_files_cannot_take_much(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(HOSTILE[name])
        command = [sys.executable, "-c", MEASURE, str(IMAGES / "upright.png"), str(tmp_path / name)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        kilobytes, seconds = map(float, result.stdout.split())
        assert result.stderr.count(" claims ") + result.stderr.count(" scans over ") == 1
        assert kilobytes < 30_000
        assert seconds < 1

    def test_ordinary_files_are_far_from_the_bounds(self) -> None:
        flat = Image.new("RGB", (4000, 3000), WHITE)
        for name, options in (("PNG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"lossless": True, "method": 0})):
            assert load_image(encoded(flat, name, **options)).size == (4000, 3000)
        page = Image.new("1", (4960, 7016), 1)  # A4 at 600 dpi
        assert load_image(encoded(page, "TIFF", compression="group4")).size == page.size
        assert load_image(jpeg_of_scans(64, 500)).size == (64, 64)

    def test_a_scan_in_a_comment_does_not_count_and_an_end_there_hides_none(self) -> None:
        content = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
        scan = content.rindex(b"\xff\xda")
        comment = b"\xff\xfe\x00\x06\xff\xd9\xff\xda"
        for file in (content, content[:scan] + comment + content[scan:]):
            assert image_cost._scans(io.BytesIO(file)) == 10
        plain = encoded(Image.new("RGB", (64, 64)), "JPEG") + b"\xff\xda" * 100  # a film after a photo, for one
        assert image_cost._scans(io.BytesIO(plain)) == 1

    def test_an_image_must_fit_the_free_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        content = encoded(Image.new("RGB", (2000, 1500), RED))
        with Image.open(io.BytesIO(content)) as image:
            cost = decoding_bytes(image)
        for free in (cost - 1, cost):
            memory = HostMemory(2 * cost, free, limited=False)
            monkeypatch.setattr(image_cost, "host_memory", lambda memory=memory: memory)
            if free < cost:
                with pytest.raises(ImageError, match=r"which take 22 MiB to decode, 22 MiB are free"):
                    load_image(content)
            else:
                assert load_image(content).size == (2000, 1500)

    @pytest.mark.parametrize(
        ("mode", "name", "options"),
        [
            ("RGB", "PNG", {"compress_level": 1}),
            ("RGBA", "PNG", {"compress_level": 1}),
            ("P", "PNG", {"transparency": 0}),
            ("L", "JPEG", {}),
            ("CMYK", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
            ("RGB", "WEBP", {"lossless": True, "method": 0, "quality": 0}),
            ("RGBA", "WEBP", {"method": 0}),
            ("RGB", "JPEG2000", {}),
            ("RGB", "AVIF", {"speed": 10}),
            ("RGB", "TIFF", {"compression": "tiff_lzw"}),
            ("RGB", "BMP", {}),
        ],
    )
    def test_decoding_takes_no_more_than_was_told(
        self, tmp_path: Path, mode: str, name: str, options: dict[str, Any]
    ) -> None:
        side = 2000
        noise = np.random.default_rng(0).integers(0, 256, (side // 20, side // 20, 3), dtype=np.uint8)
        image = Image.fromarray(noise).convert(mode).resize((side, side))
        if mode == "RGBA":
            image.putalpha(100)
        (tmp_path / "a").write_bytes(encoded(image, name, **options))
        with Image.open(tmp_path / "a") as opened:
            told = decoding_bytes(opened, 10 if "progressive" in options else 1)
        command = [sys.executable, "-c", MEASURE, str(IMAGES / "upright.png"), str(tmp_path / "a")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stderr == ""
        slack = 6 * resource.getpagesize() * 1024  # the decoder's own code and tables
        assert float(result.stdout.split()[0]) * 1024 < told + (tmp_path / "a").stat().st_size + slack

    def test_the_limit_of_pillow_is_as_before(self) -> None:
        theirs = Image.MAX_IMAGE_PIXELS
        load_image(IMAGES / "upright.png")
        with pytest.raises(ImageError):
            load_image(b"no image")
        assert theirs == Image.MAX_IMAGE_PIXELS


class TestCheckImage:
    def test_the_header_tells(self, tmp_path: Path) -> None:
        check_image(IMAGES / "turned.jpg", CONFIG)
        half = (IMAGES / "turned.jpg").read_bytes()[:6000]
        check_image(half, CONFIG)  # nothing is decoded
        with pytest.raises(ImageError, match="cannot read"):
            load_image(half)
        for source, reason in (
            (tmp_path / "missing.png", "it is missing"),
            (HOSTILE["png_rows"], "claims 1 x 67108864"),
            (np.zeros((4, 4)), "must be uint8"),
            (np.zeros((200_000, 1, 3), np.uint8), "would become 200000 x 200000 on the way in mode resize"),
            (Image.new("I;16", (4, 4)), "more than 8 bits"),
        ):
            with pytest.raises(ImageError, match=reason):
                check_image(source, CONFIG)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="preprocess 'x' is not known"):
            check_image(IMAGES / "upright.png", CONFIG, "x")


def test_fill_bytes_take_no_time() -> None:
    """Any number of 0xFF may stand before a marker of a JPEG."""
    progressive = b"\xff\xd8\xff\xc2\x00\x11\x08\x00\x10\x00\x10\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    began = time.process_time()
    with pytest.raises(ImageError):
        read_image(progressive + b"\xff" * 2_000_000 + b"\x00" * 100)
    assert time.process_time() - began < 10  # it took hours


def test_a_pipe_gives_an_image_in_parts(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(content, "PNG")
    read, write = os.pipe()

    def give() -> None:
        with os.fdopen(write, "wb") as file:
            file.write(content.getvalue())

    writing = threading.Thread(target=give)
    writing.start()
    with os.fdopen(read, "rb", buffering=0) as pipe:
        assert read_image(pipe).image.size == (300, 300)
    writing.join()


def test_threads_leave_the_warning_filters_alone(tmp_path: Path) -> None:
    before = list(warnings.filters)
    content = io.BytesIO()
    Image.new("P", (20, 20)).save(content, "TIFF")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_image(content.getvalue()), range(200)))
    assert list(warnings.filters) == before


def test_a_turned_tiff_is_told() -> None:
    content = io.BytesIO()
    Image.new("RGB", (30, 20)).save(content, "TIFF", tiffinfo={274: 6})
    read = read_image(content.getvalue())
    assert (read.record.stored, read.record.orientation, read.image.size) == ((30, 20), 6, (20, 30))


def test_an_opened_image_is_checked_as_its_file_is() -> None:
    with Image.open(io.BytesIO(jpeg_of_scans(2048, 19_000))) as image, pytest.raises(ImageError, match="scans over"):
        read_image(image)
