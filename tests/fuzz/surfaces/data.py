"""Data files of ``owl2 eval``: lines of every task, with good and bad values, as text and as bytes."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import owl2
from fuzz import mutate
from fuzz.bundles import BUNDLE, PICTURE
from fuzz.surface import Input, Surface
from owl2 import Owl2

RECORDS: tuple[dict[str, Any], ...] = (
    {"image": "a.png", "question": "What is it?", "answers": ["a cat", "cat"], "category": "animals", "id": 1},
    {"image": "a.png", "question": "Which?", "choices": ["red", "blue"], "answer": 1},
    {"image": ["a.png", "a.png"], "question": "Same?", "choices": ["yes", "no"], "answer": "no", "id": "x"},
    {"image": "a.png", "captions": ["A cat.", "An animal."]},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<|image|>Hi"}, {"from": "gpt", "value": "Ho."}]},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho."}]},
    {"text": "Plain text."},
    {"question": "No image?", "answers": ["no"]},
    {"question_id": 1, "image": "a.png", "question": "VQA?", "answers": [{"answer": "yes", "answer_id": 1}]},
)  # fmt: skip
NAMES = ("a.png", "A.PNG", "b.png", "", ".", "..", "/dev/zero", "/dev/null", "/proc/self/mem", "pipe", "link", "http://a/b.png",
         "data:image/png;base64,AAAA", "a.png\0", "x" * 5000, "folder")  # fmt: skip


def lines(rng: random.Random) -> bytes:
    """A file of records, more or less as they should be."""
    records = json.loads(json.dumps(rng.choices(RECORDS, k=rng.choice((1, 1, 2, 5)))))
    for index, record in enumerate(records):
        kind = rng.random()
        if kind < 0.5:
            records[index] = mutate.change_value(rng, record)
        elif kind < 0.6:
            record["image"] = rng.choice(
                (rng.choice(NAMES), [rng.choice(NAMES) for _ in range(rng.choice((0, 1, 40)))])
            )
    if rng.random() < 0.1:
        return mutate.written(rng, records)  # an array
    parts = [json.dumps(record).encode("utf-8", "surrogatepass") for record in records]
    if rng.random() < 0.15:
        place = rng.randrange(len(parts))
        parts[place] = mutate.break_json(rng, parts[place])
    content = rng.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n")).join(parts)
    if rng.random() < 0.2:
        content = mutate.change_bytes(rng, content)
    return (
        content if rng.random() < 0.95 else content.decode(errors="replace").encode(rng.choice(("utf-16", "utf-8-sig")))
    )


def furnish(folder: Path) -> None:
    """What the lines name: an image, a folder, a pipe, a link that leads nowhere."""
    import os

    shutil.copy(PICTURE, folder / "a.png")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("nowhere")


def open_surface(folder: Path, scratch: Path) -> Surface:
    """Measured with the loaded base bundle."""
    owl, path = Owl2.load(folder / BUNDLE), scratch / "data.jsonl"
    furnish(scratch)

    def make(rng: random.Random) -> Input:
        return Input("jsonl", lines(rng))

    def run(given: Input) -> None:
        path.write_bytes(given.content)
        json.dumps(owl2.evaluate(owl, path, max_new_tokens=1, limit=4).to_json(items=True))

    return Surface(make, run)
