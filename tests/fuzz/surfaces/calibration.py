"""Calibration data: files of conversations, and folders of images with texts."""

import json
import random
import shutil
from pathlib import Path

from fuzz import mutate
from fuzz.bundles import PICTURE
from fuzz.surface import Input, Surface
from fuzz.surfaces.data import furnish, lines
from owl2.quant.calibration.samples import load_calibration

NAMES = (
    "a.png", "b.png", "B.JPG", "._a.png", ".DS_Store", "Thumbs.db", "deep/c.png", "a.txt", "b.txt",
    "deep/c.txt", "d.gif", "odd\nname.png", "\x1b[31m.png", "é.png", "folder.png/x.png", "notes.md",
)  # fmt: skip


def open_surface(_: Path, scratch: Path) -> Surface:
    """In a folder of its own."""
    path, picture = scratch / "data.jsonl", PICTURE.read_bytes()
    furnish(scratch)

    def make(rng: random.Random) -> Input:
        if rng.random() < 0.6:
            return Input("jsonl", lines(rng))
        files = {}
        for name in rng.sample(NAMES, k=rng.choice((0, 1, 2, 5))):
            content = mutate.text(rng).encode("utf-8", "replace") if name.endswith((".txt", ".md")) else picture
            kind = rng.random()
            files[name] = mutate.change_bytes(rng, content) if kind < 0.4 else b"" if kind < 0.5 else content
        return Input(
            "folder", json.dumps({name: content.decode("latin-1") for name, content in files.items()}).encode()
        )

    def run(given: Input) -> None:
        if given.target == "jsonl":
            path.write_bytes(given.content)
            load_calibration(path, 4)
            return
        folder = scratch / "calibration"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in json.loads(given.content).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode("latin-1"))
        load_calibration(folder, 4)

    return Surface(make, run)
