"""What a run has found, for people: in memory for numbers alone, however many images there are."""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

SHOWN = 12
"""Images of each end that are kept by name."""
ERRORS = 200
"""Errors that are kept."""


@dataclass
class TaskSummary:
    """Scores on one task.

    Attributes:
        values: all of them.
        best, worst: those of the :data:`SHOWN` best and worst images with their names, the lowest first.
    """

    values: array[float] = field(default_factory=lambda: array("d"))
    best: list[tuple[float, str]] = field(default_factory=list)
    worst: list[tuple[float, str]] = field(default_factory=list)

    def add(self, image: str, value: float) -> None:
        """Count one image."""
        self.values.append(value)
        insort(self.best, (value, image))
        insort(self.worst, (value, image))
        del self.best[:-SHOWN], self.worst[SHOWN:]


@dataclass
class Summary:
    """What a run has found.

    Attributes:
        tasks: scores by task.
        broken: images that could not be scored.
        errors: the first of these, with their errors.
    """

    tasks: dict[str, TaskSummary] = field(default_factory=dict)
    broken: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)

    def add(self, image: str, error: str | None, values: Iterable[tuple[str, float]]) -> None:
        """Count one image: its error, or the value of each task."""
        if error:
            self.broken += 1
            if len(self.errors) < ERRORS:
                self.errors.append((image, error))
            return
        for task, value in values:
            self.tasks.setdefault(task, TaskSummary()).add(image, value)
