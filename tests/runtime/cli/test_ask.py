"""``owl2 ask``: what it writes, where, and with which exit code."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunCommand
from PIL import Image
from processes import COMMAND, LONG, started, wait_for_output

from owl2 import Owl2
from owl2.runtime.sampling import GenerationOptions

SHORT = ("--max-new-tokens", "12")


def test_writes_the_answer_of_the_library(run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path) -> None:
    result = run("ask", bundle_a1, "What is it?", "--image", image, *SHORT)
    expected = owl.chat().ask("What is it?", [image], max_new_tokens=12).text
    assert result.exit_code == 0
    assert result.stdout == expected + "\n"
    assert result.stderr == ""


def test_json(run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path) -> None:
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


def test_what_was_done_to_images_is_told(run: RunCommand, bundle_a1: Path, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGBA", (30, 20)).save(tmp_path / "a.png", exif=turned)
    command = ("ask", bundle_a1, "And now?", "--image", tmp_path / "a.png", *SHORT)
    result = run(*command, "--json", "--background", "#ff0000")
    told = "turned as its EXIF orientation 6 says, its transparency laid on #ff0000"
    assert result.stderr == f"owl2: {tmp_path / 'a.png'}: {told}\n"
    assert json.loads(result.stdout)["images"] == [
        {"stored": [30, 20], "shown": [20, 30], "orientation": 6, "transparent": True, "background": "#ff0000"}
    ]
    as_original = run(*command, "--stats", "--orientation", "stored", "--background", "none")
    assert "image: 30 x 20 pixels, its transparency dropped\n" in as_original.stderr
    assert as_original.stdout != run(*command).stdout
    wrong = run(*command, "--background", "whitish")
    assert (wrong.exit_code, wrong.stderr) == (
        1,
        "owl2: error: background 'whitish' is no colour; write white, #rrggbb or another name\n",
    )


@pytest.mark.parametrize("mode", ["resize", "pad", "crop"])
def test_preprocess(run: RunCommand, bundle_a1: Path, owl: Owl2, image: Path, mode: str) -> None:
    result = run("ask", bundle_a1, "What?", "--image", image, "--preprocess", mode, *SHORT)
    expected = owl.chat().ask("What?", [image], preprocess=mode, max_new_tokens=12).text
    assert result.stdout == expected + "\n"


def test_sampling_options(run: RunCommand, bundle_a1: Path, owl: Owl2) -> None:
    flags = ("--temperature", 1.5, "--top-k", 0, "--top-p", 0.9, "--seed", 3)
    result = run("ask", bundle_a1, "Tell me.", *SHORT, *flags)
    options: GenerationOptions = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 0, "top_p": 0.9, "seed": 3}
    assert result.stdout == owl.chat().ask("Tell me.", **options).text + "\n"
    assert result.stdout != owl.chat().ask("Tell me.", max_new_tokens=12).text + "\n"


def test_stop_texts(run: RunCommand, bundle_a1: Path, owl: Owl2) -> None:
    whole = owl.chat().ask("q", max_new_tokens=12).text
    result = run("ask", bundle_a1, "q", *SHORT, "--stop", "@@", "--stop", whole[3:5])
    assert result.stdout == whole[: whole.index(whole[3:5])] + "\n"


def test_question_from_stdin(run: RunCommand, bundle_a1: Path, owl: Owl2) -> None:
    result = run("ask", bundle_a1, "-", *SHORT, stdin="Two\nlines?\n")
    assert result.stdout == owl.chat().ask("Two\nlines?", max_new_tokens=12).text + "\n"


def test_stats_go_to_stderr(run: RunCommand, bundle_a1: Path, image: Path) -> None:
    plain = run("ask", bundle_a1, "q", "--image", image, *SHORT)
    result = run("ask", bundle_a1, "q", "--image", image, *SHORT, "--stats")
    assert result.stdout == plain.stdout
    assert re.search(r"prompt: \d+ tokens, 0 reused, \d+ new", result.stderr)
    assert "images encoded: 1" in result.stderr
    assert re.search(r"answer: 12 tokens \(length\), the first after .*s, then [\d.]+ tokens/s", result.stderr)


def test_full_context_is_told(run: RunCommand, bundle_a1: Path, prompt_length: Callable[[str], int]) -> None:
    prompt = prompt_length("q")
    result = run("ask", bundle_a1, "q", "--context", prompt + 5)
    assert result.exit_code == 0
    assert result.stderr == (
        f"owl2: the context of {prompt + 5} positions is full: {prompt} for the prompt, 5 for the answer, "
        "which is cut off\n"
    )


def test_verify_hashes_every_file_again(run: RunCommand, copy: Path, hashed: list[str]) -> None:
    first = run("ask", copy, "q", *SHORT)
    assert len(hashed) == len(list(copy.iterdir())) - 1
    hashed.clear()
    assert run("ask", copy, "q", *SHORT).stdout == first.stdout
    assert hashed == []
    assert run("ask", copy, "q", *SHORT, "--verify").stdout == first.stdout
    assert len(hashed) == len(list(copy.iterdir())) - 1


def test_text_that_the_terminal_cannot_encode(run: RunCommand, bundle_a1: Path) -> None:
    process = subprocess.run(
        [*COMMAND, "ask", bundle_a1, "q", "--max-new-tokens", "100"],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert process.returncode == 0
    assert b"?" in process.stdout
    assert process.stdout.isascii()


def test_reader_that_leaves_early(bundle_a1: Path) -> None:
    with started("ask", bundle_a1, "q", *LONG) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        wait_for_output(process)
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""


def test_interrupt(bundle_a1: Path) -> None:
    with started("ask", bundle_a1, "q", *LONG) as process:
        wait_for_output(process)
        process.send_signal(signal.SIGINT)
        written, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "owl2: stopped\n"
    assert written.endswith("\n")


def test_answers_that_follow_a_schema_a_list_or_an_expression(run: RunCommand, bundle_a1: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    assert run("ask", bundle_a1, "Sharp?", "--schema", tmp_path / "schema.json").stdout in ("true\n", "false\n")
    assert run("ask", bundle_a1, "Sharp?", "--choice", "yes", "--choice", "no").stdout in ("yes\n", "no\n")
    assert run("ask", bundle_a1, "Sharp?", "--regex", "[ab]c").stdout in ("ac\n", "bc\n")
    for bad in (("--schema", tmp_path / "missing"), ("--regex", "(("), ("--regex", "a", "--choice", "b")):
        result = run("ask", bundle_a1, "Sharp?", *bad)
        assert result.exit_code != 0
        assert "error: " in result.stderr.lower()
