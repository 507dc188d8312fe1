"""``owl2.evaluate`` end to end: by itself and against another model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_manifest
from evaluation_data import write_lines
from isolation import BLOCKED
from PIL import Image

from owl2 import EvaluationProgress, LoadProgress, Owl2, evaluate
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime.errors import BundleError, ConfigError, DataError, ReferenceModelError
from owl2.runtime.evaluation.measure import ItemResult
from owl2.runtime.evaluation.reference import open_reference


def test_a_folder_and_a_loaded_model_give_the_same(
    sample_bundle: Path, owl: Owl2, data: Path, results: list[ItemResult]
) -> None:
    progress: list[LoadProgress | EvaluationProgress] = []
    evaluation = evaluate(str(sample_bundle), str(data), progress=progress.append)
    assert evaluation.results == tuple(results)
    assert evaluation.complete
    assert evaluation.context == owl.context
    assert evaluation.preprocess == "resize"
    assert [str(step) for step in progress[-8:]] == [f"measuring: {i} of 8 items" for i in range(1, 9)]
    again = evaluate(owl, data, device="cpu")
    assert again.results == evaluation.results
    assert again.summary == evaluation.summary
    assert evaluation.to_json(items=True)["predictions"][0]["category"] == "one"
    assert "predictions" not in evaluation.to_json()


def test_an_interrupt_returns_what_was_measured(owl: Owl2, data: Path, results: list[ItemResult]) -> None:
    def interrupt(progress: LoadProgress | EvaluationProgress) -> None:
        if isinstance(progress, EvaluationProgress) and progress.done == 3:
            raise KeyboardInterrupt

    evaluation = evaluate(owl, data, progress=interrupt)
    assert not evaluation.complete
    assert evaluation.results == tuple(results[:3])
    assert (evaluation.summary.items, evaluation.total) == (3, 8)


@pytest.mark.parametrize("after", [0, 2])
def test_an_image_that_disappears_ends_it_and_keeps_the_results(
    sample_bundle: Path, tmp_path: Path, after: int
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record: dict[str, object] = {"question": "What?", "answers": ["red"]}
    path = write_lines(tmp_path / "data.jsonl", *[record] * after, record | {"image": "a.png"}, record)

    def remove(progress: LoadProgress | EvaluationProgress) -> None:
        if isinstance(progress, EvaluationProgress) or not after:
            (tmp_path / "a.png").unlink(missing_ok=True)

    message = rf"line {after + 1}: cannot read .*a\.png: "
    if not after:
        with pytest.raises(DataError, match=message):  # there is nothing to keep
            evaluate(sample_bundle, path, progress=remove)
        return
    evaluation = evaluate(sample_bundle, path, progress=remove)
    assert (len(evaluation.results), evaluation.total, evaluation.complete) == (2, 4, False)
    assert isinstance(evaluation.failure, DataError)
    assert re.match(message, str(evaluation.failure))
    assert evaluation.to_json()["failure"] == str(evaluation.failure)


def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path: Path, data: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(DataError, match="it is missing"):
        evaluate(missing, tmp_path / "no.jsonl")
    with pytest.raises(BundleError, match="is neither a bundle"):
        evaluate(missing, data, against=tmp_path)
    with pytest.raises(ConfigError, match="max_new_tokens 0 must be at least 1"):
        evaluate(missing, data, max_new_tokens=0)
    with pytest.raises(ConfigError, match="preprocess 'squash' is not known"):
        evaluate(missing, data, preprocess="squash")
    with pytest.raises(BundleError, match="does not exist"):
        evaluate(missing, data)
    with pytest.raises(ConfigError, match="limit must be a whole number or None, got '3'"):
        evaluate(missing, data, limit="3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bundle must be a path or of type Owl2, got 3"):
        evaluate(3, data)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="data must be a path, got "):
        evaluate(missing, [data])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="against must be a path or None, got 3"):
        evaluate(missing, data, against=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device 'gpu' is not known"):
        evaluate(missing, data, device="gpu")


@pytest.mark.parametrize("options", [{"context": 100}, {"kv_cache": "int8"}, {"device": "cuda"}, {"threads": 99}])
def test_a_loaded_model_keeps_its_settings(owl: Owl2, data: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a loaded model keeps its device, threads, context and K/V cache"):
        evaluate(owl, data, **options)


class TestAgainst:
    def test_itself(self, sample_bundle: Path, data: Path) -> None:
        record = evaluate(sample_bundle, data, against=sample_bundle).to_json(items=True)
        for modality in ("text", "image"):
            assert record["divergence"][modality]["kl"] == 0
            assert record["divergence"][modality]["top1_agreement"] == 1
        for task in record["tasks"].values():
            assert task["scores"] == task["reference"]
            assert task.get("changes", {"changed": 0})["changed"] == 0
        assert [result["line"] for result in record["predictions"]] == list(range(1, 9))
        assert all(result["output"] == result["reference"] for result in record["predictions"])
        positions = [result["divergence"]["image"]["positions"] for result in record["predictions"]]
        rows = Owl2.load(sample_bundle).config.rows_per_image
        assert positions == [rows] * 6 + [2 * rows, 0]

    def test_a_checkpoint_as_the_export_reports_it(self, tmp_path: Path, golden: Path) -> None:
        """KL and agreement on the held-out prompts of an export are those in its report."""
        checkpoint = golden / "a1_base_bin" / "model"
        for number in range(16):
            Image.new("RGB", (97, 61), (15 * number, 90, 200)).save(tmp_path / f"{number}.png")
        talks: list[dict[str, object]] = [
            {
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": f"What about {number:02}?"},
                    {"from": "gpt", "value": f"Nothing is known about {number:02} in this picture."},
                ],
            }
            for number in range(16)
        ]
        config = ExportConfig(
            checkpoint, tmp_path / "b", method="rtn", calibration=write_lines(tmp_path / "all.jsonl", *talks)
        )
        expected = export_bundle(config).accuracy
        held_out = write_lines(tmp_path / "held_out.jsonl", talks[7], talks[15])
        found = evaluate(tmp_path / "b", held_out, against=checkpoint, backend="onnxruntime").to_json()["divergence"]
        assert expected.kl_text > 1e-4
        assert found["text"]["positions"] + found["image"]["positions"] == expected.positions
        assert found["text"]["kl"] == pytest.approx(expected.kl_text, rel=1e-3)
        assert found["image"]["kl"] == pytest.approx(expected.kl_image, rel=1e-3)
        assert found["text"]["top1_agreement"] == pytest.approx(expected.top1_agreement_text)
        assert found["image"]["top1_agreement"] == pytest.approx(expected.top1_agreement_image)
        assert found["mean_abs_logit_difference"] == pytest.approx(expected.mean_abs_logit_difference, rel=1e-3)

    def test_other_models_are_refused(self, owl: Owl2, sample_bundle: Path, bundle_a1: Path, tmp_path: Path) -> None:
        with pytest.raises(ReferenceModelError, match=r"has 800 tokens, .*bundle has .* these are different models"):
            open_reference(bundle_a1, owl.model)
        with pytest.raises(BundleError, match=r"is neither a bundle \(owl2.json\) nor an official checkpoint"):
            open_reference(tmp_path, owl.model)
        shorter = Path(shutil.copytree(sample_bundle, tmp_path / "shorter"))
        model = json.loads((shorter / "owl2.json").read_text())["model"]
        edit_manifest(shorter, model=model | {"decoder": model["decoder"] | {"max_position_embeddings": 200}})
        with pytest.raises(ConfigError, match="exceeds the 200 positions"):
            open_reference(shorter, owl.model)

    def test_a_checkpoint_needs_the_extra(self, sample_bundle: Path, sample_checkpoint: Path, data: Path) -> None:
        script = BLOCKED + (
            "from owl2.runtime.__main__ import main\n"
            f"sys.argv = ['owl2', 'eval', {str(sample_bundle)!r}, '--data', {str(data)!r}, '--limit', '1', "
            f"'--against', {{}}]\n"
            "main()\n"
        )

        def against(path: Path) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-c", script.replace("{}", repr(str(path)))]
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.sep, timeout=120)

        refused = against(sample_checkpoint)
        assert refused.returncode == 1
        assert "is a checkpoint, which needs torch" in refused.stderr
        assert "pip install 'owl2[export]'; another bundle can be compared without it" in refused.stderr
        assert "Traceback" not in refused.stderr
        allowed = against(sample_bundle)
        assert allowed.returncode == 0, allowed.stderr
        assert "same best token" in allowed.stdout
