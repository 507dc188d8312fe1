"""``owl2 eval``: its help, its table, its JSON, Ctrl-C."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCommand
from evaluation_data import IMAGES, write_every_task, write_lines
from PIL import Image

from owl2.runtime.evaluation.measure import ItemResult, measure


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task, about the images of the sample."""
    return write_every_task(tmp_path_factory.mktemp("data") / "data.jsonl")


def test_help_teaches(run: RunCommand) -> None:
    text = run("eval", "--help").stdout
    assert "Examples:" in text
    assert '{"image": "a.jpg", "captions"' in text


def test_errors_are_lines_and_come_before_the_model(run: RunCommand, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": ""}\nno\n')
    result = run("eval", tmp_path / "no bundle", "--data", bad)
    assert result.exit_code == 1
    assert "nothing was measured; 2 problems:\n  line 1: " in result.stderr
    assert run("eval", "b", "--data", bad, "--items").exit_code == 1
    good = write_lines(tmp_path / "good.jsonl", {"text": "x"})
    assert "is neither a bundle" in run("eval", tmp_path / "no bundle", "--data", good, "--against", tmp_path).stderr
    assert "--items adds to the JSON" in run("eval", "b", "--data", bad, "--items").stderr
    assert "max_new_tokens 0 must be at least 1" in run("eval", "b", "--data", bad, "--max-new-tokens", 0).stderr
    assert run("eval", "b").exit_code == 2


def test_an_image_that_disappears_shows_the_results_so_far(
    run: RunCommand, bundle_a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record: dict[str, object] = {"question": "What?", "answers": ["red"], "category": "\x1b[31mred"}
    path = write_lines(tmp_path / "data.jsonl", record, record | {"image": "a.png"})

    def removing(*given: Any, **options: Any) -> Iterator[ItemResult]:
        for result in measure(*given, **options):
            (tmp_path / "a.png").unlink()
            yield result

    monkeypatch.setattr("owl2.runtime.evaluation.evaluate.measure", removing)
    result = run("eval", bundle_a1, "--data", path)
    assert result.exit_code == 1
    assert "\\x1b[31mred" in result.stdout
    assert "1 item in" in result.stdout
    assert re.fullmatch(
        r"owl2: error: line 2: cannot read .*a\.png: .*; the results are those of 1 of 2 items\n", result.stderr
    )


def test_results_are_reproducible(run: RunCommand, bundle_a1: Path, data: Path) -> None:
    results = [run("eval", bundle_a1, "--data", data, "--json", "--items", "--limit", 4) for _ in range(2)]
    first, second = (json.loads(result.stdout) for result in results)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["complete"]
    assert first["items"] == first["asked"] == len(first["predictions"]) == 4
    assert first["kv_cache"] == "fp32"
    assert first["against"] is None
    assert first["divergence"] is None


def test_table(run: RunCommand, sample_bundle: Path, sample_checkpoint: Path, data: Path) -> None:
    result = run("eval", sample_bundle, "--data", data, "--against", sample_checkpoint)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "short answers, several people" in result.stdout
    assert "answers changed" in result.stdout
    assert f"against {sample_checkpoint}\n" in result.stdout
    assert "KL (nats)" in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_shows_what_was_measured(sample_bundle: Path, tmp_path: Path, number: int, code: int) -> None:
    record: dict[str, object] = {
        "image": str(IMAGES / "scene1.png"),
        "question": "Describe the picture.",
        "answers": ["x"],
    }
    many = write_lines(tmp_path / "many.jsonl", *[record] * 5000)
    master, slave = pty.openpty()  # progress tells when the first items are done
    command = [sys.executable, "-m", "owl2.runtime", "eval", str(sample_bundle), "--data", str(many), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    seen, end = "", time.monotonic() + 60
    while " 3/5000" not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(master, 4096).decode()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    while True:
        try:
            seen += os.read(master, 4096).decode()
        except OSError:  # the other end is closed
            break
    os.close(master)
    assert process.returncode == code
    result = json.loads(output)
    assert not result["complete"]
    assert 3 <= result["items"] < 5000
    assert result["tasks"]["exact"]["items"] == result["items"]
    assert f"owl2: stopped after {result['items']} of 5000 items" in seen
    assert "Traceback" not in seen
