"""Fixtures that all tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the data recorded from the original implementation."""
    return Path(__file__).parent / "golden"
