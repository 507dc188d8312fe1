"""Write the sample images: held-out scenes drawn at 336 × 336, degraded ones, and their right answers."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image
from quality import PROMPT, WORDS, damage
from questions import listing
from world import draw, random_scene

SCALE = 4
COUNTS = (1, 2, 3, 3, 4)


def write_images(folder: Path, seed: int) -> None:
    """Write the images to ``folder``, with pictures.json: file, prompt and right answer of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"pictures {seed}")
    entries = []
    for number, count in enumerate(COUNTS, 1):
        scene = random_scene(rng, count, held_out=True)
        file = f"scene{number}.png"
        Image.fromarray(draw(scene, rng, scale=SCALE)).save(folder / file, optimize=True)
        prompt = "USER: <|image|>Describe the picture. ASSISTANT:"
        entries.append({"file": file, "prompt": prompt, "answer": listing(scene.things)})
    clean = draw(random_scene(rng, 3, held_out=True), rng)
    for name, defect, level in (("clean", "noise", 0), ("noisy", "noise", 3), ("blurred", "blur", 4)):
        Image.fromarray(damage(clean, defect, level, rng)).save(folder / f"{name}.png", optimize=True)
        entries.append({"file": f"{name}.png", "prompt": PROMPT, "answer": WORDS[level]})
    (folder / "pictures.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_images(options.folder, options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
