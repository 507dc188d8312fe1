"""The calls that the fake takes are those of the real TensorRT."""

from __future__ import annotations

import inspect
import re

import fake_tensorrt
import pytest

from owl2.runtime.backends.tensorrt.context import captures_graphs


@pytest.mark.parametrize("name", ["IExecutionContext", "ICudaEngine", "Runtime", "IRuntimeConfig", "ILogger"])
def test_the_fake_has_its_names_and_parameters(name: str) -> None:
    real = getattr(pytest.importorskip("tensorrt_rtx", reason="there is no wheel here"), name)
    ours = {key: value for key, value in vars(getattr(fake_tensorrt, name)).items() if not key.startswith("_")}
    assert ours
    for key, value in ours.items():
        assert hasattr(real, key), key
        if inspect.isfunction(value):
            wanted = list(inspect.signature(value).parameters)
            offered = [re.findall(r"(\w+):", line) for line in signatures(getattr(real, key))]
            assert wanted in offered or name == "ILogger", f"{key}{wanted}: {offered}"


def signatures(function: object) -> list[str]:
    """Of all overloads, from the documentation that TensorRT's functions carry."""
    text = inspect.getdoc(function) or ""
    return [
        re.sub("= <.*?>", "", line.split("->")[0])
        for line in text.splitlines()
        if re.match(r"(\d+\. )?\w+\(self", line)
    ]


def test_enumerators() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="there is no wheel here")
    for name in ("DataType", "TensorLocation", "ExecutionContextAllocationStrategy", "CudaGraphStrategy"):
        for member in vars(getattr(fake_tensorrt, name)):
            assert hasattr(getattr(trt, name), member), f"{name}.{member}"
    assert captures_graphs(trt)
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")
