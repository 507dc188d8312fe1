"""Image files as somebody makes them who means harm, and ordinary ones in memory."""

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(image: Image.Image, name: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def jpeg_of_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan occurs ``count`` times more."""
    content = encoded(Image.new("RGB", (side, side), (9, 9, 9)), "JPEG", progressive=True, quality=30)
    scan, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[scan:end] * count + content[end:]


def png(width: int, height: int, rows: bytes | None = None) -> bytes:
    """A PNG file that claims a size; without ``rows`` it stops where the pixels should begin."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + (chunk(b"IDAT", b"") if rows is None else chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff_of_one_tile(side: int, tile: int) -> bytes:
    """A small grey TIFF whose only tile is far larger."""
    data = zlib.compress(b"\0" * 1000)
    fields = ((256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile))
    start = 10 + 12 * (len(fields) + 2) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in (*fields, (324, start), (325, len(data)))]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0) + data
