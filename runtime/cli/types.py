"""Types of arguments."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import click

from owl2.runtime.foreign import shorten

DIGITS = 19
"""Of the largest number that the API takes, which has 63 bits."""


def integer(text: str) -> int:
    """A whole number in ASCII digits."""
    if not re.fullmatch(rf"[+-]?[0-9]{{1,{DIGITS}}}", str(text)):
        raise click.BadParameter(f"{shorten(text)} is not a whole number of at most {DIGITS} digits")
    return int(text)


class Location(click.Path):
    """A path that can exist. An empty one is refused: most likely it is a variable that is not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Check a path before anything is done."""
        if not value:
            self.fail("the path is empty; for the current folder give .", param, ctx)
        try:
            os.lstat(value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fail(f"{shorten(str(value))} is too long for the name of a file", param, ctx)
        return super().convert(value, param, ctx)


PATH = Location(path_type=Path)
