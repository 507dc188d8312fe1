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
from owl2.runtime.config import PreprocessConfig
from owl2.runtime.errors import ContextOverflowError, ImageError, Owl2Error
from owl2.runtime.generate import Answer
from owl2.runtime.preprocess import load_image, preprocess
from owl2.runtime.version import __version__

PROMPT = "> "
LEAVING = "/quit or Ctrl-D leaves"


@dataclass
class Session:
    """A conversation and what the terminal keeps beside it.

    Attributes:
        chat: the conversation.
        options: how answers are generated.
        context: positions it may take.
        preprocess: how the bundle prepares images.
        images: wait for the next question.
        answer: the last finished one.
        done: no more lines are wanted.
        failed: a line could not be carried out.
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

    Ctrl-C stops an answer and takes its question back, Ctrl-D leaves. Without a terminal every line of stdin
    is a question or a command, and the exit code is 1 if one of them failed.

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
    owl = options.load(bundle)
    session = Session(owl.chat(), options, owl.context, owl.config.preprocess)
    if interactive:
        _prepare_terminal()
        notice(f"version {__version__}; /help lists the commands, Ctrl-C stops an answer, {LEAVING}")
    _converse(session, interactive)
    if session.failed and not interactive:
        sys.exit(1)


def _prepare_terminal() -> None:
    """Line editing and history, where this Python has them."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() uses it from now on


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
        # input() would write it between the answers.
        click.echo(prompt, nl=False, err=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        if interactive:
            click.echo(err=True)
        return None


def _obey(session: Session, line: str) -> None:
    """Carry out one line; what goes wrong is reported and the conversation goes on."""
    try:
        if line.startswith("/"):
            _command(session, line)
        elif line:
            _ask(session, line)
    except Owl2Error as error:
        session.failed = True
        report(error)
        if isinstance(error, ContextOverflowError):
            notice("/reset begins a new conversation")


def _ask(session: Session, question: str) -> None:
    stream = session.options.stream(session.chat, question, session.images)
    try:
        write(stream)
    except KeyboardInterrupt:
        if stream.finished:  # it came too late to stop anything
            _keep(session, stream.answer)
            raise
        waiting = f"; {_count(session.images)} for the next one" if session.images else ""
        notice_interrupt(f"stopped; the conversation is as it was before this question{waiting}")
        return
    _keep(session, stream.answer)


def _keep(session: Session, answer: Answer) -> None:
    session.images = []
    session.answer = answer
    notice_context(answer, session.context)
    if session.options.stats:
        click.echo(describe(answer), err=True)


def _command(session: Session, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise Owl2Error(f"there is no command {name}; /help lists them")
    COMMANDS[name].run(session, argument.strip())


def _image(session: Session, argument: str) -> None:
    if not argument:
        raise Owl2Error("/image needs the path of an image, as in /image ~/cat.jpg")
    image = _open(argument)
    # Now, not with the question: an image that cannot be used must not stand in the way of later ones.
    preprocess(image, session.preprocess, session.options.preprocess)
    session.images.append(image)
    notice(f"{_count(session.images)} for the next question")


def _open(text: str) -> Image.Image:
    """Read an image whose path is written as people type or drop it: with ``~``, in quotes, or escaped.

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
    notice("a new conversation; no image waits")


def _stats(session: Session, _argument: str) -> None:
    if session.answer is None:
        notice("no answer yet")
        return
    stats = session.answer.stats
    used = stats.prompt_tokens + stats.generated_tokens - 1  # the last token was never fed back
    click.echo(f"{describe(session.answer)}\ncontext: {used} of {session.context} positions", err=True)


def _help(_session: Session, _argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.text}" for command in COMMANDS.values()]
    click.echo("\n".join(lines), err=True)


def _quit(session: Session, _argument: str) -> None:
    session.done = True


def _count(images: list[Image.Image]) -> str:
    return f"{len(images)} image waits" if len(images) == 1 else f"{len(images)} images wait"


@dataclass(frozen=True)
class Command:
    """A line that is no question.

    Attributes:
        usage: how it is written.
        text: what it does.
        run: does it, given what follows the name.
    """

    usage: str
    text: str
    run: Callable[[Session, str], None]


COMMANDS = {
    "/image": Command("/image PATH", "show an image with the next question; repeatable", _image),
    "/reset": Command("/reset", "forget the conversation and the images that wait", _reset),
    "/stats": Command("/stats", "figures of the last answer", _stats),
    "/help": Command("/help", "this list", _help),
    "/quit": Command("/quit", "leave (also Ctrl-D)", _quit),
}
