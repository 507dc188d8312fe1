"""Changes of binary formats that keep enough of their structure to get past the first check."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from typing import Any

from fuzz.mutate import INTEGERS, STRINGS, change_bytes, change_value, flip

Field = tuple[int, int, Any]
"""Number, wire type and value of a field: an integer, or bytes."""


def change_protobuf(rng: random.Random, data: bytes) -> bytes:
    """A message with a field somewhere in it changed, removed, repeated or moved."""
    kind = rng.random()
    if kind < 0.15:
        return change_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _changed_message(rng, data, 0)
    return data


def _changed_message(rng: random.Random, data: bytes, depth: int) -> bytes:
    fields = _fields(data)
    if not fields:
        return change_bytes(rng, data)
    place = rng.randrange(len(fields))
    number, wire, content = fields[place]
    inner = wire == 2 and depth < 8 and _fields(content)
    if inner and rng.random() < 0.85:
        fields[place] = number, wire, _changed_message(rng, content, depth + 1)
        return _message(fields)
    match rng.randrange(8):
        case 0:
            del fields[place]
        case 1:
            fields[place : place + 1] = [fields[place]] * rng.choice((2, 3, 100))
        case 2:
            other = rng.randrange(len(fields))
            fields[place], fields[other] = fields[other], fields[place]
        case 3:
            fields[place] = rng.choice((1, 2, 3, 5, 7, 13, 20, 536_870_911)), wire, content
        case _:
            fields[place] = number, wire, _changed_content(rng, wire, content)
    return _message(fields)


def _changed_content(rng: random.Random, wire: int, content: Any) -> Any:
    if wire != 2:
        return rng.choice((*INTEGERS, 2**64 - 1, content + 1, content - 1 if content else 0)) % 2 ** (
            32 if wire == 5 else 64
        )
    if rng.random() < 0.3:
        return rng.choice(STRINGS).encode("utf-8", "surrogatepass")
    return change_bytes(rng, content)


def _fields(data: bytes) -> list[Field]:
    """The fields of a message; empty if it is none."""
    fields: list[Field] = []
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if not number:
            return []
        content: Any
        if wire == 0:
            content, place = _varint(data, place)
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            content, place = int.from_bytes(data[place : place + width], "little"), place + width
        elif wire == 2:
            length, place = _varint(data, place)
            content, place = data[place : place + length], place + length
        else:
            return []
        if place > len(data):
            return []
        fields.append((number, wire, content))
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while place < len(data) and shift < 70:
        number |= (data[place] & 127) << shift
        place += 1
        if data[place - 1] < 128:
            return number, place
        shift += 7
    return 0, len(data) + 1


def _message(fields: list[Field]) -> bytes:
    parts = []
    for number, wire, content in fields:
        parts.append(_as_varint(number << 3 | wire))
        if wire == 0:
            parts.append(_as_varint(content))
        elif wire == 2:
            parts += [_as_varint(len(content)), content]
        else:
            parts.append(content.to_bytes(8 if wire == 1 else 4, "little"))
    return b"".join(parts)


def _as_varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes((*parts, number))


def change_zip(rng: random.Random, data: bytes) -> bytes:
    """An archive with a member changed, renamed, removed, repeated, or lied about."""
    if rng.random() < 0.2:
        return change_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = rng.randrange(len(members))
    name, content = members[place]
    match rng.randrange(8):
        case 0:
            del members[place]
        case 1:
            members += [min(members, key=lambda member: len(member[1]))] * rng.choice((1, 2, 600))
        case 2:
            members[place] = (
                rng.choice((rng.choice(STRINGS[:20]), name + ".npy", "0." + name, name.upper())) or "x",
                content,
            )
        case 3:
            members[place] = name, members[rng.randrange(len(members))][1]
        case 4:
            members[place] = name, content + bytes(rng.choice((1, 1000, 100_000)))
        case _:
            members[place] = name, change_member(rng, content)
    stored = rng.choices(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA), (20, 4, 1, 1)
    )[0]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", stored) as archive:
        for name, content in members:
            # Two of the same name are wanted, which zipfile warns about.
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode())
            info.compress_type = stored
            archive.NameToInfo.pop(info.filename, None)
            archive.writestr(info, content)
    return _lied(rng, out.getvalue()) if rng.random() < 0.3 else out.getvalue()


def _lied(rng: random.Random, data: bytes) -> bytes:
    """With flags, method, sizes or offset of an entry of the archive's directory changed: encrypted, for instance."""
    entries = [place for place in range(len(data) - 46) if data[place : place + 4] == b"PK\1\2"]
    if not entries:
        return data
    place, changed = rng.choice(entries), bytearray(data)
    offset, width = rng.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)))
    number = rng.choice((1, 8, 12, 14, 93, 99, 2**16 - 1, 2**31, 2**32 - 1)) % 256**width
    changed[place + offset : place + offset + width] = number.to_bytes(width, "little")
    return bytes(changed)


