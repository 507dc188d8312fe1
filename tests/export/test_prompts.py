"""Rows of calibration prompts are bounded, whatever data the user gives."""

from dataclasses import replace
from pathlib import Path

import pytest

from owl2.export import prompts
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.quant.calibration.samples import builtin_set
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer


def test_calibration_is_cut_evenly_and_the_report_says_so(
    sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(builtin_set(), notes=())
    with Checkpoint(sample_checkpoint) as checkpoint:
        config, tokenizer = checkpoint.config, Tokenizer.load(sample_checkpoint)
        whole = prompts.prepare(data, config, tokenizer, calibrate=True)
        positions = sum(len(prompt.keys) for prompt in whole.calibration)
        monkeypatch.setattr(prompts, "MAX_ROW_BYTES", 4 * config.decoder.hidden_size * (positions // 3 + 1))
        part = prompts.prepare(data, config, tokenizer, calibrate=True)
    assert whole.notes == ()
    assert len(part.calibration) == len(whole.calibration) // 3
    assert part.images_of(part.calibration)
    assert part.calibration[0].keys == whole.calibration[0].keys
    assert part.calibration[-1].keys == whole.calibration[(len(part.calibration) - 1) * 3].keys
    (note,) = part.notes
    assert note.startswith(f"{len(part.calibration)} of {len(whole.calibration)} calibration samples were used")


def test_an_image_is_kept_however_small_the_room(sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_ROW_BYTES", 1)
    with Checkpoint(sample_checkpoint) as checkpoint:
        made = prompts.prepare(builtin_set(), checkpoint.config, Tokenizer.load(sample_checkpoint), calibrate=True)
    assert len(made.calibration) == 1
    assert made.images_of(made.calibration)
