"""Signals that stop a command."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALLED = 128
"""Added to the number of the signal that ended a program, as shells do."""
LAST_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""They end a command as Ctrl-C does, and a conversation with it."""

_received = [signal.SIGINT]


def hear_signals() -> None:
    """Raise KeyboardInterrupt for :data:`LAST_SIGNALS` too, unless they are ignored, as nohup ignores SIGHUP."""
    for number in LAST_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)


def end_at_once() -> None:
    """Let Ctrl-C end the process at once and quietly from now on, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def must_end() -> bool:
    """Whether one of :data:`LAST_SIGNALS` has come: no KeyboardInterrupt may be caught for good any more."""
    return _received[-1] in LAST_SIGNALS


def stop_code() -> int:
    """Exit code of a program that a signal has stopped."""
    return SIGNALLED + _received[-1]


def _stop(number: int, _frame: FrameType | None) -> None:
    # A closed terminal may send SIGHUP twice: the second must not disturb the cleaning up after the first.
    for other in LAST_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt
