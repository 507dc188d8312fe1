"""How far the native core's answers are from ONNX Runtime's, on the sample model.

Two measures, for each type of K/V cache: the KL divergence (nats, mean over positions) of next-token distributions on
conversations, against ONNX Runtime on the same bundle and against the float32 bundle; and greedy answers to held-out
questions. Where two answers differ, the margin is the difference, in ONNX Runtime's logits, between the tokens that
they chose at the first difference: a margin within the noise of the integers is a tie.

Needs the sample's modules: run from the repository, ``python scripts/compare_backends.py BUNDLE FLOAT_BUNDLE``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "sample"))

from evaluate import MAX_NEW_TOKENS
from make_calibration import write_calibration
from PIL import Image
from probes import MAIN_SKILLS, Probe, probes

from owl2 import Answer, Owl2
from owl2.runtime.backends.native.support import KV_TYPES
from owl2.runtime.engine import Floats
from owl2.runtime.evaluation.divergence import row_kl

SEED = 2000  # neither the calibration's nor the ablation's
TIE = 0.25


@dataclass(frozen=True)
class Difference:
    """Two answers to one question that are not the same.

    Attributes:
        margin: ONNX Runtime's logit of its own choice minus that of the other's, at the first difference.
    """

    ours: str
    theirs: str
    margin: float


def conversations(folder: Path, count: int) -> Iterator[tuple[str, Path]]:
    """Prompts in the model's template, answers included, each with its image."""
    for line in write_calibration(folder, count=count, seed=SEED).read_text("utf-8").splitlines():
        talk = json.loads(line)
        words = [turn["value"] for turn in talk["conversations"]]
        turns = [f"USER: {asked} ASSISTANT: {told}</s>" for asked, told in zip(words[::2], words[1::2])]
        yield "".join(turns), folder / talk["image"]


def all_logits(owl: Owl2, talks: list[tuple[str, Path]]) -> list[Floats]:
    return [owl.logits(text, images=[image]) for text, image in talks]


def mean_kl(references: list[Floats], made: list[Floats]) -> float:
    return float(np.mean(np.concatenate([row_kl(ours, theirs) for ours, theirs in zip(references, made)])))


def answers(owl: Owl2, asked: list[Probe]) -> list[Answer]:
    images = [None if probe.pixels is None else Image.fromarray(probe.pixels) for probe in asked]
    return [
        owl.generate(probe.prompt, images=image, max_new_tokens=MAX_NEW_TOKENS) for probe, image in zip(asked, images)
    ]


def difference(owl: Owl2, probe: Probe, ours: Answer, theirs: Answer) -> Difference:
    """Find out how near ONNX Runtime was to choosing as the native core did."""
    place = next(i for i, pair in enumerate(zip(ours.ids, theirs.ids)) if pair[0] != pair[1])
    images = [] if probe.pixels is None else [Image.fromarray(probe.pixels)]
    common = owl.model.tokenizer.decode(theirs.ids[:place])
    last = owl.logits(f"{probe.prompt}{common}", images=images)[-1]
    return Difference(ours.text, theirs.text, float(last[theirs.ids[place]] - last[ours.ids[place]]))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="of integer weights")
    parser.add_argument("float_bundle", type=Path, help="of the same model in float32")
    parser.add_argument("--talks", type=int, default=48, help="conversations for the divergence (default 48)")
    parser.add_argument("--questions", type=int, default=1000, help="to answer greedily (default 1000)")
    options = parser.parse_args()
    asked = [probe for skill in MAIN_SKILLS for probe in probes(skill, options.questions // len(MAIN_SKILLS), SEED)]
    with tempfile.TemporaryDirectory() as folder:
        talks = list(conversations(Path(folder), options.talks))
        exact = all_logits(Owl2.load(options.float_bundle, backend="onnxruntime"), talks)
        reference = Owl2.load(options.bundle, backend="onnxruntime")
        expected, expected_answers = all_logits(reference, talks), answers(reference, asked)
        print(f"{sum(map(len, exact))} positions, {len(asked)} questions")
        print(f"onnxruntime          KL to float32 {mean_kl(exact, expected):.2e}")
        for kv_type in KV_TYPES:
            owl = Owl2.load(options.bundle, backend="native", kv_cache=kv_type)
            made, given = all_logits(owl, talks), answers(owl, asked)
            found = [
                difference(reference, probe, ours, theirs)
                for probe, ours, theirs in zip(asked, given, expected_answers)
                if ours.ids != theirs.ids
            ]
            ties = sum(one.margin < TIE for one in found)
            print(
                f"native, {kv_type:4} K/V    KL to float32 {mean_kl(exact, made):.2e}, to onnxruntime "
                f"{mean_kl(expected, made):.2e}; {len(found)} answers differ, {ties} of them ties"
            )
            for one in found:
                print(f"    {one.margin:.3f}  {one.ours!r} | {one.theirs!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
