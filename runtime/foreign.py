"""Files and values from outside: read within bounds, refused in a sentence, quoted without harm.

Text and JSON that this project did not write itself are read here, other foreign files within :func:`reading`, so that
nothing they raise reaches a user as a traceback, and no message repeats at full length what somebody else wrote.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from owl2.runtime.errors import Owl2Error
from owl2.runtime.harmless import harmless

JSON_BYTES = 16 << 20
"""Largest JSON file that is read, unless a caller needs a larger one; the manifest of a 7B bundle has 4 kB."""
DIGITS = 64
"""Longest integer in JSON."""
QUOTED = 80
"""Characters of a foreign value that a message repeats."""
LISTED = 10
"""Entries of a list that a message repeats."""

# By its start. UTF-32 first: its little-endian mark begins like that of UTF-16.
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


REASONS: dict[type[Exception], str] = {
    FileNotFoundError: "it is missing",
    IsADirectoryError: "it is a folder",
    RecursionError: "it is nested too deeply",
    MemoryError: "it does not fit the memory",
}


class ForeignError(ValueError):
    """A foreign file or text that cannot be used; the message is the reason alone, without the file's name."""


@contextmanager
def reading(path: object, error: Callable[[str], Owl2Error], advice: str) -> Iterator[None]:
    """Turn whatever reading a foreign file raises into an error of this project.

    Args:
        path: of the file, or another name for people.
        error: class of the error to raise.
        advice: what to do, which ends the message.

    Raises:
        Owl2Error: of the class ``error``; errors of this project pass through unchanged.
    """
    try:
        yield
    except Owl2Error:
        raise
    except Exception as problem:  # parsers raise nearly anything on hostile input
        raise error(f"cannot read {harmless(str(path))}: {reason(problem)}; {advice}") from problem


def reason(problem: Exception) -> str:
    """What went wrong, in a few words on one line."""
    match problem:
        case ForeignError():
            return str(problem)
        case FileNotFoundError() | IsADirectoryError() | RecursionError() | MemoryError():
            return next(text for kind, text in REASONS.items() if isinstance(problem, kind))
        case OSError() if problem.strerror:
            return problem.strerror
        case KeyError():
            return f"{shorten(problem.args[0] if problem.args else '')} is missing"
    text = harmless(" ".join(str(problem).split()))
    return cut(text) if text else type(problem).__name__


def open_file(path: Path, limit: int) -> BinaryIO:
    """Open a regular file; a pipe or a device, which may never end, is refused without waiting for it.

    Raises:
        ForeignError: it is no regular file, or has more than ``limit`` bytes.
        OSError: it cannot be opened.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller closes it
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ForeignError("it is not a regular file")
        if status.st_size > limit:
            raise ForeignError(f"it has {status.st_size} bytes, at most {limit} are read")
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: Path, limit: int) -> bytes:
    """Content of a file of at most ``limit`` bytes; raises as :func:`open_file`."""
    with open_file(path, limit) as file:
        content = file.read(limit + 1)  # it may have grown
    if len(content) > limit:
        raise ForeignError(f"it has more than {limit} bytes")
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: Path, limit: int) -> str:
    """Text of a file as :func:`decode_text`; raises as :func:`read_bytes` too."""
    return decode_text(read_bytes(path, limit))


def decode_text(content: bytes, first_line: int = 1) -> str:
    """Text in UTF-8, a byte order mark at its start removed, with ``\\n`` at the end of lines.

    Args:
        content: the bytes.
        first_line: number of its first line, for messages.

    Raises:
        ForeignError: it is in another encoding, which is named where it can be told, or has a byte 0.
    """
    for mark, name in ENCODINGS:
        if content.startswith(mark):
            raise ForeignError(f"it is {name} text; save it as UTF-8")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + first_line
        raise ForeignError(
            f"it has a byte 0 in line {line}, as UTF-16 text and binary files have; save it as UTF-8 text"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + first_line
        raise ForeignError(
            f"it is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:  # noqa: ANN401 - any JSON value
    """The value in a JSON file; raises as :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, limit))


def parse_json(text: str, *, any_text: bool = False) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a JSON text; ``any_text`` lets texts pass that are not valid Unicode, as names of files may be.

    Raises:
        ForeignError: it is not JSON, is nested too deeply, repeats a key, has a number that is not finite or has more
            than :data:`DIGITS` digits, or a text that is not valid Unicode.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_not_a_number
        )
        if not any_text and "\\ud" in text.lower():  # perhaps half of a surrogate pair, which no library takes
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except ForeignError:
        raise
    except RecursionError:
        raise ForeignError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ForeignError("it has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if "\n" not in text else f"line {error.lineno} column {error.colno}"
        raise ForeignError(f"it is not JSON: {_fault(error)} at {where}") from error


def _fault(error: json.JSONDecodeError) -> str:
    """What is wrong at a place; Python's words for a comma too many differ between versions and rarely name it."""
    before, after = error.doc[max(0, error.pos - 100) : error.pos + 1], error.doc[error.pos : error.pos + 100]
    closed = re.search(r",\s*[\]}]?$", before) and re.match(r",?\s*[\]}]", after)
    return "a comma before a closing bracket" if closed else error.msg.removesuffix(" at")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ForeignError(f"the key {shorten(twice)} occurs more than once in an object")
    return content


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ForeignError(f"it has a number of {len(digits)} digits, at most {DIGITS} are read")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ForeignError(f"the number {cut(digits)} is too large")
    return value


def _not_a_number(name: str) -> float:
    raise ForeignError(f"{name} is not a number of JSON")


def cut(text: str, limit: int = QUOTED) -> str:
    """At most ``limit`` characters of a text, its end replaced by an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def shorten(value: object, limit: int = QUOTED) -> str:
    """A foreign value as a message quotes it: on one line, harmless, and at most ``limit`` characters long."""
    if isinstance(value, str | bytes | bytearray):
        return cut(harmless(repr(value[: limit + 1])), limit)
    if isinstance(value, list | tuple | dict | set | frozenset) and len(value) > LISTED:
        return f"{type(value).__name__} of {len(value)} entries"
    try:
        return cut(harmless(repr(value)), limit)
    except Exception:  # deep lists, integers of thousands of digits, foreign classes
        return f"a value of type {type(value).__name__}"


def listed(values: Iterable[object], limit: int = LISTED) -> str:
    """Names as a message lists them: harmless, and at most ``limit`` of them."""
    names = [cut(harmless(str(value))) for value in values]
    more = [f"… and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])
