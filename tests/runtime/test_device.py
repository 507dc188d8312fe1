"""Names of devices."""

import pytest

from owl2.runtime import ConfigError
from owl2.runtime.device import Device


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device("cpu")),
        ("cuda", Device("cuda", 0)),
        ("cuda:0", Device("cuda", 0)),
        ("cuda:12", Device("cuda", 12)),
        ("tensorrt-rtx", Device("tensorrt-rtx")),
        ("tensorrt-rtx:1", Device("tensorrt-rtx", 1)),
    ],
)
def test_names(text: str, device: Device) -> None:
    assert Device.parse(text) == device
    assert Device.parse(str(device)) == device


@pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cpu:0", "cuda:", "cuda:-1", "cuda:first", "cuda:1:2", "cuda:²"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not known; give cpu, cuda\[:N\] or tensorrt-rtx\[:N\], as in cuda:1"):
        Device.parse(text)


def test_only_the_cpu_shares_the_memory_of_the_process() -> None:
    assert Device.parse("cpu").on_host
    assert not Device.parse("cuda").on_host
