"""Aligned columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from owl2.runtime.harmless import harmless


def table(rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Rows of the same length as columns, two spaces apart; ``align`` has ``<`` or ``>`` for the first columns."""
    rows = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = align.ljust(len(widths), "<")
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def section(title: str, text: str) -> str:
    return f"{title}\n{textwrap.indent(text, '  ')}"
