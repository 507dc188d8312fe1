"""Scores of the sample model against the known strength of degradation, and a thousand images in a folder.

Images that it never saw: held-out scenes, and photographs kept out of its training, each with one defect of one of five
strengths. For each bundle, Spearman's and Pearson's correlation of score and strength, and how far its scores are from
those of the first one. Then a folder of images of mixed sizes, for time and memory.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import pearsonr, spearmanr

from owl2 import Owl2, Score

sys.path.insert(0, str(Path(__file__).parents[1] / "sample"))
from quality import DAMAGE, damage, photo_crop  # type: ignore[import-not-found,unused-ignore]
from world import draw, random_scene  # type: ignore[import-not-found,unused-ignore]

COUNTS = (100, 500, 1000)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=400, help="of each kind")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sets = {kind: _degraded(kind, options.images) for kind in ("scenes", "photographs")}
    print("bundle, images, Spearman, Pearson; from the first bundle: mean, 99th percentile, largest difference")
    first: dict[str, list[float]] = {}
    for bundle in options.bundles:
        with Owl2.load(bundle, threads=options.threads) as owl:
            for kind, (images, levels) in sets.items():
                values = [-score.value for score in owl.score(images)]
                rank, line = spearmanr(values, levels).statistic, pearsonr(values, levels).statistic
                apart = np.abs(np.array(values) - first.setdefault(kind, values))
                far = f"{apart.mean():.4f}, {np.quantile(apart, 0.99):.4f}, {apart.max():.4f}"
                print(f"{bundle.name}, {kind}, {rank:.3f}, {line:.3f}; {far}")
    with tempfile.TemporaryDirectory() as folder:
        paths = _folder(Path(folder), max(COUNTS))
        with Owl2.load(options.bundles[0], threads=options.threads) as owl:
            _folder_speed(owl, paths)
    return 0


def _degraded(kind: str, count: int) -> tuple[list[Image.Image], list[int]]:
    dice = random.Random(11)
    images, levels = [], []
    for number in range(count):
        scene = random_scene(dice, dice.randint(1, 4), held_out=True)
        pixels = photo_crop(dice, held_out=True) if kind == "photographs" else draw(scene, dice)
        levels.append(number % 5)
        images.append(Image.fromarray(damage(pixels, dice.choice(tuple(DAMAGE)), number % 5, dice)))
    return images, levels


def _folder(folder: Path, count: int) -> list[Path]:
    dice = np.random.default_rng(3)
    paths = []
    for number in range(count):
        width, height = dice.integers(60, 1200, 2)
        small = dice.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number:04}.{'jpg' if number % 2 else 'png'}")
        image.save(paths[-1])
    return paths


def _folder_speed(owl: Owl2, paths: Sequence[Path]) -> None:
    scorer = owl.scorer()
    began, together = time.perf_counter(), list[Score]()
    for _, found in scorer.stream(paths, scorer.prepare):
        assert isinstance(found, tuple)
        together.append(found[0])
        if len(together) in COUNTS:
            rate = len(together) / (time.perf_counter() - began)
            print(f"{len(together)} images: {rate:.1f} a second, {_resident():.0f} MiB resident")
    fast = time.perf_counter() - began
    began = time.perf_counter()
    alone = [owl.score(path)[0] for path in paths]
    slow = time.perf_counter() - began
    same = sum(one == other for one, other in zip(alone, together, strict=True))
    print(f"one call at a time: {len(paths) / slow:.1f} a second, ratio {slow / fast:.2f}; {same} scores are the same")


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
