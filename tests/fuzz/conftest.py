"""The base bundle, made once."""

from pathlib import Path

import pytest

from fuzz.bundles import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a campaign, with its base bundle."""
    folder = tmp_path_factory.mktemp("fuzz")
    make_base(folder)
    return folder
