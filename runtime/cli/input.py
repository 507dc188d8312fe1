"""Text from stdin: UTF-8, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count

from owl2.runtime.errors import PromptError
from owl2.runtime.foreign import ForeignError, decode_text, reading

TEXT_BYTES = 16 << 20
"""Longest text that is read: far more than a context holds."""


def read_text() -> str:
    """All of stdin.

    Raises:
        PromptError: it cannot be read, is not UTF-8, or is longer than :data:`TEXT_BYTES`.
    """
    with reading("stdin", PromptError, "or give the question as an argument"):
        return decode_text(_bounded(sys.stdin.buffer.read(TEXT_BYTES + 1)))


def read_lines() -> Iterator[str]:
    """The lines of stdin as they come, without their ends; raises as :func:`read_text`, of each line."""
    for number in count(1):
        with reading("stdin", PromptError, "every line is a question or a command"):
            line = _bounded(sys.stdin.buffer.readline(TEXT_BYTES + 1))
            text = decode_text(line, first_line=number)
        if not line:
            return
        yield from text.split("\n")


def _bounded(content: bytes) -> bytes:
    if len(content) > TEXT_BYTES:
        raise ForeignError(f"it has more than {TEXT_BYTES >> 20} MiB")
    return content
