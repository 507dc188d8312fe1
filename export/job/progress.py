"""Progress of long work, on a terminal or elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn as TimeLeftColumn,
)

from owl2.runtime.cli.console import notice, tell
from owl2.runtime.harmless import harmless


class Reporter(Protocol):
    """Shows stages and their steps to the user."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage of ``total`` steps, ``done`` of them by an earlier run; it ends the stage before."""

    def advance(self) -> None:
        """Count one step as done."""

    def note(self, text: str) -> None:
        """Tell the user something now."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self) -> None: ...

    def note(self, text: str) -> None: ...


class Notes:
    """Shows no progress, only notes on stderr."""

    def stage(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self) -> None: ...

    def note(self, text: str) -> None:
        notice(text)


class Terminal:
    """Shows bars with the time left on a terminal, one line per finished stage elsewhere; both on stderr."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeftColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            speed_estimate_period=3600,  # a layer may take minutes
        )
        self._task: TaskID | None = None
        self._stage: tuple[str, float] | None = None

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._finish()
        self._stage = name, time.perf_counter()
        self._task = self._bars.add_task(name, total=total, completed=done)

    def advance(self) -> None:
        if self._task is not None:
            self._bars.advance(self._task)

    def note(self, text: str) -> None:
        if self._bars.disable:
            notice(text)
        else:
            self._bars.console.print(f"owl2-export: {harmless(text)}", markup=False, highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        if self._stage is not None and self._bars.disable:
            name, began = self._stage
            tell(f"{name}: {time.perf_counter() - began:.1f} s")
        self._stage = None
