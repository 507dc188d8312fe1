"""``owl2 chat``: a conversation in the terminal, or read from a pipe."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click

from owl2.runtime.chat import Chat
from owl2.runtime.cli.console import (
    describe,
    notice,
    notice_context,
    notice_image,
    notice_interrupt,
    report,
    reports_errors,
    tell,
    write,
)
from owl2.runtime.cli.input import read_lines
from owl2.runtime.cli.options import Options, bundle_argument, model_options
from owl2.runtime.cli.signals import must_end
from owl2.runtime.cli.table import table
from owl2.runtime.encoded import EncodedImage
from owl2.runtime.errors import ContextOverflowError, ImageError, Owl2Error
from owl2.runtime.generate import Answer
from owl2.runtime.image_files import ReadImage
from owl2.runtime.images import open_image
from owl2.runtime.owl import Owl2
from owl2.runtime.preprocess import ImageReading, preprocess
from owl2.runtime.saved_chat import SUFFIX
from owl2.runtime.version import __version__

LEAVING = "/quit or Ctrl-D leaves"
COMMANDS = (
    ("/image PATH", "attach an image to the next question; repeatable"),
    ("/undo", "take the last question and its answer back"),
    ("/save PATH", "write the conversation to a file, its cache included"),
    ("/load PATH", "go on with a saved conversation; this one ends"),
    ("/reset", "begin a new conversation, without the attached images"),
    ("/stats", "show the figures of the last answer"),
    ("/help", "show this list"),
    ("/quit", "leave (also Ctrl-D)"),
)


@dataclass
class ChatState:
    """A conversation in the terminal.

    Attributes:
        images: attached to the next question.
        answer: the last one.
        done: whether to leave.
        failed: whether a line could not be carried out.
    """

    owl: Owl2
    chat: Chat
    options: Options
    images: list[ReadImage | EncodedImage] = field(default_factory=list)
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
        state = ChatState(owl, owl.chat(), options)
        if interactive:
            if sys.stdout.isatty():
                with contextlib.suppress(ImportError):  # not on Windows
                    import readline  # noqa: F401 - input() uses it from now on
            notice(f"version {__version__}; /help lists the commands, Ctrl-C stops an answer, {LEAVING}")
            _converse(state)
            return
        for line in read_lines():
            _obey(state, line.strip())
            if state.done:
                break
    if state.failed:
        sys.exit(1)


def _converse(state: ChatState) -> None:
    """Read from a terminal, where Ctrl-C does not end the program."""
    while not state.done:
        try:
            line = _read_line()
            if line is None:
                break
            _obey(state, line)
        except KeyboardInterrupt:
            if must_end():
                raise
            tell("")
            notice(LEAVING)


def _read_line() -> str | None:
    """The next line of a terminal without surrounding space; None at the end of input."""
    prompt = "> "
    if not sys.stdout.isatty():
        # input() would write it to stdout, between the answers.
        tell(prompt, end="")
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        tell("")
        return None


def _obey(state: ChatState, line: str) -> None:
    """Carry out one line; an error is reported, and the conversation goes on."""
    name, _, argument = line.partition(" ")
    try:
        match name:
            case "/image" | "/save" | "/load":
                {"/image": _image, "/save": _save, "/load": _load}[name](state, argument.strip())
            case "/undo":
                state.chat.undo()
                state.answer = None
                notice("the last question and its answer are taken back")
            case "/reset":
                state.chat.reset()
                state.images, state.answer = [], None
                notice("new conversation, no images attached")
            case "/stats":
                _stats(state)
            case "/help":
                tell(table(COMMANDS))
            case "/quit":
                state.done = True
            case _ if line.startswith("/"):
                raise Owl2Error(f"{name} is not a command; /help lists them")
            case _ if line:
                _ask(state, line)
    except Owl2Error as error:
        state.failed = True
        report(error, debug=click.get_current_context().params["debug"])
        if isinstance(error, ContextOverflowError):
            notice("/reset begins a new conversation, /undo takes the last question back")


def _ask(state: ChatState, question: str) -> None:
    stream, options = None, state.options
    try:
        stream = state.chat.stream(question, state.images, preprocess=options.preprocess, config=options.generation)
        write(stream)
    except KeyboardInterrupt:
        if must_end():
            raise
        if stream is None or not stream.finished:
            attached = f"; {_attached(state)}" if state.images else ""
            notice_interrupt(f"stopped; the conversation is as it was before this question{attached}")
            return
        _keep(state, stream.answer)  # it came too late to stop anything
        raise
    _keep(state, stream.answer)


def _keep(state: ChatState, answer: Answer) -> None:
    state.images = []
    state.answer = answer
    notice_context(answer, state.owl.context)
    if state.options.stats:
        tell(describe(answer))


def _save(state: ChatState, argument: str) -> None:
    path = _path(argument, "/save")
    try:
        state.chat.save(path)
    except OSError as error:
        raise Owl2Error(f"{path} cannot be written: {error.strerror or error}") from error
    notice(f"saved to {path}, {path.stat().st_size / 2**20:.1f} MiB; /load goes on from there")


def _load(state: ChatState, argument: str) -> None:
    state.chat = state.owl.load_chat(_path(argument, "/load"))
    state.images, state.answer = [], None
    turns = state.chat.messages
    notice(f"loaded, {len(turns) // 2} questions with their answers; the last answer was:")
    tell(turns[-1]["content"] if turns else "")


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise Owl2Error(f"{command} needs the path of a file, as in {command} ~/talk{SUFFIX}")
    return Path(os.path.expanduser(argument))  # noqa: PTH111 - Path's own raises for an unknown ~user


def _image(state: ChatState, argument: str) -> None:
    if not argument:
        raise Owl2Error("/image needs the path of an image, as in /image ~/cat.jpg")
    image = _open(argument, state.options.reading)
    # Now, not with the question: an image that cannot be used must not block later ones.
    if isinstance(image, ReadImage):
        preprocess(image.image, state.owl.config.preprocess, state.options.preprocess)
    else:
        state.owl.model.prepare([image])
    state.images.append(image)
    notice_image(argument, image.record)
    notice(_attached(state))


def _open(text: str, reading: ImageReading) -> ReadImage | EncodedImage:
    """Read an image whose path is written as people type or drop it: with ``~``, quoted or escaped."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    try:
        return open_image(os.path.expanduser(text), reading)  # noqa: PTH111 - Path's own raises for an unknown ~user
    except ImageError:
        if "\\" not in text:
            raise
    return open_image(os.path.expanduser(re.sub(r"\\(.)", r"\1", text)), reading)  # noqa: PTH111


def _stats(state: ChatState) -> None:
    if state.answer is None:
        notice("no answer yet")
        return
    stats = state.answer.stats
    used = stats.prompt_tokens + stats.generated_tokens - 1  # the last token was never fed back
    tell(f"{describe(state.answer)}\ncontext: {used} of {state.owl.context} positions")


def _attached(state: ChatState) -> str:
    count = len(state.images)
    return f"{count} image{'s' * (count != 1)} attached to the next question"
