"""Output of the commands: answers on stdout, everything else as lines on stderr."""

from __future__ import annotations

import functools
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

import click

from owl2.runtime.errors import Owl2Error, Owl2Warning
from owl2.runtime.generate import Answer
from owl2.runtime.stream import AnswerStream
from owl2.runtime.verification import LoadProgress, OnProgress

STOPPED = 130
"""Exit code of a program ended by Ctrl-C: 128 + SIGINT."""
PROGRESS_DELAY = 0.5
"""Seconds of hashing before it shows how far it has come."""

# An answer is a model's text: on a terminal it must not move the cursor or change colours.
UNSHOWN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def notice(text: str) -> None:
    """Write a message to stderr, after the name of the program."""
    context = click.get_current_context(silent=True)
    name = context.find_root().info_name if context is not None else None
    click.echo(f"{name or 'owl2'}: {text}", err=True)


def notice_interrupt(text: str) -> None:
    """Write a message after Ctrl-C."""
    if sys.stderr.isatty():
        click.echo("\r", err=True, nl=False)  # over the ^C that the terminal has just shown
    notice(text)


def report(error: Owl2Error) -> None:
    """Write an error as one line, or with its traceback if the command was given ``--debug``."""
    if click.get_current_context().params["debug"]:
        traceback.print_exception(error)
    else:
        notice(f"error: {error}")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--debug`` to a command; end it with one line and an exit code on an error or Ctrl-C."""

    @click.option("--debug", is_flag=True, help="Show tracebacks instead of one line per error.")
    @functools.wraps(command)
    def reporting(debug: bool, **given: Any) -> None:  # noqa: ANN401 - click's parameters
        try:
            with _notices_of_warnings():
                command(**given)
        except Owl2Error as error:
            report(error)
            sys.exit(1)
        except KeyboardInterrupt:
            notice_interrupt("stopped")
            sys.exit(STOPPED)

    return reporting


@contextmanager
def _notices_of_warnings() -> Iterator[None]:
    """Write warnings of this project as notices."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, Owl2Warning):
                notice(f"warning: {message}")
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.simplefilter("always", Owl2Warning)
        yield


@contextmanager
def load_progress() -> Iterator[OnProgress | None]:
    """Show on stderr how far hashing has come, if that is a terminal and takes more than a moment."""
    if not sys.stderr.isatty():
        yield None
        return
    began: float | None = None
    advance: Callable[[int], None] | None = None
    counted = 0

    def show(progress: LoadProgress) -> None:
        nonlocal began, advance, counted
        if progress.stage != "verifying":
            bars.close()
            began, advance, counted = None, None, 0  # another model may follow
            return
        began = time.monotonic() if began is None else began
        if advance is None and time.monotonic() - began >= PROGRESS_DELAY and progress.done < progress.total:
            label = f"verifying {size(progress.total)}"
            bar = click.progressbar(length=progress.total, label=label, file=sys.stderr)
            advance = bars.enter_context(bar).update
        if advance is not None:
            advance(progress.done - counted)
            counted = progress.done

    with ExitStack() as bars:
        yield show


def write(stream: AnswerStream) -> None:
    """Write an answer to stdout while it is generated; its line ends also where it is broken off."""
    written = False
    try:
        for chunk in stream:
            sys.stdout.write(shown(chunk.text))
            sys.stdout.flush()
            written = written or bool(chunk.text)
    finally:
        if written or stream.finished:
            sys.stdout.write("\n")
            sys.stdout.flush()


def shown(text: str) -> str:
    """``text`` for stdout: without control characters if that is a terminal."""
    return text.translate(UNSHOWN) if sys.stdout.isatty() else text


def notice_context(answer: Answer, context: int) -> None:
    """Say so if the end of the context cut an answer."""
    if answer.finish_reason == "context":
        prompt = answer.stats.prompt_tokens
        notice(
            f"the context of {context} positions is full: {prompt} for the prompt, {context - prompt} for the answer, "
            "which is cut off"
        )


def describe(answer: Answer) -> str:
    """Two lines with the figures of an answer."""
    stats = answer.stats
    new = stats.prompt_tokens - stats.reused_tokens
    return (
        f"prompt: {stats.prompt_tokens} tokens, {stats.reused_tokens} reused, {new} new in "
        f"{duration(stats.prefill_seconds)}; images encoded: {stats.images_encoded} in "
        f"{duration(stats.vision_seconds)}\n"
        f"answer: {stats.generated_tokens} tokens ({answer.finish_reason}), the first after "
        f"{duration(stats.time_to_first_token)}, then {stats.tokens_per_second:.1f} tokens/s; "
        f"peak memory {size(stats.peak_memory)}, {size(stats.kv_cache_memory)} of it K/V cache for "
        f"{stats.kv_cache_positions} positions"
    )


def duration(seconds: float) -> str:
    """Time for people: ``7 ms``, ``12.3 s``."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def size(count: int) -> str:
    """Bytes for people: ``512 B``, ``3.9 GiB``."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"
