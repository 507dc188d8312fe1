"""The sample bundle on data of every task."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation_data import write_every_task

from owl2 import Owl2
from owl2.runtime.evaluation.data import read_items
from owl2.runtime.evaluation.measure import ItemResult, measure


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task, about the images of the sample."""
    return write_every_task(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="package")
def owl(sample_bundle: Path) -> Iterator[Owl2]:
    """The sample bundle, loaded."""
    with Owl2.load(sample_bundle) as owl:
        yield owl


@pytest.fixture(scope="package")
def results(owl: Owl2, data: Path) -> list[ItemResult]:
    """Results of the sample bundle on :func:`data`."""
    return list(measure(owl.model, read_items(data), max_new_tokens=64))
