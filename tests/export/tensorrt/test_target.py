"""Which engines can be built for which GPU."""

from __future__ import annotations

import pytest

from owl2 import BackendUnavailableError, ConfigError
from owl2.export.tensorrt.profiles import Limits
from owl2.export.tensorrt.target import choose_target, find_gpu, gpu_table
from owl2.runtime.fit.products import PRODUCTS
from owl2.runtime.placement import EngineKind


@pytest.mark.parametrize(
    ("kind", "gpu", "weights", "message"),
    [
        ("tensorrt-rtx", "rtx2080ti", "int4", "SM75.*need compute capability 8.0.*--weights fp16"),
        ("tensorrt-rtx", "agx-orin-64gb", "int4", "does not run tensorrt-rtx engines; it runs tensorrt engines"),
        ("tensorrt-rtx", "h100", "int4", "SM90.*does not run tensorrt-rtx engines; it runs tensorrt engines"),
        ("tensorrt", "rtx3060", "int4", "does not run tensorrt engines; it runs tensorrt-rtx engines"),
        (
            "tensorrt",
            "agx-orin-64gb",
            "int4",
            "built on the GPU that runs them: copy the bundle to",
        ),
        ("tensorrt-rtx", "rtx9999", "int4", "'rtx9999' is not known; known: .*rtx3060"),
        ("tensorrt-rtx", "sm42", "int4", "'sm42' is not known; known: sm75, sm80, sm86"),
    ],
)
def test_a_gpu_that_cannot_have_them_is_refused(kind: EngineKind, gpu: str, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_target(kind, find_gpu(gpu)[0], "onnx", weights, here=False)


def test_turing_may_have_float16() -> None:
    device, here = find_gpu("rtx2080ti")
    assert choose_target("tensorrt-rtx", device, "onnx", "fp16", here=here).compute == 75


def test_graphs_of_the_other_dialect_are_refused() -> None:
    with pytest.raises(ConfigError, match="--dialect onnx"):
        choose_target("tensorrt-rtx", PRODUCTS["rtx3060"], "ort", "int4", here=False)


def test_a_module_that_is_missing_is_named_with_what_brings_it() -> None:
    orin = PRODUCTS["agx-orin-64gb"]
    with pytest.raises(BackendUnavailableError, match="tensorrt is not installed; on a Jetson it comes with JetPack"):
        choose_target("tensorrt", orin, "onnx", "int4", here=True)


def test_every_gpu_is_listed() -> None:
    shown = gpu_table()
    assert all(name in shown for name in PRODUCTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [((0, 1, 1), "context must be positive"), ((64, 65, 1), "65 positions does not fit a context of 64")],
)
def test_limits(settings: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(*settings)
