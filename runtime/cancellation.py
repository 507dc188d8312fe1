"""Ending a generation early: looked at before each step, and told to the step that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StoppedError(Exception):
    """A step was stopped because its generation is cancelled; what was cached before it is unchanged."""


class Cancellation:
    """Whether a generation is to end. Has no lock, so that a signal handler may call :meth:`cancel` at any moment."""

    def __init__(self) -> None:
        self._cancelled = False
        self._stop: Callable[[], object] | None = None

    def __bool__(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """End the generation; may be called from any thread."""
        self._cancelled = True
        stop = self._stop
        if stop is not None:
            stop()

    def check(self) -> None:
        """Raise StoppedError if the generation is to end."""
        if self._cancelled:
            raise StoppedError

    @contextmanager
    def stopping(self, stop: Callable[[], object]) -> Iterator[None]:
        """Call ``stop`` if the generation is cancelled during this context, or has been before.

        Args:
            stop: ends the step that runs in the context; may be called from another thread, and more than once.
        """
        self._stop = stop
        try:
            self.check()  # after `stop` can be seen: a cancellation is seen here, or sees it
            yield
        finally:
            self._stop = None


NEVER = Cancellation()
"""Of steps that nobody cancels."""
