"""``owl2 chat``: a conversation in the terminal, or read from a pipe."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
from PIL import Image

from owl2.runtime.chat import Chat
from owl2.runtime.cli.console import (
    describe,
    notice,
    notice_context,
    notice_interrupt,
    report,
    reports_errors,
    write,
)
from owl2.runtime.cli.options import Options, bundle_argument, model_options
from owl2.runtime.cli.table import table
from owl2.runtime.config import PreprocessConfig
from owl2.runtime.errors import ContextOverflowError, ImageError, Owl2Error
from owl2.runtime.generate import Answer
from owl2.runtime.preprocess import load_image, preprocess
from owl2.runtime.version import __version__

PROMPT = "> "
LEAVING = "/quit or Ctrl-D leaves"


@dataclass
class Session:
    """A conversation in the terminal.

    Attributes:
        chat: the conversation.
        options: how answers are generated.
        context: positions it may take.
        preprocess: how the bundle prepares images.
        images: attached to the next question.
        answer: the last one.
        done: whether to leave.
        failed: whether a line could not be carried out.
    """

    chat: Chat
    options: Options
    context: int
    preprocess: PreprocessConfig
    images: list[Image.Image] = field(default_factory=list)
    answer: Answer | None = None
    done: bool = False
    failed: bool = False


@click.command()
@bundle_argument
@reports_errors
@model_options
def chat(options: Options, bundle: Path) -> None:
    """Hold a conversation; /help lists its commands.

    Ctrl-C stops an answer and takes its question back, Ctrl-D leaves. Without a terminal, every line of stdin is a
    question or a command, and the exit code is 1 if one of them failed.

    \b
    Examples:
      owl2 chat bundle/
      owl2 chat bundle/ --temperature 0.7 --stats
      owl2 chat bundle/ --kv-cache int8
      printf '/image cat.jpg\\nWhat is this?\\nWhat colour is it?\\n' | owl2 chat bundle/
    """
    interactive = sys.stdin.isatty()
    if interactive:
        notice(f"loading {bundle}")
    with options.load(bundle) as owl:
        session = Session(owl.chat(), options, owl.context, owl.config.preprocess)
        if interactive:
            if sys.stdout.isatty():
                with contextlib.suppress(ImportError):  # not on Windows
                    import readline  # noqa: F401 - input() uses it from now on
            notice(f"version {__version__}; /help lists the commands, Ctrl-C stops an answer, {LEAVING}")
        _converse(session, interactive)
    if session.failed and not interactive:
        sys.exit(1)


def _converse(session: Session, interactive: bool) -> None:
    while not session.done:
        try:
            line = _read_line(interactive)
            if line is None:
                break
            _obey(session, line)
        except KeyboardInterrupt:
            if not interactive:
                raise
            click.echo(err=True)
            notice(LEAVING)


def _read_line(interactive: bool) -> str | None:
    """The next line without surrounding space; None at the end of input."""
    prompt = PROMPT if interactive else ""
    if interactive and not sys.stdout.isatty():
        # input() would write it to stdout, between the answers.
        click.echo(prompt, nl=False, err=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        if interactive:
            click.echo(err=True)
        return None


def _obey(session: Session, line: str) -> None:
    """Carry out one line; an error is reported, and the conversation goes on."""
    try:
        name, _, argument = line.partition(" ")
        if name in COMMANDS:
            COMMANDS[name].run(session, argument.strip())
        elif line.startswith("/"):
            raise Owl2Error(f"{name} is not a command; /help lists them")
        elif line:
            _ask(session, line)
    except Owl2Error as error:
        session.failed = True
        report(error)
        if isinstance(error, ContextOverflowError):
            notice("/reset begins a new conversation, /undo takes the last question back")


def _ask(session: Session, question: str) -> None:
    stream = None
    try:
        stream = session.options.stream(session.chat, question, session.images)
        write(stream)
    except KeyboardInterrupt:
        if stream is None or not stream.finished:
            attached = f"; {_attached(session)}" if session.images else ""
            notice_interrupt(f"stopped; the conversation is as it was before this question{attached}")
            return
        _keep(session, stream.answer)  # it came too late to stop anything
        raise
    _keep(session, stream.answer)


def _keep(session: Session, answer: Answer) -> None:
    session.images = []
    session.answer = answer
    notice_context(answer, session.context)
    if session.options.stats:
        click.echo(describe(answer), err=True)


def _image(session: Session, argument: str) -> None:
    if not argument:
        raise Owl2Error("/image needs the path of an image, as in /image ~/cat.jpg")
    image = _open(argument)
    # Now, not with the question: an image that cannot be used must not block later ones.
    preprocess(image, session.preprocess, session.options.preprocess)
    session.images.append(image)
    notice(_attached(session))


def _open(text: str) -> Image.Image:
    """Read an image whose path is written as people type or drop it: with ``~``, quoted or escaped.

    Raises:
        ImageError: it cannot be read.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    try:
        return load_image(_expanded(text))
    except ImageError:
        if "\\" not in text:
            raise
    return load_image(_expanded(re.sub(r"\\(.)", r"\1", text)))


def _expanded(text: str) -> Path:
    with contextlib.suppress(RuntimeError):  # ~name of a user that does not exist
        return Path(text).expanduser()
    return Path(text)


def _reset(session: Session, _argument: str) -> None:
    session.chat.reset()
    session.images = []
    session.answer = None
    notice("new conversation, no images attached")


def _undo(session: Session, _argument: str) -> None:
    session.chat.undo()
    session.answer = None
    notice("the last question and its answer are taken back")


def _stats(session: Session, _argument: str) -> None:
    if session.answer is None:
        notice("no answer yet")
        return
    stats = session.answer.stats
    used = stats.prompt_tokens + stats.generated_tokens - 1  # the last token was never fed back
    click.echo(f"{describe(session.answer)}\ncontext: {used} of {session.context} positions", err=True)


def _help(_session: Session, _argument: str) -> None:
    click.echo(table([(command.usage, command.text) for command in COMMANDS.values()]), err=True)


def _quit(session: Session, _argument: str) -> None:
    session.done = True


def _attached(session: Session) -> str:
    count = len(session.images)
    return f"{count} image{'s' * (count != 1)} attached to the next question"


@dataclass(frozen=True)
class Command:
    """A line that is not a question.

    Attributes:
        usage: how it is written.
        text: what it does.
        run: does it, given what follows the name.
    """

    usage: str
    text: str
    run: Callable[[Session, str], None]


COMMANDS = {
    "/image": Command("/image PATH", "attach an image to the next question; repeatable", _image),
    "/undo": Command("/undo", "take the last question and its answer back", _undo),
    "/reset": Command("/reset", "begin a new conversation, without the attached images", _reset),
    "/stats": Command("/stats", "show the figures of the last answer", _stats),
    "/help": Command("/help", "show this list", _help),
    "/quit": Command("/quit", "leave (also Ctrl-D)", _quit),
}
