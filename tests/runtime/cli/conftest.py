"""Fixtures of the commands' tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from owl2 import Owl2
from owl2.runtime.verification import OnBlock, hash_file


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


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []

    def counted(path: Path, on_block: OnBlock = int) -> str:
        names.append(path.name)
        return hash_file(path, on_block)

    monkeypatch.setattr("owl2.runtime.verification.hash_file", counted)
    return names
