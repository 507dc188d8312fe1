"""Data for the tests of ``owl2 eval``."""

import json
from pathlib import Path

from conftest import ROOT

IMAGES = ROOT / "sample" / "pictures"
CHOICES = ("a small purple star on the left", "a big red cross", "two stars")


def write_lines(path: Path, *records: dict[str, object]) -> Path:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_every_task(path: Path) -> Path:
    """Write a line or two for every task, about the images of the sample."""
    known = {entry["file"]: entry["answer"] for entry in json.loads((IMAGES / "pictures.json").read_text())}
    first, third = str(IMAGES / "scene1.png"), str(IMAGES / "scene3.png")
    question = "Describe the picture."
    return write_lines(
        path,
        {"image": first, "question": question, "answers": [known["scene1.png"]], "category": "one", "id": "first"},
        {"image": third, "question": question, "answers": ["no"] * 7 + [known["scene3.png"]] * 3, "category": "three"},
        {"image": first, "question": question, "choices": CHOICES, "answer": CHOICES[0]},
        {"image": first, "question": "How many shapes are there?", "choices": ["one", "two"], "answer": "two"},
        {"image": third, "question": question, "captions": [known["scene3.png"]]},
        {"image": first, "question": question, "captions": ["a small purple star"]},
        {
            "image": [first, third],
            "conversations": [
                {"from": "human", "value": "<|image|>What is it?<|image|>"},
                {"from": "gpt", "value": "two pictures"},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "yes"},
            ],
        },
        {"text": "a small blue circle on the right " * 60},
    )
