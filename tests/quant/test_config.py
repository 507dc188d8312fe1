"""Settings of quantizing: the values allowed, by name."""

from __future__ import annotations

import dataclasses

import pytest

from owl2.quant.config import GROUP_SIZES, QuantConfig
from owl2.runtime.config import from_json
from owl2.runtime.errors import ConfigError


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_round_trip_through_json(bits: int, group_size: int) -> None:
    config = QuantConfig(bits=bits, group_size=group_size, method="rtn", signed_scales=True)
    assert from_json(QuantConfig, dataclasses.asdict(config), "quant") == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 3, "bits 3 is not supported; use 4 or 8"),
        ("group_size", 8, "group_size 8 is not supported; use one of 16, 32, 64, 128, 256"),
        ("group_size", 96, "group_size 96 is not supported"),
        ("method", "awq", "method 'awq' is not known; use gptq or rtn"),
        ("damping", 0.0, "damping 0.0 must be above 0 and at most 1"),
        ("damping", 1.5, "damping 1.5 must be above 0 and at most 1"),
        ("damping", float("nan"), "damping nan must be above 0"),
    ],
)
def test_bad_values_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**{field: value})  # type: ignore[arg-type]
