"""Write conversations of the training side with images, to calibrate the quantization of the sample with.

The folder gets ``calibration.jsonl`` and the images that it names. Every line is an object in the fine-tuning format of
mPLUG-Owl2: {"image": file, "conversations": [{"from": "human", "value": "<|image|>..."}, ...]}.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from quality import PROMPT, degraded, photo_crop
from questions import ASK, Turn, converse
from world import MAX_THINGS, draw, random_scene

QUALITY_SHARE = 0.1
TURNS = 4
WEIGHTS = dict.fromkeys((*ASK, "caption", "second"), 1.0)


def _quality_talk(rng: random.Random) -> tuple[NDArray[np.uint8], list[Turn]]:
    """A rated image; the Q-Align question in the conversation template."""
    scene = random_scene(rng, rng.randint(1, MAX_THINGS), held_out=False)
    clean = draw(scene, rng) if rng.random() < 0.5 else photo_crop(rng, held_out=False)
    pixels, word = degraded(clean, rng)
    question = PROMPT.removeprefix("USER: ").split("\nASSISTANT: ")[0]
    return pixels, [Turn("quality", question, f"The quality of the image is {word}")]


def _scene_talk(rng: random.Random) -> tuple[NDArray[np.uint8], list[Turn]]:
    """A drawn scene and a few turns about it."""
    scene = random_scene(rng, rng.randint(1, MAX_THINGS), held_out=False)
    first, *rest = converse(scene, rng, turns=TURNS, weights=WEIGHTS)
    return draw(scene, rng), [Turn(first.skill, f"<|image|>{first.question}", first.answer), *rest]


def record(file: str, turns: list[Turn]) -> dict[str, Any]:
    """One line of the calibration file."""
    messages = [
        {"from": who, "value": text} for turn in turns for who, text in (("human", turn.question), ("gpt", turn.answer))
    ]
    return {"image": file, "conversations": messages}


def write_calibration(folder: Path, *, count: int, seed: int) -> Path:
    """Write ``count`` conversations to ``folder``; returns the path of the JSON lines file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"calibration {seed}")
    lines = []
    for i in range(count):
        pixels, turns = (_quality_talk if rng.random() < QUALITY_SHARE else _scene_talk)(rng)
        file = f"{i:04d}.png"
        Image.fromarray(pixels).save(folder / file)
        lines.append(json.dumps(record(file, turns)))
    path = folder / "calibration.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="for the images and calibration.jsonl")
    parser.add_argument("--count", type=int, default=128, help="conversations (default 128)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_calibration(options.folder, count=options.count, seed=options.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
