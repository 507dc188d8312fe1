"""Names of devices."""

import pytest

from owl2 import ConfigError
from owl2.runtime.placement import Placement


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Placement("cpu")),
        ("cuda", Placement("cuda", 0)),
        ("cuda:0", Placement("cuda", 0)),
        ("cuda:12", Placement("cuda", 12)),
        ("tensorrt", Placement("tensorrt")),
        ("tensorrt-rtx", Placement("tensorrt-rtx")),
        ("tensorrt-rtx:1", Placement("tensorrt-rtx", 1)),
    ],
)
def test_names(text: str, device: Placement) -> None:
    assert Placement.parse(text) == device
    assert Placement.parse(str(device)) == device


@pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cpu:0", "cuda:", "cuda:-1", "cuda:first", "cuda:1:2", "cuda:²"])
def test_what_is_not_a_name(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is not known; use cpu, cuda\[:N\] or tensorrt\[:N\] or tensorrt-rtx\[:N\], as in cuda:1"
    ):
        Placement.parse(text)


def test_only_the_cpu_shares_the_memory_of_the_process() -> None:
    assert Placement.parse("cpu").on_host
    assert not Placement.parse("cuda").on_host
