"""Changes of foreign data: of bytes, of text, of JSON; every function takes its random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Bytes = Callable[[random.Random, bytes], bytes]

INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
)
WIDTHS = (1, 2, 4, 8)
TOKENS = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\n",
    b"\r\n",
    b"\x1b[31m",
    b"%s%n",
    b"../",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
)
STRINGS = (
    "", " ", "\0", "a\nb", "\x1b[2J\x1b[31mred", "\u202egnp.exe", "\u2028", "../../etc/passwd", "/etc/passwd", ".",
    "..", "CON", "a/b", "a\\b", "%s%n", "{}", "null", "NaN", "-0", "1e999", "é" * 40, "🦉", "e\u0301",
    "\ud800", "x" * 300,
    "y" * 70_000, "<|image|>", "<image>", "</s>", "int4", "fp16", "fp32", "int8", "0" * 64, "file:///etc/passwd",
)  # fmt: skip
NUMBERS = (
    0, -0.0, 1, -1, 2, 0.5, 1e-300, 1e300, -1e300, 10**18, 2**31, 2**63, -(2**63), 2**64, 10**40, 10**400, 1.0000001,
    10**5, 10**6, 10**7, 3, 7, 13, 64, 127, 1024, 0.1,
)  # fmt: skip


def flip(rng: random.Random, data: bytes) -> bytes:
    """Some bits, bytes or runs of bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if changed:
            place = rng.randrange(len(changed))
            changed[place] = changed[place] ^ (1 << rng.randrange(8)) if rng.random() < 0.5 else rng.randrange(256)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Its beginning, or nothing."""
    return data[: rng.choice((0, 1, len(data) // 2, max(len(data) - 1, 0), rng.randrange(len(data) + 1)))]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Something interesting in its middle, or in place of what was there."""
    place, width = rng.randrange(len(data) + 1), rng.choice(WIDTHS)
    number = rng.choice(INTEGERS) % 256**width
    new = rng.choice((rng.choice(TOKENS), number.to_bytes(width, rng.choice(("little", "big"))), rng.randbytes(width)))
    return data[:place] + new + data[place + (len(new) if rng.random() < 0.6 else 0) :]


def remove(rng: random.Random, data: bytes) -> bytes:
    """Without a part of it."""
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[place + rng.choice((1, 2, 4, 16, 256)) :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """With a part of it twice, or a few hundred times."""
    place, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 16, 256))
    part = data[place : place + length]
    return data[:place] + part * rng.choice((2, 2, 3, 300)) + data[place + length :]


def nothing_but_noise(rng: random.Random, data: bytes) -> bytes:
    """Random bytes, after the first of the data perhaps."""
    return data[: rng.choice((0, 4, 8, 64))] + rng.randbytes(rng.choice((0, 1, 16, 1000)))


BYTE_CHANGES: tuple[Bytes, ...] = (flip, flip, flip, truncate, insert, insert, remove, repeat, nothing_but_noise)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Changed without knowledge of the format."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(BYTE_CHANGES)(rng, data)
    return data


def text(rng: random.Random) -> str:
    """A text from strangers."""
    kind = rng.randrange(5)
    if kind < 2:
        return rng.choice(STRINGS)
    pool = ("ab c", "éß中文🦉", "\u0000\u001b\u007f\u0085", "\u0300\u200d\ufe0f\u202e\u2028", "\ud800\udfff", "▁ \t\n")
    characters = rng.choice((pool[0], "".join(pool[:2]), "".join(pool), "".join(chr(c) for c in range(32, 0x2000, 7))))
    return "".join(rng.choice(characters) for _ in range(rng.choice((1, 3, 20, 200))))


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value from strangers; numbers that are not finite are written as Python does."""
    match rng.randrange(12 if depth < 3 else 8):
        case 0 | 1 | 2:
            return text(rng)
        case 3 | 4 | 5:
            return rng.choice(NUMBERS)
        case 6:
            return rng.choice((True, False, None, float("nan"), float("inf"), -float("inf")))
        case 7:
            return rng.choice(([], {}, [[]], [None], {"": {}}))
        case 8 | 9:
            return [value(rng, depth + 1) for _ in range(rng.choice((1, 2, 3, 30)))]
        case _:
            return {text(rng): value(rng, depth + 1) for _ in range(rng.choice((1, 2, 20)))}


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value within a JSON value, but its own."""
    keys: Sequence[Any] = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [found for key in keys for found in ((*path, key), *places(data[key], (*path, key)))]


