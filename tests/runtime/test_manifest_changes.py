"""No small change of a manifest goes unnoticed, and none that gives other answers gets through a verification."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand, write_manifest
from manifest_changes import changes
from numpy.typing import NDArray

from owl2 import Owl2, verify
from owl2.runtime.errors import BundleError, Owl2Error

IMAGES = [np.zeros((60, 200, 3), np.uint8), np.zeros((200, 60, 3), np.uint8)]
IMAGES[0][10:40, 20:80] = (0, 0, 255)
IMAGES[1][20:80, 10:40] = (255, 0, 0)
QUESTIONS: tuple[tuple[str, list[NDArray[np.uint8]]], ...] = (
    ("What is in the picture?", IMAGES[:1]),
    ("Describe the picture.", IMAGES[1:]),
    ("What is the capital of France?", []),
    ("Where is it? " * 60, []),
)


def answers(bundle: Path) -> list[tuple[int, ...]]:
    with Owl2.load(bundle, threads=1) as owl:
        return [owl.chat().ask(text, images=images, max_new_tokens=16).ids for text, images in QUESTIONS]


def test_every_change_is_refused(copy: Path, run: RunCommand) -> None:
    path = copy / "owl2.json"
    texts = dict(changes(json.loads(path.read_text())))
    assert len(texts) > 100
    for name, text in texts.items():
        path.write_text(text)
        with pytest.raises(BundleError):
            Owl2.load(copy)
        result = run("info", copy)
        assert (result.exit_code, result.stdout) == (1, ""), name


def test_a_change_with_the_digest_of_it_does_not_pass(sample_bundle: Path, tmp_path: Path) -> None:
    """As a tool that edits manifests would write it: what gives other answers is refused or fails."""
    copy = Path(shutil.copytree(sample_bundle, tmp_path / "bundle"))
    expected, manifest = answers(copy), json.loads((copy / "owl2.json").read_text())
    unnoticed = []
    for name, text in changes(manifest):
        if " twice" in name:
            continue
        write_manifest(copy, json.loads(text))
        try:
            if verify(copy, threads=1).passed and answers(copy) != expected:
                unnoticed.append(name)
        except Owl2Error:
            pass
    assert unnoticed == []
