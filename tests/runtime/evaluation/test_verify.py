"""Verifying a bundle: an intact one passes on this machine, and wrong weights fail whatever the hashes say."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import NEEDS_NATIVE, RunCommand, edit_manifest, flip_byte, rehash

from owl2 import LoadProgress, Owl2, verify
from owl2.runtime import spec
from owl2.runtime.bundle import Bundle, read_manifest
from owl2.runtime.evaluation.goldens import Facts, golden_positions, read_goldens, write_goldens
from owl2.runtime.evaluation.verify import run_golden, stepwise_logits
from owl2.runtime.families.mplug_owl2.positions import embed


@pytest.mark.parametrize("name", ["sample_bundle", "bundle_a1", "bundle_a2"])
def test_a_fresh_bundle_passes(name: str, request: pytest.FixtureRequest) -> None:
    stages: list[LoadProgress] = []
    folder = str(request.getfixturevalue(name))
    verdict = verify(folder, threads=1, backend="onnxruntime", progress=stages.append)
    assert verdict.passed
    assert [stages[0].stage, stages[-1].stage] == ["verifying", "loading"]
    for replay in verdict.replays:
        # The exporting machine is this one.
        assert replay.kl == pytest.approx(replay.exported_kl, rel=1e-2, abs=1e-9)


@NEEDS_NATIVE
@pytest.mark.parametrize("name", ["bundle_a1", "bundle_a2"])
def test_float_bundles_agree_on_the_native_core(name: str, request: pytest.FixtureRequest) -> None:
    verdict = verify(request.getfixturevalue(name), backend="native")
    assert verdict.passed
    assert max(replay.kl for replay in verdict.replays) < 1e-9


def test_every_file_is_hashed_although_it_was_verified_before(sample_bundle: Path, hashed: list[str]) -> None:
    Bundle.open(sample_bundle)
    hashed.clear()
    assert verify(sample_bundle).passed
    assert set(hashed) == set(Bundle.open(sample_bundle).manifest.files)


@pytest.mark.parametrize("file", ["decoder.onnx.data", "vision.onnx.data", "embeddings.bin"])
def test_wrong_weights_fail_though_the_hashes_are_right(sample_bundle: Path, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(sample_bundle, tmp_path / "bundle"))
    path = copy / file
    content = bytearray(path.read_bytes())
    start = len(content) // 3
    region = slice(start, start + len(content) // 8)
    content[region] = content[region][::-1]
    path.write_bytes(content)
    rehash(copy, file)
    Bundle.open(copy)  # the hashes say that everything is well
    verdict = verify(copy)
    assert not verdict.passed
    assert not verdict.problems
    assert verdict.replays


def test_a_changed_file_fails_before_anything_runs(copy: Path) -> None:
    flip_byte(copy / "decoder.onnx.data")
    verdict = verify(copy)
    assert not verdict.passed
    assert verdict.problems == ("decoder.onnx.data was changed (its sha256 differs)",)
    assert verdict.replays == ()


def test_another_tokenizer_is_named(copy: Path) -> None:
    found, facts = read_goldens(Bundle.open(copy))
    assert facts is not None
    goldens = list(found)
    goldens[0] = dataclasses.replace(goldens[0], ids=goldens[0].ids[::-1].copy())
    write_goldens(copy / spec.GOLDENS, goldens, facts)
    rehash(copy, spec.GOLDENS)
    first, *others = verify(copy).replays
    assert not first.passed
    assert first.problem == "the tokenizer splits the prompt differently than on the exporting machine"
    assert all(replay.passed for replay in others)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("preprocess", {"mode": "crop"}, "preprocessing makes other pixels"),
        ("preprocess", {"mode": "pad"}, "preprocessing makes other pixels"),
        ("preprocess", {"mean": [0.48145466, 0.4578275, 0.4082108]}, "preprocessing makes other pixels"),
        ("decoder", {"rope_theta": 10001.0}, "the rotary angles are not those of the exporting machine"),
        ("decoder", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "the rotary angles are not those"),
        ("decoder", {"rope_scaling": {"type": "linear", "factor": 1.1}}, "the rotary angles are not those"),
        ("decoder", {"max_position_embeddings": 2047}, "the context is 2047 positions, on the exporting machine 2048"),
    ],
)
def test_what_logits_may_not_show_is_compared_too(
    copy: Path, run: RunCommand, part: str, changes: dict[str, object], message: str
) -> None:
    model = json.loads((copy / spec.MANIFEST).read_text())["model"]
    edit_manifest(copy, model=model | {part: model[part] | changes})
    verdict = verify(copy)
    assert not verdict.passed
    assert any(message in told for told in (*verdict.differences, *(replay.problem for replay in verdict.replays)))
    result = run("verify", copy)
    assert (result.exit_code, message in result.stdout, result.stdout.endswith("FAIL\n")) == (1, True, True)


def test_other_end_tokens_are_told(bundle_a1: Path) -> None:
    model = read_manifest(bundle_a1).model
    other = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, eos_token_ids=(7,)))
    assert Facts.of(model).differences(other) == ["answers end at the tokens 7, on the exporting machine at 2"]
    assert Facts.of(model).differences(model) == []


def test_a_prompt_step_by_step_has_the_logits_of_one_pass(bundle_a1: Path) -> None:
    with Owl2.load(bundle_a1) as owl:
        model = owl.model
        for golden in read_goldens(Bundle.open(bundle_a1))[0]:
            prompt = model.encode(golden.prompt, model.prepare(list(golden.images)))
            rows, _ = model.encoder.rows(list(prompt.images.values()))
            expected = owl.logits(golden.prompt, images=list(golden.images))
            embeds, modality = embed(prompt.keys, model.table, rows)
            everything, buffers = np.arange(len(embeds)), model.engine.allocate(len(embeds), None)
            logits = stepwise_logits(model.engine, embeds, modality, everything, buffers)
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            np.testing.assert_array_equal(golden_positions(prompt), golden.positions)
            last = run_golden(model.engine, model.table, prompt, rows, golden.positions[-2:])
            np.testing.assert_allclose(last, expected[golden.positions[-2:]], atol=1e-4)


def test_missing_engines_are_a_problem(copy: Path) -> None:
    edit_manifest(copy, engines={"tensorrt-sm87": "0"})
    (problem,) = verify(copy).problems
    assert "engine.json: it is missing; run on this device: owl2-export engine" in problem
