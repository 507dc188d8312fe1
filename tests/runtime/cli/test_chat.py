"""``owl2 chat``, from a pipe and in a terminal."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCommand
from processes import LONG, started, terminal, wait_for_output, write

from owl2 import AnswerStream, Chat, Owl2
from owl2.runtime.harmless import harmless_lines

SHORT = ("--max-new-tokens", "12")


def test_piped_questions(run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path) -> None:
    result = run("chat", bundle_a1, *SHORT, stdin=f"/image {image}\nWhat?\n\n  And its colour? \n")
    chat = owl.chat()
    first = chat.ask("What?", [image], max_new_tokens=12).text
    second = chat.ask("And its colour?", max_new_tokens=12).text
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr == "owl2: 1 image attached to the next question\n"


def test_several_images(run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path) -> None:
    result = run("chat", bundle_a1, *SHORT, stdin=f"/image {image}\n/image {image}\nSame?\n")
    assert result.stdout == owl.chat().ask("Same?", [image, image], max_new_tokens=12).text + "\n"
    assert "2 images attached to the next question" in result.stderr


@pytest.mark.parametrize("written", ["'{}'", '"{}"', "{}", "~/{name}", "'~/{name}'", "{escaped}"])
def test_ways_to_write_a_path(
    run: RunCommand, bundle_a1: Path, image: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(image.parent))
    escaped = str(image).replace(" ", "\\ ")
    path = written.format(image, name=image.name, escaped=escaped)
    result = run("chat", bundle_a1, stdin=f"/image {path}\n")
    assert result.exit_code == 0
    assert result.stderr == "owl2: 1 image attached to the next question\n"


def test_reset_forgets_everything(run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path) -> None:
    script = f"/image {image}\nFirst?\n/image {image}\n/reset\nSecond?\n"
    result = run("chat", bundle_a1, *SHORT, stdin=script)
    assert result.stdout.endswith("\n" + owl.chat().ask("Second?", max_new_tokens=12).text + "\n")
    assert "new conversation, no images attached" in result.stderr


def test_a_conversation_is_saved_and_goes_on(
    run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.owl2chat"
    first = run("chat", bundle_a1, *SHORT, stdin=f"/image {image}\nWhat?\n/save {saved}\n")
    assert first.exit_code == 0
    assert "goes on from there" in first.stderr
    second = run("chat", bundle_a1, *SHORT, "--stats", stdin=f"/load {saved}\nAnd its colour?\n")
    chat = owl.chat()
    answers = [
        chat.ask(text, images, max_new_tokens=12).text for text, images in (("What?", [image]), ("And its colour?", []))
    ]
    assert second.stdout.endswith(f"{answers[1]}\n")
    assert answers[0] in second.stderr
    bad = run("chat", bundle_a1, stdin=f"/load {image}\n/save\n/save {tmp_path}/missing/a\n")
    assert bad.exit_code == 1
    assert bad.stderr.count("owl2: error") == 3


def test_an_encoded_image_can_be_attached(
    run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path, tmp_path: Path
) -> None:
    encoded = owl.encode(image)
    encoded.save(tmp_path / "a.owl2image")
    expected = owl.chat().ask("What?", [encoded], max_new_tokens=12).text
    chatted = run("chat", bundle_a1, *SHORT, stdin=f"/image {tmp_path / 'a.owl2image'}\nWhat?\n")
    asked = run("ask", bundle_a1, "What?", "--image", tmp_path / "a.owl2image", *SHORT)
    assert chatted.stdout == asked.stdout == expected + "\n"


def test_quit_leaves_at_once(run: RunCommand, bundle_a1: Path) -> None:
    result = run("chat", bundle_a1, stdin="/quit\nA question?\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/picture a.png", "/picture is not a command; /help lists them"),
        ("/image", "/image needs the path of an image"),
        ("/image ~/no such image.png", "cannot read /"),
        ("/image ~nobody-of-this-name/a.png", "cannot read ~nobody-of-this-name/a.png"),
        ("/image " + "x" * 5000, "File name too long"),
        ("<|image|> what?", "1 <|image|> placeholder, but 0 images"),
    ],
)
def test_failed_line_does_not_end_it(run: RunCommand, bundle_a1: Path, owl: Owl2, line: str, message: str) -> None:
    result = run("chat", bundle_a1, *SHORT, stdin=f"{line}\nq\n")
    assert result.stdout == owl.chat().ask("q", max_new_tokens=12).text + "\n"
    assert result.stderr.startswith("owl2: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 1


def test_full_context(run: RunCommand, bundle_a1: Path, prompt_length: Callable[[str], int]) -> None:
    prompt = prompt_length("q")
    result = run("chat", bundle_a1, "--context", prompt + 5, stdin="q\nq\n/reset\nq\n")
    first, second = result.stdout.splitlines()
    assert first == second
    assert result.stderr.count(f"the context of {prompt + 5} positions is full") == 2
    assert f"error: the context holds {prompt + 5} positions" in result.stderr
    assert "/reset begins a new conversation" in result.stderr


def test_undo_takes_the_last_turn_back(run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path) -> None:
    script = f"First?\n/image {image}\nSecond?\n/undo\n/stats\nThird?\n"
    result = run("chat", bundle_a1, *SHORT, stdin=script)
    chat = owl.chat()
    first, third = (chat.ask(question, max_new_tokens=12).text for question in ("First?", "Third?"))
    assert result.exit_code == 0
    assert result.stdout.startswith(first + "\n")
    assert result.stdout.endswith("\n" + third + "\n")
    assert "owl2: the last question and its answer are taken back\nowl2: no answer yet\n" in result.stderr


def test_nothing_to_undo(run: RunCommand, bundle_a1: Path) -> None:
    result = run("chat", bundle_a1, stdin="/undo\n")
    assert (result.exit_code, result.stderr) == (1, "owl2: error: the conversation has no turn to undo\n")


def test_help_and_stats(run: RunCommand, bundle_a1: Path, prompt_length: Callable[[str], int]) -> None:
    result = run("chat", bundle_a1, *SHORT, stdin="/help\n/stats\nq\n/stats\n")
    for command in ("/image PATH", "/undo", "/reset", "/stats", "/help", "/quit"):
        assert f"{command} " in result.stderr
    assert "owl2: no answer yet\nprompt: " in result.stderr
    used = prompt_length("q") + 11
    assert f"context: {used} of 2048 positions" in result.stderr


def test_stats_option(run: RunCommand, bundle_a1: Path) -> None:
    result = run("chat", bundle_a1, *SHORT, "--stats", stdin="q\nq\n")
    assert len(re.findall(r"answer: 12 tokens \(length\)", result.stderr)) == 2


def test_debug_does_not_end_it(run: RunCommand, bundle_a1: Path) -> None:
    result = run("chat", bundle_a1, "--debug", *SHORT, stdin="/image missing.png\nq\n")
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stdout.count("\n") == 1


def test_interrupt_takes_the_question_back(bundle_a1: Path, image: Path) -> None:
    with started("chat", bundle_a1, *LONG, "--context", 1500) as process:
        write(process, f"/image {image}\nfirst\n")
        wait_for_output(process)
        process.send_signal(signal.SIGINT)
        # The line break after the broken-off answer needs room in the pipe.
        assert process.stdout is not None
        assert process.stdout.readline()
        written, errors = process.communicate("/stats\nq\n", timeout=60)
    assert process.returncode == 0
    expected = Owl2.load(bundle_a1, context=1500).chat().ask("q", [image], max_new_tokens=100000).text
    assert written.endswith(expected + "\n")
    stopped, stats, *_ = errors.splitlines()[1:]
    assert stopped == (
        "owl2: stopped; the conversation is as it was before this question; 1 image attached to the next question"
    )
    assert stats == "owl2: no answer yet"


def test_interrupt_before_the_first_token(
    run: RunCommand, bundle_a1: Path, owl: Owl2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a question is being tokenized and its images are prepared."""
    stream = Chat.stream
    interrupted: list[str] = []

    def interrupt_once(chat: Chat, question: str, *others: Any, **options: Any) -> AnswerStream:
        if not interrupted:
            interrupted.append(question)
            raise KeyboardInterrupt
        return stream(chat, question, *others, **options)

    monkeypatch.setattr(Chat, "stream", interrupt_once)
    result = run("chat", bundle_a1, *SHORT, stdin="first\nsecond\n")
    assert result.stderr == "owl2: stopped; the conversation is as it was before this question\n"
    assert result.stdout == owl.chat().ask("second", max_new_tokens=12).text + "\n"
    assert interrupted == ["first"]


def test_interrupt_while_reading_a_pipe_ends_it(bundle_a1: Path) -> None:
    with started("chat", bundle_a1, *SHORT) as process:
        write(process, "q\n")
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "owl2: stopped\n"
    assert process.returncode == 130


def test_interrupt_while_loading(run: RunCommand, bundle_a1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Owl2, "load", interrupt)
    result = run("chat", bundle_a1, stdin="q\n")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "owl2: stopped\n")


def test_in_a_terminal(bundle_a1: Path, owl: Owl2) -> None:
    answer = harmless_lines(owl.chat().ask("q", max_new_tokens=12).text)
    with terminal("chat", bundle_a1, *SHORT) as (process, read_until, type_in):
        assert "/help lists the commands" in read_until("> ")
        type_in("half a li")
        read_until("half a li")
        time.sleep(0.5)  # Python misses a signal that comes between two characters until the next one
        process.send_signal(signal.SIGINT)
        assert "owl2: /quit or Ctrl-D leaves" in read_until("> ")
        type_in("q\n")
        assert answer in read_until("\n> ").replace("\r", "")
        type_in("\x04")
        assert process.wait(60) == 0
