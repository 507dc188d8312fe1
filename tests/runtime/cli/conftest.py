"""Fixtures of the commands' tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from owl2 import Owl2


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose path has a space."""
    path = tmp_path_factory.mktemp("images") / "two colours.png"
    drawn = Image.new("RGB", (60, 24), (220, 30, 30))
    drawn.paste((20, 40, 200), (30, 0, 60, 24))
    drawn.save(path)
    return path


@pytest.fixture
def prompt_length(owl: Owl2) -> Callable[[str], int]:
    """Positions of the prompt for a first question."""
    return lambda question: owl.chat().ask(question, max_new_tokens=1).stats.prompt_tokens
