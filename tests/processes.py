"""The command ``owl2`` as a process of its own: on a pipe that soon is full, or in a terminal."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COMMAND = (sys.executable, "-m", "owl2.runtime")
SMALL_PIPE = 4096
LONG = ("--max-new-tokens", "100000")
"""Ends with the context; much more text than SMALL_PIPE holds."""


def hear_ctrl_c() -> None:
    """In the child: a test run in the background ignores SIGINT, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(*args: object) -> Iterator["subprocess.Popen[str]"]:
    """The command as a process whose stdout pipe soon is full: it then waits until somebody reads."""
    with subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=hear_ctrl_c,  # noqa: PLW1509 - no threads here
    ) as process:
        try:
            assert process.stdout is not None
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
            yield process
        finally:
            process.kill()


def write(process: "subprocess.Popen[str]", text: str) -> None:
    """Write to stdin of a process."""
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def wait_for_output(process: "subprocess.Popen[str]") -> None:
    """Wait until the process has written to stdout, without reading it."""
    assert process.stdout is not None
    end = time.monotonic() + 60
    while int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, b"\0" * 4), sys.byteorder) <= 100:
        assert time.monotonic() < end, "nothing happened for a minute"
        time.sleep(0.01)


Terminal = tuple["subprocess.Popen[bytes]", Callable[[str], str], Callable[[str], None]]


@contextmanager
def terminal(*args: object) -> Iterator[Terminal]:
    """The command in a terminal of its own, with functions that read what it shows and that type."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb"},
        start_new_session=True,
    )
    os.close(theirs)

    def read_until(text: str) -> str:
        shown = ""
        while text not in shown.replace("\r", ""):
            assert select.select([ours], [], [], 60)[0], f"waited a minute for {text!r}, got {shown!r}"
            shown += os.read(ours, 1 << 16).decode()
        return shown

    def type_in(text: str) -> None:
        os.write(ours, text.encode())

    try:
        yield process, read_until, type_in
    finally:
        process.kill()
        process.wait()
        os.close(ours)
