"""Text on stdin: UTF-8 with or without a byte order mark, or refused by name."""

import subprocess
from pathlib import Path

import pytest
from processes import COMMAND

from owl2 import Owl2

SHORT = ("--max-new-tokens", "5")


def given(stdin: bytes, *args: object) -> "subprocess.CompletedProcess[bytes]":
    """The command with these bytes on stdin."""
    command = [*COMMAND, *map(str, args), *SHORT]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("stdin", "question"),
    [
        (b"\xef\xbb\xbfWhat is it?\n", "What is it?"),
        (b"Two\r\nlines?\r\n", "Two\nlines?"),
        ("Wo ist der Bär?".encode(), "Wo ist der Bär?"),
    ],
)
def test_a_question(bundle_a1: Path, owl: Owl2, stdin: bytes, question: str) -> None:
    told = given(stdin, "ask", bundle_a1, "-")
    assert (told.returncode, told.stderr) == (0, b"")
    assert told.stdout.decode() == owl.chat().ask(question, max_new_tokens=5).text + "\n"


def test_a_conversation(bundle_a1: Path, owl: Owl2) -> None:
    told = given("\ufeffWhat is it?\r\nWo ist der Bär?\rq".encode(), "chat", bundle_a1)
    chat = owl.chat()
    questions = ("What is it?", "Wo ist der Bär?", "q")
    assert told.stdout.decode() == "".join(chat.ask(asked, max_new_tokens=5).text + "\n" for asked in questions)
    assert (told.returncode, told.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("stdin", "reason"),
    [
        ("What?\n".encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ("What?\n".encode("utf-32"), "it is UTF-32 text; save it as UTF-8"),
        (
            "What?\n".encode("utf-16-be"),
            "it has a byte 0 in line 1, as UTF-16 text and binary files have; save it as UTF-8 text",
        ),
        ("What?\nWo ist der Bär?\n".encode("latin-1"), "it is not UTF-8 text: byte 0xe4 in line 2; save it as UTF-8"),
        (b"x" * (16 << 20) + b"y", "it has more than 16 MiB"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_what_is_no_text_is_refused(bundle_a1: Path, command: str, stdin: bytes, reason: str) -> None:
    told = given(stdin, command, bundle_a1, *(["-"] if command == "ask" else []))
    assert told.returncode == 1
    assert told.stderr.decode().startswith(f"owl2: error: cannot read stdin: {reason}; ")
    assert told.stderr.count(b"\n") == 1
