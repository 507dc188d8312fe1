"""New processes, for what must not happen in this one: loads that count from the start, and torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence

# Not with -m: that would import from the folder at hand before what is installed.
START = (
    "import sys; sys.path = [entry for entry in sys.path if entry]; from importlib import import_module; "
    "import_module(sys.argv[1]).main(*sys.argv[2:])"
)


class ProcessError(Exception):
    """A new process failed; the text is the last line that it wrote to stderr."""


def lines_of(module: str, arguments: Sequence[str]) -> Generator[str, None, None]:
    """Run ``main`` of a module, which takes texts, in a new process; yields the lines that it writes to stdout.

    Closing the iterator ends the process.

    Raises:
        ProcessError: the process failed.
    """
    command = [sys.executable, "-c", START, module, *arguments]
    # A file holds any number of warnings; a pipe that nobody reads would stop the process.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True) as process,
    ):
        try:
            for line in process.stdout or ():
                yield line.rstrip("\n")
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code:
            told.seek(0)
            lines = [line for line in told.read().splitlines() if line.strip()]
            raise ProcessError(lines[-1] if lines else f"exit code {code}")
