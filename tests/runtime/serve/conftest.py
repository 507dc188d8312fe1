"""One server for all tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GOLDEN
from serving import RunningServer, serving


@pytest.fixture(scope="module")
def server(bundle_a1: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("served")
    with serving(bundle_a1, folder / "store", "--allow-dir", str(GOLDEN / "images")) as it:
        yield it
