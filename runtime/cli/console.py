"""Output of the commands: answers and results on stdout, everything else as lines on stderr.

All of it passes through :func:`say` or :func:`tell`, so that no foreign text (a file's name, a value of a manifest, an
answer) moves the cursor, changes colours or forges a line on somebody's terminal. On a pipe, stdout stays exact.
"""

from __future__ import annotations

import functools
import io
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

import click

from owl2.runtime.cli.signals import stop_code
from owl2.runtime.errors import Owl2Error, Owl2Warning
from owl2.runtime.foreign import cut, reason
from owl2.runtime.harmless import harmless, harmless_lines, harmless_message

if TYPE_CHECKING:
    from owl2.runtime.generate import Answer
    from owl2.runtime.image_files import ImageRecord
    from owl2.runtime.stream import AnswerStream
    from owl2.runtime.verification import LoadProgress, OnProgress

FAILED = 1
INTERNAL_ERROR = 70
"""Exit code after a fault of this program itself: EX_SOFTWARE of sysexits.h."""
PROGRESS_DELAY = 0.5
"""Seconds of hashing before its progress is shown."""
LINE = 1500
"""Longest line of a message, in characters; how many lines a list may have is decided where it is made."""


def say(text: str, end: str = "\n") -> None:
    """Write to stdout: a result, or a piece of an answer.

    Raises:
        OSError: naming stdout.
    """
    try:
        sys.stdout.write((harmless_lines(text) if sys.stdout.isatty() else text) + end)
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from error


def say_json(record: Mapping[str, Any] | list[Any]) -> None:
    """Write a result as JSON that every parser reads: in ASCII, without lone surrogates."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    # A file name that is no valid Unicode has lone surrogates in Python.
    whole = re.sub("[\ud800-\udfff]", "\ufffd", text)
    say(re.sub(r"[^\n -~]", lambda found: json.dumps(found[0])[1:-1], whole))


def tell(text: str, end: str = "\n") -> None:
    """Write to stderr; where that fails, nobody can be told."""
    with suppress(OSError):
        sys.stderr.write(harmless_lines(text) + end)
        sys.stderr.flush()


def notice(text: str, name: str = "") -> None:
    """Write a message to stderr, after the name of the program.

    Lines of a list begin with two spaces; any other end of a line comes from a foreign text.
    """
    context = click.get_current_context(silent=True)
    program = name or (context and context.find_root().info_name) or "owl2"
    tell(f"{program}: {_bounded(harmless_message(text))}")


def _bounded(text: str) -> str:
    """A message whose long lines have lost their middle: what to do is said at the end."""
    lines = text.split("\n")
    return "\n".join(s if len(s) <= LINE else f"{s[: LINE // 2]} … {s[-LINE // 2 :]}" for s in lines)


def notice_interrupt(text: str) -> None:
    if sys.stderr.isatty():
        with suppress(OSError):
            sys.stderr.write("\r")  # over the ^C that the terminal has just shown
    notice(text)


def report(error: Exception, *, debug: bool, name: str = "") -> int:
    """Tell an error as one line, or as a traceback with ``debug``; returns the exit code."""
    match error:
        case Owl2Error():
            text, code = str(error), FAILED
        case OSError():  # the system's refusal: of a full disk, of a file that may not be read
            file = "" if error.filename is None else f"cannot use {cut(harmless(str(error.filename)))}: "
            text, code = file + reason(error), FAILED
        case MemoryError():
            text, code = "there is not enough memory", FAILED
        case _:
            what = f"{type(error).__name__}: {reason(error)}"
            text, code = f"internal error: {what}; run again with --debug, and report what it shows", INTERNAL_ERROR
    if debug:
        tell("".join(traceback.format_exception(error)), end="")
    else:
        notice(text if code == INTERNAL_ERROR else f"error: {text}", name)
    return code


def report_usage(error: click.ClickException) -> None:
    """Tell how a command is used."""
    shown = io.StringIO()
    error.show(shown)
    tell(_bounded(shown.getvalue()), end="")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--debug`` to a command; end it with one line and an exit code on an error or a signal."""

    @click.option("--debug", is_flag=True, help="Show tracebacks instead of one line per error.")
    @functools.wraps(command)
    def reporting(debug: bool, **given: Any) -> None:  # noqa: ANN401 - click's parameters
        try:
            with _notices_of_warnings():
                command(**given)
        except KeyboardInterrupt:
            notice_interrupt("stopped")
            sys.exit(stop_code())
        # The group of commands and the process deal with these.
        except (click.ClickException, click.exceptions.Exit, click.Abort, ModuleNotFoundError, BrokenPipeError):
            raise
        except Exception as error:
            sys.exit(report(error, debug=debug))

    return reporting


