"""``owl2 verify``: its table, its JSON, its exit code."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import RunCommand, flip_byte, rehash
from isolation import BLOCKED

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle
from owl2.runtime.evaluation.goldens import read_goldens, write_goldens

NAMES = ["text", "one picture", "two pictures"]


def test_json(run: RunCommand, bundle_a1: Path) -> None:
    result = run("verify", bundle_a1, "--json", "--threads", 1)
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["passed"]
    assert record["problems"] == []
    assert record["replay_seconds"] > 0
    assert [replay["name"] for replay in record["goldens"]] == NAMES
    assert all(replay["passed"] for replay in record["goldens"])


def test_table(run: RunCommand, bundle_a1: Path) -> None:
    result = run("verify", bundle_a1)
    assert result.exit_code == 0
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:4]] == NAMES
    assert result.stdout.endswith("\npass\n")
    assert "all files verified; loaded in " in result.stdout


def test_a_changed_file_is_named(run: RunCommand, copy: Path) -> None:
    flip_byte(copy / "decoder.onnx.data")
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "decoder.onnx.data was changed (its sha256 differs)" in result.stdout
    assert result.stdout.endswith("\nFAIL\n")
    record = json.loads(run("verify", copy, "--json").stdout)
    assert not record["passed"]
    assert record["goldens"] == []


def test_a_golden_that_was_not_compared_has_no_divergence(run: RunCommand, copy: Path) -> None:
    found, facts = read_goldens(Bundle.open(copy))
    assert facts is not None
    goldens = list(found)
    goldens[0] = dataclasses.replace(goldens[0], ids=goldens[0].ids[::-1].copy())
    write_goldens(copy / spec.GOLDENS, goldens, facts)
    rehash(copy, spec.GOLDENS)
    result = run("verify", copy)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1].split() == ["text", "FAIL"]
    assert "\ntext: the tokenizer splits the prompt differently" in result.stdout
    assert result.stdout.endswith("\nFAIL\n")
    assert json.loads(run("verify", copy, "--json").stdout)["goldens"][0]["kl"] is None


def test_without_torch(bundle_a1: Path) -> None:
    script = BLOCKED + (
        "from owl2.runtime.__main__ import main\n"
        f"sys.argv = ['owl2', 'verify', {str(bundle_a1)!r}]\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'onnx'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.sep, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\npass\n")


def test_not_a_bundle(run: RunCommand, tmp_path: Path) -> None:
    result = run("verify", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("owl2: error: ")
