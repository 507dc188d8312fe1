"""Foreign text made harmless: no message and no line on a terminal does what somebody else wrote into a file."""

from __future__ import annotations

import re

# Control characters, and those that change the direction of writing (Unicode Standard Annex #9): on a terminal they
# move the cursor, change colours, or show a name as another one. Halves of surrogate pairs cannot be written at all.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """``text`` on one line, with control characters and changes of writing direction as escapes."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def harmless_lines(text: str) -> str:
    """As :func:`harmless`, but tabs and the ends of lines stay."""
    return re.sub(r"[^\n\t]+", lambda found: harmless(found[0]), text)


def harmless_message(text: str) -> str:
    """As :func:`harmless`, but lines of a list stay, which begin with two spaces; other ends of lines are foreign."""
    return "\n".join(harmless(line) for line in re.split(r"\n(?=  )", text))