def change_member(rng: random.Random, content: bytes) -> bytes:
    """A member of an archive: the header of an array changed, or any bytes."""
    if content[:6] == b"\x93NUMPY" and rng.random() < 0.7:
        end = 10 + int.from_bytes(content[8:10], "little")
        header, rest = content[10:end], content[end:]
        shapes = (
            b"()",
            b"(0,)",
            b"(1,)",
            b"(-1,)",
            b"(%d,)" % 2**40,
            b"(2, 2)",
            b"(1e9,)",
            b"(" * 500,
            b"[3]",
            b"(True,)",
        )
        types = (b"|O", b"<f8", b"<f4", b">f4", b"|u1", b"<i8", b"<U9", b"<m8[s]", b"|V0", b"<f2", b"{'a': 1}")
        new = rng.choice(
            (
                lambda: _replaced_between(header, b"'shape': ", b", }", rng.choice(shapes)),
                lambda: _replaced_between(header, b"'descr': '", b"'", rng.choice(types)),
                lambda: header.replace(b"False", rng.choice((b"True", b"None", b"0"))),
                lambda: flip(rng, header),
                lambda: b"{" * rng.choice((10, 3000, 60_000)),
                lambda: header.replace(b"}", b"'x': %s}" % (b"9" * rng.choice((10, 5000)))),
            )
        )()[:65_000]
        return (
            content[:6]
            + rng.choice((b"\1\0",) * 6 + (b"\2\0", b"\3\0", b"\x09\0"))
            + struct.pack("<H", len(new))
            + new
            + rest
        )
    return change_bytes(rng, content)


def _replaced_between(text: bytes, before: bytes, after: bytes, new: bytes) -> bytes:
    head, found, tail = text.partition(before)
    if not found:
        return text
    return head + before + new + after + tail.partition(after)[2]


def change_safetensors(rng: random.Random, data: bytes) -> bytes:
    """With its header changed as JSON, the length of the header, or any bytes."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(5):
        case 0:
            return change_bytes(rng, data)
        case 1:
            return rng.choice(INTEGERS).to_bytes(8, "little") + data[8:]
        case 2:
            rest = rest[: rng.randrange(len(rest) + 1)]
        case _:
            header = json.dumps(change_value(rng, json.loads(header))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + rest


def change_png(rng: random.Random, data: bytes) -> bytes:
    """With a chunk changed and its checksum right again."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return change_bytes(rng, data)
    place = rng.randrange(len(chunks))
    kind, content = chunks[place]
    match rng.randrange(6):
        case 0:
            del chunks[place]
        case 1:
            chunks.insert(rng.randrange(len(chunks)), chunks[place])
        case 2:
            chunks[place] = (
                rng.choice((b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT")),
                content,
            )
        case 3 if kind == b"IHDR":
            width, height = (rng.choice((0, 1, 97, 8192, 8193, 30_000, 65_536, 2**31 - 1)) for _ in range(2))
            chunks[place] = kind, struct.pack(">II", width, height) + content[8:]
        case 3:
            chunks.insert(1, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(rng.choice((10, 10**7))))))
        case _:
            chunks[place] = kind, change_bytes(rng, content)
    body = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:8] + b"".join(body)
