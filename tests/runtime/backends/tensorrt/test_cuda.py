"""The calls of CUDA, as far as a machine without a GPU can answer them."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tensorrt import FakeGpu

from owl2 import BackendError
from owl2.runtime.backends.tensorrt.cuda import CudaGpu, Slots, Strided, host_address, version_problem


@pytest.mark.parametrize(
    ("driver", "built", "message"),
    [(12060, 12090, ""), (13000, 12090, ""), (12060, 13040, r"driver knows CUDA 12.6, .*CUDA 13.4; .*==12.*")],
)
def test_a_package_for_a_newer_driver(driver: int, built: int, message: str) -> None:
    runtime = SimpleNamespace(
        cudaError_t=SimpleNamespace(cudaSuccess=0),
        cudaDriverGetVersion=lambda: (0, driver),
        cudaRuntimeGetVersion=lambda: (0, built),
    )
    assert re.search(message, version_problem(runtime))
    assert bool(version_problem(runtime)) == bool(message)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda gpu: gpu.name, "cudaGetDeviceProperties"),
        (lambda gpu: gpu.compute_capability, "cudaDeviceGetAttribute"),
        (lambda gpu: gpu.use(), "cudaSetDevice"),
        (lambda gpu: gpu.memory(), "cudaMemGetInfo"),
        (lambda gpu: gpu.allocate(256), "cudaMalloc"),
        (lambda gpu: gpu.free(256), "cudaFree"),
        (lambda gpu: gpu.create_stream(), "cudaStreamCreateWithFlags"),
        (lambda gpu: gpu.destroy_stream(1), "cudaStreamDestroy"),
        (lambda gpu: gpu.synchronize(1), "cudaStreamSynchronize"),
        (lambda gpu: gpu.upload(256, np.zeros(3), 1), "cudaMemcpyAsync"),
        (lambda gpu: gpu.download(np.zeros(3), 256, 1), "cudaMemcpyAsync"),
        (lambda gpu: gpu.copy(Strided(256, 512), Strided(1024, 512), 512, 3, 1), "cudaMemcpy2DAsync"),
        (lambda gpu: gpu.clear(256, 3, 1), "cudaMemsetAsync"),
        (lambda gpu: gpu.begin_capture(1), "cudaStreamBeginCapture"),
        (lambda gpu: gpu.end_capture(1), "cudaStreamEndCapture"),
        (lambda gpu: gpu.launch(1, 1), "cudaGraphLaunch"),
        (lambda gpu: gpu.destroy_graph(0), "cudaGraphExecDestroy"),
    ],
)
def test_the_real_package_takes_every_call(call: Callable[[CudaGpu], object], name: str) -> None:
    """It answers that there is no driver, and not that names or arguments are wrong."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python has no wheel here")
    if runtime.cudaDriverGetVersion()[1]:
        pytest.skip("these calls would reach a GPU with made-up addresses")
    with pytest.raises(BackendError, match=rf"^{name} failed: cudaErrorInsufficientDriver$"):
        call(CudaGpu(runtime, 0))


def test_more_memory_than_there_is() -> None:
    codes = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=SimpleNamespace(name="cudaErrorMemoryAllocation"))

    def cudaMalloc(size: int) -> tuple[object, None]:
        return codes.cudaErrorMemoryAllocation, None

    def cudaMemGetInfo() -> tuple[int, int, int]:
        return 0, 50 << 20, 7000 << 20

    runtime = SimpleNamespace(cudaError_t=codes, cudaMalloc=cudaMalloc, cudaMemGetInfo=cudaMemGetInfo)
    with pytest.raises(BackendError, match=r"no room for 100 MiB: 50 of 7000 MiB are free; .*smaller context"):
        CudaGpu(runtime, 0).allocate(100 << 20)


def test_arrays_in_pieces() -> None:
    with pytest.raises(BackendError, match="cannot be copied as one block"):
        host_address(np.zeros((4, 4))[:, :2])


def test_a_slot_that_cannot_grow_stays() -> None:
    gpu = FakeGpu()
    slots = Slots(gpu)
    address = slots.reserve("mask", 100)
    gpu.limit = 1024
    with pytest.raises(BackendError, match="no room"):
        slots.reserve("mask", 1000)
    assert slots.reserve("mask", 256) == address
    gpu.limit = 2048
    assert slots.reserve("mask", 1000) != address
    assert list(gpu.allocations) == [slots.reserve("mask", 1000)]