@contextmanager
def _notices_of_warnings() -> Iterator[None]:
    with warnings.catch_warnings():

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
                tell(warnings.formatwarning(message, category, filename, lineno, line), end="")

        warnings.showwarning = show
        warnings.simplefilter("always", Owl2Warning)
        yield


@contextmanager
def load_progress() -> Iterator[OnProgress | None]:
    """Show the progress of hashing on stderr, if that is a terminal and hashing takes more than a moment."""
    if not sys.stderr.isatty():
        yield None
        return
    began: float | None = None
    bar: Any = None

    def show(progress: LoadProgress) -> None:
        nonlocal began, bar
        if progress.stage != "verifying":
            bars.close()
            began, bar = None, None  # another model may follow
            return
        began = time.monotonic() if began is None else began
        if bar is None and time.monotonic() - began >= PROGRESS_DELAY and progress.done < progress.total:
            label = f"verifying {size(progress.total)}"
            bar = bars.enter_context(click.progressbar(length=progress.total, label=label, file=sys.stderr))
        if bar is not None:
            bar.update(progress.done - bar.pos)

    with ExitStack() as bars:
        yield show


def write(stream: AnswerStream) -> None:
    """Write an answer to stdout while it is generated; end its line even if it breaks off."""
    written = False
    try:
        for chunk in stream:
            say(chunk.text, end="")
            written = written or bool(chunk.text)
    finally:
        if written or stream.finished:
            say("")


def notice_context(answer: Answer, context: int) -> None:
    """Say so if the end of the context cut an answer."""
    if answer.finish_reason == "context":
        prompt = answer.stats.prompt_tokens
        notice(
            f"the context of {context} positions is full: {prompt} for the prompt, {context - prompt} for the answer, "
            "which is cut off"
        )


def notice_image(name: str, record: ImageRecord) -> None:
    """Say so if an image is shown to the model in another way than it is stored."""
    changes = describe_image(record)
    if changes:
        notice(f"{cut(harmless(name))}: {changes}")


def describe_image(record: ImageRecord) -> str:
    """What was done to an image that is not usual, empty for nothing."""
    turned = f"turned as its EXIF orientation {record.orientation} says" if record.orientation != 1 else ""
    laid = f"its transparency laid on {record.background}" if record.background else "its transparency dropped"
    return ", ".join(part for part in (turned, laid if record.transparent else "") if part)


def describe(answer: Answer) -> str:
    stats = answer.stats
    new = stats.prompt_tokens - stats.reused_tokens
    images = [
        f"image: {record.shown[0]} x {record.shown[1]} pixels{', ' * bool(changes)}{changes}\n"
        for record in answer.images
        for changes in [describe_image(record)]
    ]
    drafts = f" ({stats.accepted_tokens} of {stats.drafted_tokens} drafted)" if stats.drafted_tokens else ""
    return "".join(images) + (
        f"prompt: {stats.prompt_tokens} tokens, {stats.reused_tokens} reused, {new} new in "
        f"{duration(stats.prefill_seconds)}; images encoded: {stats.images_encoded} in "
        f"{duration(stats.vision_seconds)}\n"
        f"answer: {stats.generated_tokens} tokens ({answer.finish_reason}), the first after "
        f"{duration(stats.time_to_first_token)}, then {stats.tokens_per_second:.1f} tokens/s{drafts}; "
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
