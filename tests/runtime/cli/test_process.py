"""Streams that are closed, full, broken or in another encoding, signals, and faults of the program itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunCommand
from processes import COMMAND, LONG, hear_ctrl_c, started, wait_for_output, write

from owl2 import Owl2

SHORT = ("--max-new-tokens", "5")
NO_READER = "owl2: error: cannot use stdout: Bad file descriptor\n"
DISK_FULL = "owl2: error: cannot use stdout: No space left on device\n"


def shell(redirection: str, *args: object, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Run the command with a redirection of the shell."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *map(str, args)]
    return subprocess.run(
        command,
        capture_output=True,
        check=False,
        timeout=60,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("redirection", "args", "message"),
    [
        (">&-", ("ask", "BUNDLE", "q", *SHORT), NO_READER),
        (">&-", ("ask", "BUNDLE", "q", "--json", *SHORT), NO_READER),
        ("> /dev/full", ("ask", "BUNDLE", "q", *SHORT), DISK_FULL),
        ("> /dev/full", ("info", "BUNDLE"), DISK_FULL),
        ("> /dev/full", ("plan", "--list", "--json"), DISK_FULL),
        ("> /dev/full", ("ask", "--help"), "owl2: error: No space left on device\n"),
        (">&- 2>&-", ("ask", "BUNDLE", "q", *SHORT), ""),
        ("> /dev/full 2>&1", ("info", "BUNDLE"), ""),
        ("<&- >&- 2>&-", ("info", "BUNDLE"), ""),
    ],
)
def test_output_that_cannot_be_written(bundle_a1: Path, redirection: str, args: tuple[str, ...], message: str) -> None:
    told = shell(redirection, *[bundle_a1 if arg == "BUNDLE" else arg for arg in args])
    assert (told.returncode, told.stdout, told.stderr.decode()) == (1, b"", message)


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", "<&-"])
def test_streams_that_an_answer_does_not_need(bundle_a1: Path, owl: Owl2, redirection: str) -> None:
    told = shell(redirection, "ask", bundle_a1, "q", *SHORT, "--stats")
    assert told.returncode == 0
    assert told.stdout.decode() == owl.chat().ask("q", max_new_tokens=5).text + "\n"


@pytest.mark.parametrize("args", [("ask", "BUNDLE", "-"), ("chat", "BUNDLE")])
def test_no_stdin(bundle_a1: Path, args: tuple[str, ...]) -> None:
    told = shell("<&-", *[bundle_a1 if arg == "BUNDLE" else arg for arg in args])
    assert told.returncode == 1
    assert told.stderr.decode().startswith("owl2: error: cannot read stdin: Bad file descriptor; ")
    assert told.stderr.count(b"\n") == 1


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Messages that a library writes to stderr would go into it."""
    script = (
        "from owl2.runtime.cli.process import run\n"
        "def load():\n"
        f"    with open({str(tmp_path / 'file')!r}, 'w') as file: file.write(str(file.fileno()))\n"
        "    raise SystemExit(7)\n"
        "run(load, 'owl2')\n"
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script]
    assert subprocess.run(command, check=False, timeout=60).returncode == 7
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize("args", [("--help",), ("plan", "--list"), ("info", "BUNDLE"), ("verify", "--nope")])
def test_a_reader_that_has_left(bundle_a1: Path, args: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, *[str(bundle_a1) if arg == "BUNDLE" else arg for arg in args]]
    told = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writing)
    if args[-1] == "--nope":
        assert told.returncode == 2
    else:
        assert (told.returncode, told.stderr) == (141, b"")


@pytest.mark.parametrize("args", [("--help",), ("eval", "--help"), ("info", "b\N{SNOWMAN}"), ("ask", "BUNDLE", "-")])
def test_an_encoding_that_lacks_characters(bundle_a1: Path, args: tuple[str, ...]) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = shell("", *[bundle_a1 if arg == "BUNDLE" else arg for arg in args], **ascii_only)
    assert b"Traceback" not in told.stderr
    assert told.returncode == (0 if "--help" in args else 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
class TestSignals:
    def test_while_answering(self, bundle_a1: Path, number: int, code: int) -> None:
        with started("ask", bundle_a1, "q", *LONG) as process:
            wait_for_output(process)
            process.send_signal(number)
            process.send_signal(number)  # as closed terminals do
            written, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (code, "owl2: stopped\n")
        assert written.endswith("\n")

    def test_end_a_conversation_too(self, bundle_a1: Path, number: int, code: int) -> None:
        with started("chat", bundle_a1, *LONG) as process:
            write(process, "first\nsecond\n")
            wait_for_output(process)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (code, "owl2: stopped\n")

    def test_while_importing(self, number: int, code: int) -> None:
        with importing() as process:
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (code, "owl2: stopped\n")

    def test_ignored_ones_stay_ignored(self, number: int, code: int) -> None:
        """As nohup asks for."""
        with importing(lambda: signal.signal(number, signal.SIG_IGN)) as process:
            process.send_signal(number)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "owl2: stopped\n")


def importing(before: object = None) -> "subprocess.Popen[str]":
    """A command that is being imported."""
    script = (
        "import time\n"
        "from owl2.runtime.cli.process import run\n"
        "def load():\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(60)\n"
        "run(load, 'owl2')\n"
    )

    def prepare() -> None:
        hear_ctrl_c()
        if callable(before):
            before()

    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,  # noqa: PLW1509 - no threads here
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    return process


class TestFaultsOfTheProgram:
    @pytest.fixture(autouse=True)
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError("by \x1b[31mnothing")

        monkeypatch.setattr(Owl2, "load", fail)

    def test_one_line(self, run: RunCommand, bundle_a1: Path) -> None:
        told = run("ask", bundle_a1, "q")
        assert told.exit_code == 70
        assert told.stderr == (
            "owl2: internal error: ZeroDivisionError: by \\x1b[31mnothing; run again with --debug, and report what it "
            "shows\n"
        )

    def test_debug(self, run: RunCommand, bundle_a1: Path) -> None:
        told = run("ask", bundle_a1, "q", "--debug")
        assert told.exit_code == 70
        assert told.stderr.startswith("Traceback (most recent call last)")
        assert "\x1b" not in told.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_folder_that_may_not_be_read(bundle_a1: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    script = (
        "import os, sys\n"
        "from owl2.runtime.__main__ import main\n"
        "import owl2.runtime.cli.commands\n"
        f"sys.argv = ['owl2', 'info', {str(secret / 'bundle')!r}]\n"
        "os.setuid(65534)\n"
        "main()\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert told.returncode == 1
    assert "Permission denied" in told.stderr
    assert told.stderr.count("\n") == 1
