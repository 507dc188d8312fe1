"""NVIDIA's driver, which every backend on its GPUs needs: whether it can be used and, if not, why."""

from __future__ import annotations

import ctypes

DRIVER = "libcuda.so.1"
DRIVER_LIBRARIES = frozenset({DRIVER, "libnvidia-ml.so.1", "libnvidia-ptxjitcompiler.so.1"})
"""Libraries that come only with the driver."""
CUDA_ERROR_STUB_LIBRARY = 34
CUDA_ERROR_NO_DEVICE = 100

_INSTALL_HINT = (
    "install NVIDIA's driver; in a container, pass the GPU through (docker run --gpus all, or --runtime nvidia on a "
    "Jetson)"
)


def driver_problem(index: int) -> str:
    """A sentence on why the driver does not offer GPU ``index``; empty if it does."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return driver_missing(str(error))
    count = ctypes.c_int()
    try:
        code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except AttributeError:
        return f"{DRIVER} is not NVIDIA's driver: it lacks cuInit"
    return device_problem(code, count.value, index)


def driver_missing(reason: str) -> str:
    """A sentence on a driver that the dynamic loader cannot load, for this reason."""
    return f"NVIDIA's driver cannot be loaded ({reason}): {_INSTALL_HINT}"


def device_problem(code: int, count: int, index: int) -> str:
    """A sentence on why GPU ``index`` cannot be used; empty if it can.

    Args:
        code: returned by ``cuInit`` or ``cuDeviceGetCount``; 0 if both succeeded.
        count: GPUs that the driver sees.
        index: counted from 0.
    """
    if code == CUDA_ERROR_STUB_LIBRARY:
        return f"{DRIVER} is CUDA's stub for linking, not a driver: {_INSTALL_HINT}"
    if code not in (0, CUDA_ERROR_NO_DEVICE):
        return f"NVIDIA's driver does not start (cuInit returns {code}): see what nvidia-smi says"
    if code == CUDA_ERROR_NO_DEVICE or count == 0:
        return (
            "NVIDIA's driver is installed but sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, and pass the GPU "
            "through to a container"
        )
    if index >= count:
        return f"GPU {index} does not exist: the driver sees {count}, counted from 0"
    return ""