def change_value(rng: random.Random, data: Any) -> Any:
    """One value replaced, removed, renamed, repeated, exchanged or slightly changed; ``data`` itself may be."""
    found = places(data)
    if not found or rng.random() < 0.02:
        return value(rng)
    *way, key = rng.choice(found)
    parent = data
    for step in way:
        parent = parent[step]
    old = parent[key]
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            parent[key] = value(rng)
        case 4 | 5:
            parent[key] = nudged(rng, old)
        case 6:
            del parent[key]
        case 7 if isinstance(parent, dict):
            parent[text(rng)] = parent.pop(key) if rng.random() < 0.5 else value(rng)
        case 7:
            parent += [old] * rng.choice((1, 2, 1000))
        case 8:
            parent[key] = [old] if rng.random() < 0.5 else {"value": old}
        case _:
            *other_way, other = rng.choice(found)
            source = data
            for step in (*other_way, other):
                try:
                    source = source[step]
                except (LookupError, TypeError):
                    break
            parent[key] = json.loads(json.dumps(source))
    return data


def nudged(rng: random.Random, old: Any) -> Any:
    """A value of the same type that is nearly the same."""
    match old:
        case bool():
            return not old
        case int():
            shown: tuple[Any, ...] = (float(old), str(old)) if abs(old) < 1 << 1000 else ()
            return rng.choice((old + 1, old - 1, -old, old * 2, old // 2, old * 10**6, *shown))
        case float():
            return rng.choice((-old, old * 2, old / 3, old * 1e30, int(old) if abs(old) < 1e300 else 0, str(old)))
        case str():
            return rng.choice((old.upper(), old + " ", old[1:], old * 2, old + "\n", old.swapcase(), [old], old[::-1]))
        case list():
            return rng.choice((old[1:], old * 2, old[::-1], [*old, None]))
        case dict():
            return dict(list(old.items())[1:])
        case _:
            return 0


def written(rng: random.Random, data: Any) -> bytes:
    """A JSON value as text, in one of the ways in which people and programs write it."""
    indent, ascii_only = rng.choice((None, 2)), rng.random() < 0.7
    return json.dumps(data, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def break_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON text that is hostile as a text: deep, long, in another encoding, with keys twice or huge numbers."""
    match rng.randrange(9):
        case 0:
            return b"[" * rng.choice((10, 999, 5_000, 100_000))
        case 1:
            depth = rng.choice((100, 5_000, 60_000))
            return b'{"a":' * depth + b"1" + b"}" * depth
        case 2:
            return rng.choice(
                (
                    b"\xef\xbb\xbf" + data,
                    *(data.decode("utf-8", "replace").encode(e) for e in ("utf-16", "utf-32", "utf-7")),
                )
            )
        case 3:
            inside = data.strip()
            return b"{" + inside[1:-1] + b"," + inside[1:-1] + b"}"
        case 4:
            digits = rng.choice((100, 5_000, 400_000))
            return data.replace(b": 1", b": " + b"9" * digits, 1)
        case 5:
            return data + rng.choice((b" ", b"\0", b"{}", b"//", data))
        case 6:
            return rng.choice((b"", b"null", b"0", b'"x"', b"[]", b"{}", b"NaN", b"true"))
        case 7:
            return data.replace(b'"', rng.choice((b"'", b"", b"\\u0022")), rng.choice((1, 3)))
        case _:
            return data.replace(b",", b"," + b" " * rng.choice((1, 10**5)), 1)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file changed by its values, as a text, or as bytes."""
    kind = rng.random()
    if kind < 0.7:
        content = json.loads(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            content = change_value(rng, content)
        return written(rng, content)
    return break_json(rng, data) if kind < 0.85 else change_bytes(rng, data)
