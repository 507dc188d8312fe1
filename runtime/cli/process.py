"""The process of a command: its standard streams and its end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from owl2.runtime.cli.signals import SIGNALLED, end_at_once, hear_signals, stop_code

if TYPE_CHECKING:
    import click

READER_LEFT = SIGNALLED + 13
"""Exit code when nobody reads stdout any more: as if SIGPIPE had ended the program."""


def run(load: Callable[[], click.Command], name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit; only ``--debug`` shows tracebacks.

    Exit codes: 0 success, 1 failure, 2 wrong usage, 70 a fault of this program, 128 + N stopped by signal N
    (130 Ctrl-C, 141 the reader of stdout has left, 143 SIGTERM).

    Args:
        load: imports the command, which takes long enough for a signal to come.
        name: of the program.
        arguments: those of the process if None.
    """
    _open_streams()
    hear_signals()
    try:
        code = _carry_out(load, name, sys.argv[1:] if arguments is None else list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:
        with suppress(OSError):
            sys.stderr.write(f"{name}: stopped\n")
        code = stop_code()
    end_at_once()
    sys.exit(_close_streams(code))


def _carry_out(load: Callable[[], click.Command], name: str, arguments: list[str]) -> int:
    import click

    from owl2.runtime.cli.console import report, report_usage

    code = 0
    try:
        command = load()
        with command.make_context(name, arguments) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        report_usage(error)
        code = error.exit_code
    except BrokenPipeError:
        code = READER_LEFT
    except Exception as error:
        code = report(error, name=name, debug="--debug" in arguments)
    return code


def _open_streams() -> None:
    """Make sure that there are three standard streams, and that no text can break them.

    In place of a closed one comes a file that fails as the closed one would. Otherwise the next file to be opened
    would take its number, and messages that libraries write to stderr would go into that file.
    """
    sys.stdin = _stream(sys.stdin, os.O_WRONLY, "r", "surrogateescape")
    sys.stdout = _stream(sys.stdout, os.O_RDONLY, "w", "replace")
    sys.stderr = _stream(sys.stderr, os.O_RDONLY, "w", "backslashreplace")


def _stream(stream: TextIO | None, failing: int, mode: str, errors: str) -> TextIO:
    if stream is None:
        # The lowest free number is that of the closed stream.
        handle = os.open(os.devnull, failing)
        return io.TextIOWrapper(open(handle, f"{mode}b", closefd=False), encoding="utf-8", errors=errors)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)
    return stream


def _close_streams(code: int) -> int:
    """Write out what is left, where that is possible; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or int(stream is sys.stdout)
            # Python would try it once more, and complain.
            with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    return code
