"""The table of products."""

from dataclasses import replace

import pytest

from owl2.runtime.errors import ConfigError
from owl2.runtime.fit.products import GIB, PRODUCTS, TENSORRT_RTX, find_product


def test_names_are_unique_and_figures_of_the_right_size() -> None:
    for name, device in PRODUCTS.items():
        assert device.name == name
        assert 4 * GIB <= device.memory <= 128 * GIB
        assert device.bandwidth is not None
        assert 5e10 <= device.bandwidth <= 4e12
        assert device.shared == (device.family == "jetson")
        assert device.engines


def test_engines() -> None:
    assert find_product("orin-nano-8gb").engines == ("tensorrt",)
    assert find_product("rtx3060").engines == ("tensorrt-rtx",)
    assert find_product("thor-128gb").engines == ("tensorrt",)
    assert {device.compute for device in PRODUCTS.values() if "tensorrt-rtx" in device.engines} <= TENSORRT_RTX
    assert not find_product("t4").int4_engines
    assert find_product("rtx3060").int4_engines
    assert not replace(find_product("rtx3060"), family="cpu", compute=None).int4_engines


def test_unknown() -> None:
    with pytest.raises(ConfigError, match=r"device 'rtx1' is not known; known: orin-nano-4gb, .*rtx5090"):
        find_product("rtx1")
