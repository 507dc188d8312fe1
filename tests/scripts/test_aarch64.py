"""Conclusions of scripts/check_aarch64.py and check_wheels.py from given recordings; nothing is emulated."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("check_aarch64")


@pytest.fixture(scope="module")
def recorded(bundle_a1: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden prompts of a1, recorded on this machine as on any other."""
    out = tmp_path_factory.mktemp("recorded")
    sys.path.insert(0, str(SCRIPTS))
    try:
        cases = importlib.import_module("check_aarch64").golden_cases(golden / "a1_base_bin")
    finally:
        sys.path.remove(str(SCRIPTS))
    (out / "cases.json").write_text(json.dumps(cases))
    command = [SCRIPTS / "record_run.py", bundle_a1, out / "cases.json", out]
    subprocess.run([sys.executable, *map(str, command)], check=True, timeout=120)
    return out


def changed(recording: Any, **arrays: NDArray[Any]) -> Any:
    return dataclasses.replace(
        recording, arrays={**recording.arrays, **{name.replace("_", ".", 1): array for name, array in arrays.items()}}
    )


def result(check: ModuleType, difference: Any, **fields: Any) -> Any:
    good = {"verified": True, "verified_kl": 1e-3, "nats_per_token": 1.2, "golden": 1e-5, "golden_answers": True}
    return check.Result(cpu="host", onnxruntime="1", decoder="native", difference=difference, **good | fields)


class TestCompare:
    def test_a_recording_does_not_differ_from_itself(self, check: ModuleType, recorded: Path) -> None:
        recording = check.read_recording(recorded)
        same = check.compare(recording, recording)
        assert (same.kl_text, same.kl_image, same.kl_steps, same.largest, same.same_best) == (0, 0, 0, 0, 1)
        assert same.other_answers == ()
        assert same.answers == 7
        assert result(check, same).problems == []

    def test_the_divergence_is_that_of_the_definition(self, check: ModuleType, recorded: Path) -> None:
        """At one position two tokens change places, at an image position another pair does."""
        recording = check.read_recording(recorded)
        index = recording.names.index("image")
        logits, modality = recording.arrays[f"{index}.prefill"], recording.arrays[f"{index}.modality"]
        text, image = int(np.flatnonzero(modality == 0)[3]), int(np.flatnonzero(modality)[1])
        other = logits.copy()
        for row in (text, image):
            best, worst = logits[row].argmax(), logits[row].argmin()
            other[row, [best, worst]] = other[row, [worst, best]]
        found = check.compare(recording, changed(recording, **{f"{index}_prefill": other}))
        counts = [
            (recording.arrays[f"{i}.modality"] == branch).sum()
            for i in range(len(recording.names))
            for branch in (0, 1)
        ]
        for row, kl, positions in ((text, found.kl_text, counts[::2]), (image, found.kl_image, counts[1::2])):
            p = np.exp(logits[row].astype(np.float64)) / np.exp(logits[row].astype(np.float64)).sum()
            q = np.exp(other[row].astype(np.float64)) / np.exp(other[row].astype(np.float64)).sum()
            assert kl == pytest.approx((p * np.log(p / q)).sum() / sum(positions), rel=1e-6)
        assert found.kl_steps == 0
        assert found.same_best == pytest.approx(1 - 1 / sum(counts[::2]))
        assert found.largest == pytest.approx(max(np.ptp(logits[row]) for row in (text, image)))

    @pytest.mark.parametrize("part", ["prefill", "steps"])
    def test_nan_fails(self, check: ModuleType, recorded: Path, part: str) -> None:
        recording = check.read_recording(recorded)
        broken = recording.arrays[f"4.{part}"].copy()
        broken[-1, 0] = np.nan
        difference = check.compare(recording, changed(recording, **{f"4_{part}": broken}))
        assert np.isnan(difference.largest)
        assert len(result(check, difference).problems) == 1

    def test_other_answers_are_named(self, check: ModuleType, recorded: Path) -> None:
        recording = check.read_recording(recorded)
        other = dataclasses.replace(recording, answers={**recording.answers, "image": "something else"})
        assert check.compare(recording, other).other_answers == ("image",)

    def test_different_prompts_are_refused(self, check: ModuleType, recorded: Path) -> None:
        recording = check.read_recording(recorded)
        other = dataclasses.replace(recording, names=list(reversed(recording.names)))
        with pytest.raises(ValueError, match="different prompts"):
            check.compare(recording, other)


class TestGolden:
    def test_this_machine_has_the_recorded_logits_and_ids(
        self, check: ModuleType, recorded: Path, golden: Path
    ) -> None:
        largest, equal = check.golden_difference(check.read_recording(recorded), golden / "a1_base_bin")
        assert 0 < largest < check.GOLDEN_TOLERANCE
        assert equal

    def test_a_wrong_logit_and_a_wrong_id_are_seen(self, check: ModuleType, recorded: Path, golden: Path) -> None:
        recording = check.read_recording(recorded)
        index = recording.names.index("two_images")
        logits = recording.arrays[f"{index}.prefill"].copy()
        logits[5, 7] += 0.25
        wrong = changed(recording, **{f"{index}_prefill": logits})
        wrong = dataclasses.replace(wrong, ids={**wrong.ids, "text": [*wrong.ids["text"][:-1], 0]})
        largest, equal = check.golden_difference(wrong, golden / "a1_base_bin")
        assert largest == pytest.approx(0.25, abs=1e-3)
        assert not equal
        same = check.compare(recording, recording)
        assert len(result(check, same, golden=largest, golden_answers=equal, verified=False).problems) == 3

    def test_a_prompt_that_was_not_recorded_is_an_error(self, check: ModuleType, recorded: Path, golden: Path) -> None:
        recording = check.read_recording(recorded)
        short = dataclasses.replace(recording, names=recording.names[:-1])
        with pytest.raises(ValueError, match="raw_image_first"):
            check.golden_difference(short, golden / "a1_base_bin")


def test_requirements_that_apply_only_on_the_other_machine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    check_wheels = importlib.import_module("check_wheels")
    needs = [
        "numpy>=1.24",
        'exceptiongroup; python_version < "3.11"',
        'Typing.Extensions>=4; python_version < "3.13"',
        'arm-only; platform_machine == "aarch64"',
        'windows-only; sys_platform == "win32"',
        'torch; extra == "export"',
    ]
    packages = [{"name": "owl2", "requires_dist": needs}, {"name": "numpy"}, {"name": "typing_extensions"}]
    assert check_wheels.omitted(packages, "3.12") == ['arm-only; platform_machine == "aarch64"']
    assert len(check_wheels.omitted(packages, "3.10")) == 2
