"""The harness sees what it is made for."""

from pathlib import Path

import pytest

from fuzz.campaign import Campaign
from fuzz.outcome import message_problem
from fuzz.surface import PLANS, SURFACES, Input, numbers
from fuzz.surfaces.harness import open_surface

SEEN = {
    "accepted": "accepted", "refused": "refused", "exception": "exception", "message": "message", "lines": "message",
    "control": "message", "warning": "warning", "stderr": "stderr", "memory": "memory", "cpu": "cpu", "hang": "hang",
    "deaf": "hang",
    "crash": "crash", "exit": "exception", "quit": "crash",
}  # fmt: skip


@pytest.mark.parametrize("deed", SEEN)
def test_every_broken_promise_is_seen(deed: str, tmp_path: Path) -> None:
    path = tmp_path / "harness" / Input(deed, b"").file_name
    path.parent.mkdir()
    path.write_bytes(b"")
    campaign = Campaign(tmp_path, seed=0)
    campaign.repeat("harness", path, wall=1 if deed in ("hang", "deaf") else 100, cpu=0.5 if deed == "cpu" else 10)
    assert dict(campaign.tallies["harness"].outcomes) == {SEEN[deed]: 1}
    assert bool(campaign.found) == (deed not in ("accepted", "refused"))


def test_a_crash_costs_one_input(tmp_path: Path) -> None:
    ending = ("crash", "quit")
    seed = next(
        seed for seed in range(20_000) if made(seed, 0) in ending and made(seed, 1) == made(seed, 2) == "refused"
    )
    campaign = Campaign(tmp_path, seed)
    campaign.run_inputs(["harness"], 3, jobs=1)
    assert dict(campaign.tallies["harness"].outcomes) == {"crash": 1, "refused": 2}
    (found,) = campaign.found.values()
    assert (found.index, Input.read(Path(found.file)).target) == (0, made(seed, 0))


def made(seed: int, index: int) -> str:
    """What the harness does with this input."""
    return open_surface(Path(), Path()).make(numbers("harness", seed, index)).target


def test_an_input_is_kept_as_it_was(tmp_path: Path) -> None:
    given = Input("one.model.safetensors", b"\0\xff")
    path = tmp_path / given.file_name
    path.write_bytes(given.content)
    assert Input.read(path) == given


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("threads must be positive, got 0", ""),
        ("2 problems:\n  line 1: is not JSON\n  line 2: is empty", ""),
        ("one\ntwo", "several lines"),
        ("\x1b[31mred", "control characters"),
        ("", "empty"),
        ("x" * 2001, "too long"),
    ],
)
def test_messages(message: str, problem: str) -> None:
    assert message_problem(message) == problem


def test_shares() -> None:
    assert sum(PLANS[name].share for name in SURFACES) == pytest.approx(1, abs=0.01)
