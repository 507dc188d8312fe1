"""Fixtures for exporting."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def a1(golden: Path) -> Path:
    """A tiny recorded checkpoint."""
    return golden / "a1_base_bin" / "model"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images, one with a text."""
    folder = tmp_path_factory.mktemp("calibration") / "photos"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "1.txt").write_text("Some noise.\n")
    return folder
