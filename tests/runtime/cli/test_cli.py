"""The command ``owl2``: what it writes, where, and with which exit code."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from owl2 import GenerationConfig, Owl2, __version__
from owl2.runtime.__main__ import cli
from owl2.runtime.cli.console import UNSHOWN, duration, size
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.verification import hash_file

COMMAND = (sys.executable, "-m", "owl2.runtime")
SMALL_PIPE = 4096
SHORT = ("--max-new-tokens", "12")
LONG = ("--max-new-tokens", "100000")
"""Ends with the context; much more text than SMALL_PIPE holds."""


@pytest.fixture(scope="module")
def owl(bundle_a1: Path) -> Owl2:
    return Owl2.load(bundle_a1)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "two colours.png"
    drawn = Image.new("RGB", (60, 24), (220, 30, 30))
    drawn.paste((20, 40, 200), (30, 0, 60, 24))
    drawn.save(path)
    return path


@pytest.fixture
def copy(bundle_a1: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle_a1, tmp_path / "bundle"))


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], input=stdin, prog_name="owl2")


@contextmanager
def started(*args: object) -> Iterator[subprocess.Popen[str]]:
    """The command as a process whose stdout pipe soon is full: it then waits until somebody reads."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened for a minute"
        time.sleep(0.01)


def waiting_bytes(process: subprocess.Popen[str]) -> int:
    """Bytes the process has written to stdout and nobody has read."""
    count = fcntl.ioctl(process.stdout, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(count, sys.byteorder)


class TestAsk:
    def test_writes_the_answer_of_the_library(self, bundle_a1: Path, owl: Owl2, image: Path) -> None:
        result = run("ask", bundle_a1, "What is it?", "--image", image, *SHORT)
        expected = owl.chat().ask("What is it?", [image], max_new_tokens=12).text
        assert result.exit_code == 0
        assert result.stdout == expected + "\n"
        assert result.stderr == ""

    def test_json(self, bundle_a1: Path, owl: Owl2, image: Path) -> None:
        result = run("ask", bundle_a1, "And now?", "--image", image, "--image", image, "--json", *SHORT)
        answer = owl.chat().ask("And now?", [image, image], max_new_tokens=12)
        record = json.loads(result.stdout)
        assert record["text"] == answer.text
        assert record["finish_reason"] == answer.finish_reason
        assert record["prompt_tokens"] == answer.stats.prompt_tokens
        assert record["generated_tokens"] == answer.stats.generated_tokens
        assert record["images_encoded"] == 1
        assert record["reused_tokens"] == 0
        for name in ("vision", "prefill", "decode", "load"):
            assert record[f"{name}_seconds"] > 0
        assert record["time_to_first_token"] > record["prefill_seconds"]

    @pytest.mark.parametrize("mode", ["resize", "pad", "crop"])
    def test_preprocess(self, bundle_a1: Path, owl: Owl2, image: Path, mode: str) -> None:
        result = run("ask", bundle_a1, "What?", "--image", image, "--preprocess", mode, *SHORT)
        expected = owl.chat().ask("What?", [image], preprocess=mode, max_new_tokens=12).text
        assert result.stdout == expected + "\n"

    def test_sampling_options(self, bundle_a1: Path, owl: Owl2) -> None:
        result = run(
            "ask",
            bundle_a1,
            "Tell me.",
            *SHORT,
            "--temperature",
            1.5,
            "--top-k",
            0,
            "--top-p",
            0.9,
            "--seed",
            3,
        )
        options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 0, "top_p": 0.9, "seed": 3}
        assert result.stdout == owl.chat().ask("Tell me.", **options).text + "\n"
        assert result.stdout != owl.chat().ask("Tell me.", max_new_tokens=12).text + "\n"

    def test_stop_texts(self, bundle_a1: Path, owl: Owl2) -> None:
        whole = owl.chat().ask("q", max_new_tokens=12).text
        result = run("ask", bundle_a1, "q", *SHORT, "--stop", "@@", "--stop", whole[3:5])
        assert result.stdout == whole[: whole.index(whole[3:5])] + "\n"

    def test_question_from_stdin(self, bundle_a1: Path, owl: Owl2) -> None:
        result = run("ask", bundle_a1, "-", *SHORT, stdin="Two\nlines?\n")
        assert result.stdout == owl.chat().ask("Two\nlines?", max_new_tokens=12).text + "\n"

    def test_stats_go_to_stderr(self, bundle_a1: Path, image: Path) -> None:
        plain = run("ask", bundle_a1, "q", "--image", image, *SHORT)
        result = run("ask", bundle_a1, "q", "--image", image, *SHORT, "--stats")
        assert result.stdout == plain.stdout
        assert re.search(r"prompt: \d+ tokens, 0 reused, \d+ new", result.stderr)
        assert "images encoded: 1" in result.stderr
        assert re.search(r"answer: 12 tokens \(length\), the first after .*s, then [\d.]+ tokens/s", result.stderr)

    def test_full_context_is_told(self, bundle_a1: Path, owl: Owl2) -> None:
        prompt = _prompt_length(owl, "q")
        result = run("ask", bundle_a1, "q", "--context", prompt + 5)
        assert result.exit_code == 0
        assert result.stderr == (
            f"owl2: the context of {prompt + 5} positions is full: {prompt} for the prompt, 5 for the answer, "
            "which was cut here\n"
        )

    def test_defaults_are_those_of_the_library(self) -> None:
        for name, arguments in (("ask", ["bundle", "q"]), ("chat", ["bundle"])):
            given = cli.commands[name].make_context(name, arguments).params
            config = GenerationConfig()
            assert {field: given[field] for field in config.__slots__} == asdict(config)

    def test_text_that_the_terminal_cannot_encode(self, bundle_a1: Path) -> None:
        process = subprocess.run(
            [*COMMAND, "ask", bundle_a1, "q", "--max-new-tokens", "100"],
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert process.returncode == 0
        assert b"?" in process.stdout
        assert process.stdout.isascii()

    def test_reader_that_leaves_early(self, bundle_a1: Path) -> None:
        with started("ask", bundle_a1, "q", *LONG) as process:
            process.stdin.close()
            wait_for(lambda: waiting_bytes(process) > 100)
            process.stdout.close()
            assert process.wait(60) == 1
            assert process.stderr.read() == ""

    def test_interrupt(self, bundle_a1: Path) -> None:
        with started("ask", bundle_a1, "q", *LONG) as process:
            wait_for(lambda: waiting_bytes(process) > 100)
            process.send_signal(signal.SIGINT)
            written, errors = process.communicate(timeout=60)
            assert process.returncode == 130
            assert errors == "owl2: stopped\n"
            assert written.endswith("\n")


def _prompt_length(owl: Owl2, question: str) -> int:
    answer = owl.chat().ask(question, max_new_tokens=1)
    assert answer.text is not None
    return answer.stats.prompt_tokens


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("q", "--image", "missing.png"), "cannot read missing.png: No such file"),
            (("q", "--temperature", "-1"), "temperature -1.0 must be 0"),
            (("q", "--threads", "0"), "threads must be positive, got 0"),
            (("q", "--context", "100000"), "context 100000 exceeds the 2048 positions"),
            (("",), "the question is empty"),
            (("<|image|> what?",), "1 <|image|> placeholder, but 0 images"),
        ],
    )
    def test_one_line(self, bundle_a1: Path, args: Sequence[str], message: str) -> None:
        result = run("ask", bundle_a1, *args)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("owl2: error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize("command", [("ask", "q"), ("chat",), ("info",)])
    def test_no_bundle(self, tmp_path: Path, command: Sequence[str]) -> None:
        name, *rest = command
        result = run(name, tmp_path, *rest)
        assert result.exit_code == 1
        assert result.stderr == (
            f"owl2: error: {tmp_path} is no bundle: owl2.json is missing; expected a folder written by owl2-export\n"
        )

    def test_damaged_bundle(self, copy: Path) -> None:
        _flip_byte(copy / "decoder.onnx")
        result = run("ask", copy, "q")
        assert result.exit_code == 1
        assert "decoder.onnx was changed" in result.stderr

    def test_debug_shows_the_traceback(self, bundle_a1: Path) -> None:
        result = run("ask", bundle_a1, "q", "--image", "missing.png", "--debug")
        assert result.exit_code == 1
        assert result.stderr.startswith("Traceback (most recent call last)")
        assert "ImageError: cannot read missing.png" in result.stderr

    @pytest.mark.parametrize(
        "args",
        [
            ("ask", "bundle"),
            ("ask", "bundle", "q", "--device", "abacus"),
            ("ask", "bundle", "q", "--preprocess", "stretch"),
            ("ask", "bundle", "q", "--top-k", "few"),
            ("answer", "bundle"),
        ],
    )
    def test_wrong_usage(self, args: Sequence[str]) -> None:
        result = run(*args)
        assert result.exit_code == 2
        assert "Usage: owl2" in result.stderr

    @pytest.mark.parametrize("command", [(), ("ask",), ("chat",), ("info",)])
    def test_help_gives_examples(self, command: Sequence[str]) -> None:
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert re.search(rf"Examples:\n +owl2 {' '.join(command)}", result.stdout)

    def test_version(self) -> None:
        assert run("--version").stdout == f"owl2, version {__version__}\n"


class TestChat:
    def test_piped_questions(self, bundle_a1: Path, owl: Owl2, image: Path) -> None:
        result = run("chat", bundle_a1, *SHORT, stdin=f"/image {image}\nWhat?\n\n  And its colour? \n")
        chat = owl.chat()
        first = chat.ask("What?", [image], max_new_tokens=12).text
        second = chat.ask("And its colour?", max_new_tokens=12).text
        assert result.exit_code == 0
        assert result.stdout == f"{first}\n{second}\n"
        assert result.stderr == "owl2: 1 image waits for the next question\n"

    def test_several_images(self, bundle_a1: Path, owl: Owl2, image: Path) -> None:
        result = run("chat", bundle_a1, *SHORT, stdin=f"/image {image}\n/image {image}\nSame?\n")
        assert result.stdout == owl.chat().ask("Same?", [image, image], max_new_tokens=12).text + "\n"
        assert "2 images wait" in result.stderr

    @pytest.mark.parametrize("written", ["'{}'", '"{}"', "{}", "~/{name}", "'~/{name}'", "{escaped}"])
    def test_ways_to_write_a_path(
        self, bundle_a1: Path, image: Path, written: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(image.parent))
        escaped = str(image).replace(" ", "\\ ")
        path = written.format(image, name=image.name, escaped=escaped)
        result = run("chat", bundle_a1, stdin=f"/image {path}\n")
        assert result.exit_code == 0
        assert result.stderr == "owl2: 1 image waits for the next question\n"

    def test_reset_forgets_everything(self, bundle_a1: Path, owl: Owl2, image: Path) -> None:
        script = f"/image {image}\nFirst?\n/image {image}\n/reset\nSecond?\n"
        result = run("chat", bundle_a1, *SHORT, stdin=script)
        assert result.stdout.endswith("\n" + owl.chat().ask("Second?", max_new_tokens=12).text + "\n")
        assert "a new conversation; no image waits" in result.stderr

    def test_quit_leaves_at_once(self, bundle_a1: Path) -> None:
        result = run("chat", bundle_a1, stdin="/quit\nA question?\n")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/picture a.png", "there is no command /picture; /help lists them"),
            ("/image", "/image needs the path of an image"),
            ("/image ~/no such image.png", "cannot read /"),
            ("/image ~nobody-of-this-name/a.png", "cannot read ~nobody-of-this-name/a.png"),
            ("/image " + "x" * 5000, "File name too long"),
            ("<|image|> what?", "1 <|image|> placeholder, but 0 images"),
        ],
    )
    def test_failed_line_does_not_end_it(self, bundle_a1: Path, owl: Owl2, line: str, message: str) -> None:
        result = run("chat", bundle_a1, *SHORT, stdin=f"{line}\nq\n")
        assert result.stdout == owl.chat().ask("q", max_new_tokens=12).text + "\n"
        assert result.stderr.startswith("owl2: error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.exit_code == 1

    def test_full_context(self, bundle_a1: Path, owl: Owl2) -> None:
        prompt = _prompt_length(owl, "q")
        result = run("chat", bundle_a1, "--context", prompt + 5, stdin="q\nq\n/reset\nq\n")
        first, second = result.stdout.splitlines()
        assert first == second
        assert result.stderr.count(f"the context of {prompt + 5} positions is full") == 2
        assert f"error: the context holds {prompt + 5} positions" in result.stderr
        assert "/reset begins a new conversation" in result.stderr

    def test_help_and_stats(self, bundle_a1: Path, owl: Owl2) -> None:
        result = run("chat", bundle_a1, *SHORT, stdin="/help\n/stats\nq\n/stats\n")
        for command in ("/image PATH", "/reset", "/stats", "/help", "/quit"):
            assert f"{command} " in result.stderr
        assert "owl2: no answer yet\nprompt: " in result.stderr
        used = _prompt_length(owl, "q") + 11
        assert f"context: {used} of 2048 positions" in result.stderr

    def test_stats_option(self, bundle_a1: Path) -> None:
        result = run("chat", bundle_a1, *SHORT, "--stats", stdin="q\nq\n")
        assert len(re.findall(r"answer: 12 tokens \(length\)", result.stderr)) == 2

    def test_debug_does_not_end_it(self, bundle_a1: Path) -> None:
        result = run("chat", bundle_a1, "--debug", *SHORT, stdin="/image missing.png\nq\n")
        assert "Traceback (most recent call last)" in result.stderr
        assert result.stdout.count("\n") == 1

    def test_interrupt_takes_the_question_back(self, bundle_a1: Path, owl: Owl2, image: Path) -> None:
        with started("chat", bundle_a1, *LONG, "--context", 1500) as process:
            process.stdin.write(f"/image {image}\nfirst\n")
            process.stdin.flush()
            wait_for(lambda: waiting_bytes(process) > 100)
            process.send_signal(signal.SIGINT)
            # The line break after the broken-off answer needs room in the pipe.
            broken_off = process.stdout.readline()
            assert broken_off
            written, errors = process.communicate("/stats\nq\n", timeout=60)
        assert process.returncode == 0
        expected = Owl2.load(bundle_a1, context=1500).chat().ask("q", [image], max_new_tokens=100000).text
        assert written.endswith(expected + "\n")
        stopped, stats, *_ = errors.splitlines()[1:]
        assert stopped == (
            "owl2: stopped; the conversation is as it was before this question; 1 image waits for the next one"
        )
        assert stats == "owl2: no answer yet"

    def test_interrupt_while_reading_a_pipe_ends_it(self, bundle_a1: Path) -> None:
        with started("chat", bundle_a1, *SHORT) as process:
            process.stdin.write("q\n")
            process.stdin.flush()
            assert process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[1] == "owl2: stopped\n"
        assert process.returncode == 130

    def test_in_a_terminal(self, bundle_a1: Path, owl: Owl2) -> None:
        answer = owl.chat().ask("q", max_new_tokens=12).text.translate(UNSHOWN)
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


@contextmanager
def terminal(
    *args: object,
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str], Callable[[str], None]]]:
    """The command in a terminal of its own, with functions that read what it shows and that type."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb"},
        start_new_session=True,
    )
    os.close(theirs)

    def read_until(text: str) -> str:
        shown = ""
        while text not in shown.replace("\r", ""):
            assert select.select([ours], [], [], 60)[0], f"waited a minute for {text!r}, got {shown!r}"
            shown += os.read(ours, 1 << 16).decode()
        return shown

    try:
        yield process, read_until, lambda text: os.write(ours, text.encode()) and None
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class TestInfo:
    def test_table(self, bundle_a1: Path, owl: Owl2) -> None:
        result = run("info", bundle_a1)
        assert result.exit_code == 0
        decoder = owl.config.decoder
        for text in (
            "format       version 3, written by ",
            f"{decoder.num_hidden_layers} layers, width {decoder.hidden_size}",
            f"vocabulary {decoder.vocab_size}",
            "context     2048 positions",
            "mode resize, 7 positions each",
            "1.5 KiB per position, 3.0 MiB at full context",
            "decoder.onnx.data",
        ):
            assert text in result.stdout
        assert result.stdout.endswith(f"\n\nall {len(owl.manifest.files)} files verified\n")

    def test_json(self, bundle_a1: Path, owl: Owl2) -> None:
        record = json.loads(run("info", bundle_a1, "--json").stdout)
        assert record["manifest"] == json.loads((bundle_a1 / "owl2.json").read_text())
        assert record["verified"] is True
        assert record["problems"] == []
        assert record["size"] == sum((bundle_a1 / name).stat().st_size for name in owl.manifest.files)
        assert record["kv_bytes_full_context"] == 2048 * record["kv_bytes_per_position"]

    def test_size_of_the_cache_is_what_a_chat_takes(self, bundle_a1: Path, owl: Owl2) -> None:
        record = json.loads(run("info", bundle_a1, "--json").stdout)
        chat = owl.chat()
        assert chat.ask("q", max_new_tokens=2).ids == []
        _ = chat.messages
        assert chat._cache.nbytes == GROWTH * record["kv_bytes_per_position"]

    def test_damage_is_told_beside_the_manifest(self, copy: Path) -> None:
        _flip_byte(copy / "vision.onnx.data")
        (copy / "tokenizer.model").unlink()
        result = run("info", copy)
        assert result.exit_code == 1
        assert "context     2048 positions" in result.stdout
        assert "2 problems:\n  " in result.stdout
        assert "  vision.onnx.data was changed (its sha256 differs)\n" in result.stdout
        assert "  tokenizer.model is missing\n" in result.stdout
        assert "verified" not in result.stdout
        assert result.stderr == f"owl2: error: {copy}: 2 problems found\n"

    def test_damage_in_json(self, copy: Path) -> None:
        _flip_byte(copy / "vision.onnx.data")
        result = run("info", copy, "--json")
        record = json.loads(result.stdout)
        assert result.exit_code == 1
        assert record["verified"] is False
        assert record["problems"] == ["vision.onnx.data was changed (its sha256 differs)"]

    def test_too_old_an_onnxruntime_is_a_problem(self, copy: Path) -> None:
        _edit_manifest(copy, minimum_onnxruntime="99.1")
        result = run("info", copy)
        assert result.exit_code == 1
        assert "1 problem:\n  this bundle needs onnxruntime 99.1 or newer" in result.stdout

    def test_without_onnxruntime_all_else_is_shown(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        result = run("info", copy)
        assert result.exit_code == 1
        assert "or newer needed, none installed\n" in result.stdout
        assert "per position" in result.stdout
        assert "1 problem:\n  the files of onnxruntime are not complete" in result.stdout
        record = json.loads(run("info", copy, "--json").stdout)
        assert record["installed_onnxruntime"] is None
        assert not any(cache["usable"] for cache in record["kv_cache"].values())

    def test_weights(self, copy: Path) -> None:
        weights = {"decoder": "int4", "head": "int8", "vision": "fp16", "embeddings": "fp16"}
        _edit_manifest(copy, weights=weights | {"method": "gptq", "group_size": 32})
        table = run("info", copy).stdout
        assert "  decoder     int4 (gptq, groups of 32)\n  head        int8\n  vision      fp16\n" in table

    def test_accuracy_of_the_report(self, copy: Path) -> None:
        report = {"accuracy": {"perplexity": 5.123456, "agreement": "997 of 1000", "layers": [1, 2]}}
        _replace(copy, "report.json", json.dumps(report))
        table = run("info", copy).stdout
        assert "accuracy\n  perplexity  5.123\n  agreement   997 of 1000\n\nfiles" in table
        assert json.loads(run("info", copy, "--json").stdout)["accuracy"] == {
            "perplexity": 5.123456,
            "agreement": "997 of 1000",
        }

    def test_certificate(self, sample_bundle: Path) -> None:
        report = json.loads((sample_bundle / "report.json").read_text())
        table = run("info", sample_bundle).stdout
        assert "\ncalibration\n  source       built-in\n  samples      84\n" in table
        assert f"  fingerprint  {report['calibration']['fingerprint']}\n\ncertificate\n  text          KL " in table
        assert f"at most {report['goldens'][2]['limit']:.4g} on a device\n\nfiles" in table
        record = json.loads(run("info", sample_bundle, "--json").stdout)
        assert record["goldens"] == report["goldens"]
        assert record["calibration"]["text_rows"] == report["calibration"]["text_rows"]

    @pytest.mark.parametrize(
        "content", ["{}", "[]", '{"accuracy": null, "calibration": 3, "goldens": 4}', '{"goldens": [5]}', "no JSON"]
    )
    def test_report_without_accuracy(self, copy: Path, content: str) -> None:
        _replace(copy, "report.json", content)
        result = run("info", copy)
        assert result.exit_code == 0
        assert "\naccuracy\n" not in result.stdout


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit_manifest(bundle: Path, **changes: object) -> None:
    path = bundle / "owl2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _replace(bundle: Path, name: str, content: str) -> None:
    """Write a file of a bundle, and its size and hash into the manifest."""
    path = bundle / name
    path.write_text(content)
    files = json.loads((bundle / "owl2.json").read_text())["files"]
    entry = {"size": path.stat().st_size, "sha256": hash_file(path)}
    _edit_manifest(bundle, files=files | {name: entry})


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
    assert "a\x1b[2J\r\x9b\x7f\nb\tü".translate(UNSHOWN) == "a�[2J���\nb\tü"
