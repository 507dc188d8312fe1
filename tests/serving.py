"""A real server in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60


@dataclass
class RunningServer:
    """A server that answers.

    Attributes:
        address: without a path.
        process: of it.
        log: everything it wrote.
    """

    address: str
    process: subprocess.Popen[str]
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal and wait for its end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def serving(bundle: Path, store: Path, *options: str, log: Path | None = None) -> Iterator[RunningServer]:
    log = log or store.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "owl2.runtime", "serve", bundle, "--port", "0", "--store", store, *options],
            stdout=out,
            stderr=out,
            env=os.environ,
            text=True,
        )
    try:
        until = time.monotonic() + START_SECONDS
        while (found := re.search(r"is at (http\S+),", log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield RunningServer(found[1], process, log)
    finally:
        process.kill()
        process.wait()
