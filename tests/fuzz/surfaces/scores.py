"""What scoring reads: tables that a run goes on with, and presets."""

import random
from pathlib import Path

import numpy as np

from fuzz import mutate
from fuzz.surface import Input, Surface
from owl2 import ConfigError
from owl2.runtime.errors import ImageError
from owl2.runtime.scoring.report import report_page
from owl2.runtime.scoring.results import ResultFile
from owl2.runtime.scoring.scale import FOLDER, load_preset, make_scale
from owl2.runtime.scoring.score import score_of
from owl2.runtime.scoring.summary import Summary

TABLES = ("scores.csv", "scores.jsonl", "scores.parquet")
PRESET = "own.json"
NAMES = ("a.png", 'q"uote,.png', "line\nbreak\r.png", "\udcff.png")


def open_surface(_folder: Path, scratch: Path) -> Surface:
    """On tables of four images, one of them broken, on two tasks."""
    scales = [make_scale(load_preset(), task) for task in ("quality", "aesthetics")]
    ids, logits = [[0], [1], [2], [3], [4]], np.arange(5, dtype=np.float32)
    scores = [score_of(logits, ids, scale, None, "bundle") for scale in scales]
    originals = {PRESET: (FOLDER / "compare2score.json").read_bytes()}

    def opened(name: str, *, retry: bool = False, resume: bool = False) -> tuple[ResultFile, Summary]:
        summary = Summary()
        table = ResultFile.open(scratch / name, scales, "bundle", {}, summary, resume=resume, retry=retry)
        return table, summary

    for name in TABLES:
        table, _ = opened(name)
        for image in NAMES:
            table.add(image, ImageError("it is broken") if image == NAMES[2] else scores)
        table.finish()
        originals[name] = (scratch / name).read_bytes()

    def make(rng: random.Random) -> Input:
        name = rng.choice((*TABLES, PRESET))
        if name == PRESET:
            return Input(name, mutate.change_json(rng, originals[name]))
        return Input(name, mutate.change_bytes(rng, originals[name]))

    def run(given: Input) -> None:
        path = scratch / given.target
        path.write_bytes(given.content)
        if given.target == PRESET:
            preset = load_preset(path)
            for task in preset.image:
                make_scale(preset, task)
            return
        try:
            table, summary = opened(given.target, resume=True, retry=len(given.content) % 2 == 0)
        except ConfigError:
            assert path.read_bytes() == given.content  # whatever it is, it is left alone
            raise
        with table._file:
            table.add("new.png", scores)
        report_page("Scores", summary)
        for left in scratch.glob(".*"):  # of Parquet that was not finished
            left.unlink()

    return Surface(make, run)
