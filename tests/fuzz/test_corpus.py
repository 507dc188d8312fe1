"""Inputs that broke a promise once: small files, and of large ones the numbers that they are made from."""

import importlib
import json
from pathlib import Path

import pytest

from fuzz.surface import PLANS, SURFACES, Input, Surface, numbers
from fuzz.worker import run_input

CORPUS = Path(__file__).parent / "corpus"
SEEDS: dict[str, list[list[int]]] = json.loads((CORPUS / "seeds.json").read_text())
FILES = sorted(path for path in CORPUS.glob("*/*"))
MADE = [(name, seed, index) for name, pairs in SEEDS.items() for seed, index in pairs]


class Surfaces(dict[str, Surface]):
    """Those in use, opened once."""

    def __init__(self, base: Path, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._base, self._factory = base, factory

    def __missing__(self, name: str) -> Surface:
        module = importlib.import_module(f"fuzz.surfaces.{PLANS[name].module}")
        self[name] = module.open_surface(self._base, self._factory.mktemp(name))
        return self[name]


@pytest.fixture(scope="module")
def surfaces(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Surfaces:
    """All surfaces, opened when they are asked for."""
    return Surfaces(base, tmp_path_factory)


def check(name: str, surface: Surface, given: Input, folder: Path) -> None:
    """Accepted, or refused in a sentence."""
    with (folder / "written").open("w+") as written:
        outcome = run_input(surface, given, PLANS[name], written.fileno(), (10, 8))
    assert outcome.finding is None, outcome.finding


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_file(path: Path, surfaces: Surfaces, tmp_path: Path) -> None:
    check(path.parent.name, surfaces[path.parent.name], Input.read(path), tmp_path)


@pytest.mark.parametrize(("name", "seed", "index"), MADE)
def test_a_made_input(name: str, seed: int, index: int, surfaces: Surfaces, tmp_path: Path) -> None:
    check(name, surfaces[name], surfaces[name].make(numbers(name, seed, index)), tmp_path)


def test_files_belong_to_surfaces() -> None:
    assert {path.parent.name for path in FILES} | set(SEEDS) <= set(SURFACES)
