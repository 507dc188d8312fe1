"""Runs of ONNX Runtime that a cancellation, or Ctrl-C, stops after the node that is running."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

import onnxruntime as ort

from owl2.runtime.cancellation import Cancellation
from owl2.runtime.errors import BackendError
from owl2.runtime.foreign import cut

T = TypeVar("T")
LOG_FATAL = 4
"""Severity of ONNX Runtime's log."""
LONGEST_REASON = 500
"""Characters of ONNX Runtime's own message that ours repeats."""


def run_stoppable(what: str, cancellation: Cancellation, run: Callable[[ort.RunOptions], T]) -> T:
    """Run a graph.

    Signals are handled between two statements of Python's main thread. So that a step does not hold them off, it runs
    in a thread of its own while the main thread waits.

    Args:
        what: the graph, for messages.
        cancellation: ends the run.
        run: of a session, with the options that are given to it.

    Raises:
        StoppedError: it was cancelled.
        BackendError: ONNX Runtime failed.
    """
    options = ort.RunOptions()
    options.log_severity_level = LOG_FATAL  # failures come back as exceptions

    def stop() -> None:
        options.terminate = True

    with cancellation.stopping(stop):
        try:
            if threading.current_thread() is not threading.main_thread():
                return run(options)
            return _run_aside(lambda: run(options), stop)
        except Exception as error:
            cancellation.check()
            raise BackendError(f"{what} failed: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of a message of ONNX Runtime, whose errors have no common base class."""
    return cut(next(iter(str(error).splitlines()), type(error).__name__), LONGEST_REASON)


class _Aside:
    """The thread for steps of the main thread; ``tasks`` are done one after the other.

    Queue and locks are those of the interpreter, which an interrupt leaves either taken or not; what the standard
    library builds on them (Condition, Future) an interrupt can leave locked for ever.
    """

    tasks: SimpleQueue[Callable[[], object]] | None = None


def _run_aside(step: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run a step of the main thread in another; an interrupt stops it, and is raised once it has ended."""
    outcome: list[tuple[T | None, BaseException | None]] = []
    ended = threading.Lock()
    ended.acquire()

    def task() -> None:
        try:
            outcome.append((step(), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            ended.release()

    tasks = _tasks()
    try:
        tasks.put(task)
        ended.acquire()
    except BaseException:
        stop()
        _wait(tasks)  # buffers must not be used again before
        raise
    result, error = outcome.pop()  # not kept here: the error's traceback knows this list
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _tasks() -> SimpleQueue[Callable[[], object]]:
    if _Aside.tasks is None:
        tasks: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=_work, args=(tasks,), name="owl2-step", daemon=True).start()
        _Aside.tasks = tasks
    return _Aside.tasks


def _work(tasks: SimpleQueue[Callable[[], object]]) -> None:
    while True:
        tasks.get()()


def _wait(tasks: SimpleQueue[Callable[[], object]]) -> None:
    """Wait until everything is done that was asked for before; another interrupt does not shorten it."""
    done = False
    while not done:
        with suppress(KeyboardInterrupt):
            reached = threading.Lock()
            reached.acquire()
            tasks.put(reached.release)
            reached.acquire()
            done = True


def _forget() -> None:
    _Aside.tasks = None  # threads do not survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
