"""``owl2 info``: what it shows of a bundle, and how it tells damage."""

import json
import sys
from pathlib import Path

import pytest
from conftest import RunCommand, edit_manifest, flip_byte

from owl2 import Owl2
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.verification import hash_file


def replace_file(bundle: Path, name: str, content: str) -> None:
    """Write a file of a bundle, and its size and hash into the manifest."""
    path = bundle / name
    path.write_text(content)
    files = json.loads((bundle / "owl2.json").read_text())["files"]
    entry = {"size": path.stat().st_size, "sha256": hash_file(path)}
    edit_manifest(bundle, files=files | {name: entry})


def test_table(run: RunCommand, bundle_a1: Path, owl: Owl2) -> None:
    result = run("info", bundle_a1)
    assert result.exit_code == 0
    decoder = owl.config.decoder
    for text in (
        "format       version 6, written by ",
        f"{decoder.num_hidden_layers} layers, width {decoder.hidden_size}",
        f"vocabulary {decoder.vocab_size}",
        "context     2048 positions",
        "mode resize, 7 positions each",
        "1.5 KiB per position, 3.0 MiB at full context",
        "decoder.onnx.data",
    ):
        assert text in result.stdout
    assert result.stdout.endswith(f"\n\nall {len(owl.manifest.files)} files verified\n")


def test_json(run: RunCommand, bundle_a1: Path, owl: Owl2) -> None:
    record = json.loads(run("info", bundle_a1, "--json").stdout)
    written = json.loads((bundle_a1 / "owl2.json").read_text())
    assert record["manifest"] | {"digest": record["digest"]} == written
    assert record["usable"] is True
    assert record["problems"] == []
    assert record["size"] == sum((bundle_a1 / name).stat().st_size for name in owl.manifest.files)
    assert record["kv_bytes_full_context"] == 2048 * record["kv_bytes_per_position"]


def test_size_of_the_cache_is_what_a_chat_takes(run: RunCommand, bundle_a1: Path, owl: Owl2) -> None:
    record = json.loads(run("info", bundle_a1, "--json").stdout)
    stats = owl.chat().ask("q", max_new_tokens=2).stats
    assert stats.kv_cache_positions == GROWTH
    assert stats.kv_cache_memory == GROWTH * record["kv_bytes_per_position"]


def test_files_are_hashed_once_or_by_force(run: RunCommand, copy: Path, hashed: list[str]) -> None:
    for flags, count in ((), 11), ((), 0), (("--verify",), 11):
        hashed.clear()
        result = run("info", copy, *flags)
        assert result.exit_code == 0
        assert "all 11 files verified" in result.stdout
        assert len(hashed) == count


def test_damage_is_told_after_the_manifest(run: RunCommand, copy: Path) -> None:
    flip_byte(copy / "vision.onnx.data")
    (copy / "tokenizer.model").unlink()
    result = run("info", copy)
    assert result.exit_code == 1
    assert "context     2048 positions" in result.stdout
    assert "2 problems:\n  " in result.stdout
    assert "  vision.onnx.data was changed (its sha256 differs)\n" in result.stdout
    assert "  tokenizer.model is missing\n" in result.stdout
    assert "verified" not in result.stdout
    assert result.stderr == f"owl2: error: {copy}: 2 problems found\n"


def test_damage_in_json(run: RunCommand, copy: Path) -> None:
    flip_byte(copy / "vision.onnx.data")
    result = run("info", copy, "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 1
    assert record["usable"] is False
    assert record["problems"] == ["vision.onnx.data was changed (its sha256 differs)"]


def test_too_old_an_onnxruntime_is_a_problem(run: RunCommand, copy: Path) -> None:
    edit_manifest(copy, minimum_onnxruntime="99.1")
    result = run("info", copy)
    assert result.exit_code == 1
    assert "1 problem:\n  this bundle needs onnxruntime 99.1 or newer" in result.stdout


def test_without_onnxruntime_all_else_is_shown(run: RunCommand, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("info", copy)
    assert result.exit_code == 1
    assert "or newer needed, none installed\n" in result.stdout
    assert "per position" in result.stdout
    assert "1 problem:\n  the files of onnxruntime are not complete" in result.stdout
    record = json.loads(run("info", copy, "--json").stdout)
    assert record["onnxruntime"] is None
    assert not any(cache["usable"] for cache in record["kv_cache"].values())


def test_weights(run: RunCommand, copy: Path) -> None:
    weights = {"decoder": "int4", "head": "int8", "vision": "fp16", "embeddings": "fp16"}
    edit_manifest(copy, weights=weights | {"method": "gptq", "group_size": 32})
    table = run("info", copy).stdout
    assert "  decoder     int4 (gptq, groups of 32)\n  head        int8\n  vision      fp16\n" in table


def test_accuracy_of_the_report(run: RunCommand, copy: Path) -> None:
    report = {"accuracy": {"perplexity": 5.123456, "agreement": "997 of 1000", "layers": [1, 2]}}
    replace_file(copy, "report.json", json.dumps(report))
    table = run("info", copy).stdout
    assert "accuracy\n  perplexity  5.123\n  agreement   997 of 1000\n\nfiles" in table
    assert json.loads(run("info", copy, "--json").stdout)["accuracy"] == {
        "perplexity": 5.123456,
        "agreement": "997 of 1000",
    }


def test_golden_prompts(run: RunCommand, sample_bundle: Path) -> None:
    report = json.loads((sample_bundle / "report.json").read_text())
    table = run("info", sample_bundle).stdout
    assert "\ncalibration\n  source       built-in\n  samples      84\n" in table
    assert f"  fingerprint  {report['calibration']['fingerprint']}\n\ngolden prompts\n  text          KL " in table
    assert f"at most {report['goldens'][2]['limit']:.4g} on a device\n\nfiles" in table
    record = json.loads(run("info", sample_bundle, "--json").stdout)
    assert record["goldens"] == report["goldens"]
    assert record["calibration"]["text_rows"] == report["calibration"]["text_rows"]


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"accuracy": null, "calibration": 3, "goldens": 4}', '{"goldens": [5]}', "no JSON"]
)
def test_report_without_accuracy(run: RunCommand, copy: Path, content: str) -> None:
    replace_file(copy, "report.json", content)
    result = run("info", copy)
    assert result.exit_code == 0
    assert "\naccuracy\n" not in result.stdout
