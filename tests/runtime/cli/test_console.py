"""Errors as one line, figures for people, and progress on a terminal."""

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import RunCommand, flip_byte

from owl2.runtime.cli import console
from owl2.runtime.cli.console import duration, load_progress, notice, say, say_json, size
from owl2.runtime.evaluation.conversations import LISTED_PROBLEMS, PROBLEM_CHARACTERS
from owl2.runtime.harmless import harmless_lines
from owl2.runtime.verification import LoadProgress


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("q", "--image", "missing.png"), "cannot read missing.png: it is missing"),
            (("q", "--temperature", "-1"), "temperature -1.0 must be 0"),
            (("q", "--threads", "0"), "threads must be positive, got 0"),
            (("q", "--context", "100000"), "context 100000 exceeds the 2048 positions"),
            (("",), "the question is empty"),
            (("<|image|> what?",), "1 <|image|> placeholder, but 0 images"),
        ],
    )
    def test_one_line(self, run: RunCommand, bundle_a1: Path, args: Sequence[str], message: str) -> None:
        result = run("ask", bundle_a1, *args)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("owl2: error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize("command", [("ask", "q"), ("chat",), ("info",), ("plan",)])
    def test_no_bundle(self, run: RunCommand, tmp_path: Path, command: Sequence[str]) -> None:
        name, *rest = command
        result = run(name, tmp_path, *rest)
        assert result.exit_code == 1
        assert result.stderr == (
            f"owl2: error: {tmp_path} is not a bundle: owl2.json is missing; give a folder written by owl2-export\n"
        )

    def test_damaged_bundle(self, run: RunCommand, copy: Path) -> None:
        flip_byte(copy / "decoder.onnx")
        result = run("ask", copy, "q")
        assert result.exit_code == 1
        assert "decoder.onnx was changed" in result.stderr

    def test_debug_shows_the_traceback(self, run: RunCommand, bundle_a1: Path) -> None:
        result = run("ask", bundle_a1, "q", "--image", "missing.png", "--debug")
        assert result.exit_code == 1
        assert result.stderr.startswith("Traceback (most recent call last)")
        assert "ImageError: cannot read missing.png" in result.stderr


class TestForeignText:
    """Names and values that somebody else wrote do nothing to a terminal, and forge no line."""

    HOSTILE = "no\x1b[31m\x07\u202e\nowl2: error: all is lost"
    SHOWN = r"no\x1b[31m\x07\u202e\nowl2: error: all is lost"

    def test_in_an_error(self, run: RunCommand) -> None:
        told = run("info", self.HOSTILE)
        assert told.stderr == f"owl2: error: {self.SHOWN} does not exist; give a folder written by owl2-export\n"

    def test_in_a_traceback(self, run: RunCommand) -> None:
        assert "\x1b" not in run("info", self.HOSTILE, "--debug").stderr

    def test_lists_keep_their_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        notice("two problems:\n  one\n  two\nthree")
        assert capsys.readouterr().err == "owl2: two problems:\n  one\n  two\\nthree\n"

    def test_a_long_message_keeps_its_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        notice(f"{'x' * 100000} is too long; shorten it")
        told = capsys.readouterr().err
        assert told.endswith("x is too long; shorten it\n")
        assert len(told) < 5000

    def test_a_long_list_is_told_whole_but_for_the_middle_of_its_lines(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        problems = [f"line {number}: {'x' * PROBLEM_CHARACTERS}" for number in range(LISTED_PROBLEMS)]
        notice("\n  ".join(["100 problems:", *problems, "y" * 5000 + "; shorten it"]))
        first, *told, last = capsys.readouterr().err.splitlines()
        assert first == "owl2: 100 problems:"
        assert told == [f"  {problem}" for problem in problems]
        assert len(last) < 2000
        assert last.endswith("y; shorten it")

    def test_in_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        record = {"name": "\udcff\x1b\x7f\N{OWL}é", "list": [1, None, "\\udcff"]}
        say_json(record)
        written = capsys.readouterr().out
        assert re.fullmatch(r"[\n -~]*", written)
        assert json.loads(written) == record | {"name": "\ufffd\x1b\x7f\N{OWL}é"}

    def test_on_stdout(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        say("a\x1b[2J\r")
        assert capsys.readouterr().out == "a\x1b[2J\r\n"
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        say("a\x1b[2J\r")
        assert screen.getvalue() == "a\\x1b[2J\\r\n"


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


class TestLoadProgress:
    @pytest.fixture
    def slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hashing always takes more than a moment."""
        monkeypatch.setattr(console, "PROGRESS_DELAY", 0)

    def shown(self, monkeypatch: pytest.MonkeyPatch, *reports: LoadProgress | type[BaseException]) -> str:
        """Output on a terminal of a load that reports this, or ends with that."""
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        with load_progress() as progress:
            assert progress is not None
            for report in reports:
                if isinstance(report, type):
                    raise report
                progress(report)
            screen.write("next line")
        return screen.getvalue()

    def test_a_bar_while_files_are_hashed(self, slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
        hashing = [LoadProgress("verifying", done << 20, 4 << 20) for done in (1, 3, 4)]
        text = self.shown(monkeypatch, *hashing, LoadProgress("loading", 0, 1))
        assert re.search(r"verifying 4\.0 MiB .* 25%.* 75%.* 100%[^\n]*\nnext line$", text, re.DOTALL)

    def test_an_interrupted_one_gives_the_line_back(self, slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(KeyboardInterrupt):
            self.shown(monkeypatch, LoadProgress("verifying", 1, 4), KeyboardInterrupt)
        assert isinstance(sys.stderr, Screen)
        assert sys.stderr.getvalue().endswith("\n")

    def test_nothing_if_it_takes_but_a_moment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reports = (LoadProgress("verifying", 1, 4), LoadProgress("verifying", 4, 4), LoadProgress("loading", 0, 1))
        assert self.shown(monkeypatch, *reports) == "next line"

    def test_nothing_on_a_pipe(self, slow: None, run: RunCommand, bundle_a1: Path) -> None:
        with load_progress() as progress:
            assert progress is None
        for command in (("info",), ("ask", "q", "--max-new-tokens", 1)):
            name, *rest = command
            assert run(name, bundle_a1, *rest, "--verify").stderr == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3072.0 GiB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0071, "7 ms"), (1, "1.0 s"), (75.26, "75.3 s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert harmless_lines("a\x1b[2J\r\x9b\x7f\nb\tü\u202ec") == "a\\x1b[2J\\r\\x9b\\x7f\nb\tü\\u202ec"
