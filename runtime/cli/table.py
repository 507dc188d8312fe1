"""Aligned columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Rows as columns, two spaces apart.

    Args:
        rows: of the same number of cells.
        align: ``<`` or ``>`` for each column; left for those it does not reach.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = align.ljust(len(widths), "<")
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def section(title: str, text: str) -> str:
    """Text, indented under a title."""
    return f"{title}\n{textwrap.indent(text, '  ')}"
