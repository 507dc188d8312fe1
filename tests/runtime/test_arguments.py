"""Arguments of public functions whose names or types are wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import owl2
from owl2 import ConfigError, GenerationConfig, Owl2


class Hostile:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no text for this")


deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]
WRONG = [Hostile(), deep, 10**5000, np.zeros((3, 3)), {"a": 1}, b"x", 1.5, "x" * 10_000_000]
PUBLIC: dict[Callable[..., Any], list[str]] = {
    Owl2.load: ["bundle", "device", "threads", "context", "kv_cache", "check_memory", "verify", "progress"],
    owl2.plan: ["bundle", "device", "context", "kv_cache", "images"],
    owl2.verify: ["bundle", "device", "threads", "check_memory", "progress"],
    owl2.evaluate: ["bundle", "data", "against", "limit", "device", "kv_cache", "progress"],
}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, names in PUBLIC.items() for name in names],
    ids=lambda part: getattr(part, "__qualname__", part),
)
def test_no_value_gets_past_the_checks(bundle_a1: Path, function: Callable[..., Any], name: str, value: Any) -> None:
    arguments = {"bundle": bundle_a1, name: value} | ({"data": "x.jsonl"} if function is owl2.evaluate else {})
    if name == "data":
        arguments["data"] = value
    with pytest.raises(owl2.Owl2Error) as caught:
        function(**arguments)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_messages_name_argument_expectation_and_value(bundle_a1: Path) -> None:
    for keyword, message in {
        "threads": "threads must be a whole number or None, got 'two'",
        "progress": "progress must be a function or None, got 'two'",
        "verify": "verify must be True or False, got 'two'",
    }.items():
        with pytest.raises(ConfigError, match=f"^{message}$"):
            Owl2.load(bundle_a1, **{keyword: "two"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^bundle must be a path, got 3$"):
        Owl2.load(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="maxtokens is not an argument of GenerationConfig"):
        GenerationConfig(maxtokens=3)  # type: ignore[call-arg]


def test_numbers_of_numpy_are_numbers() -> None:
    assert GenerationConfig(max_new_tokens=np.int64(3)).max_new_tokens == 3  # type: ignore[arg-type]
