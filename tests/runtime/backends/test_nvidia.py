"""Sentences on a driver that does not offer a GPU."""

import ctypes

import pytest

from owl2.runtime.backends import nvidia
from owl2.runtime.backends.nvidia import device_problem, driver_problem


@pytest.mark.parametrize(
    ("code", "count", "index", "text"),
    [
        (0, 1, 0, ""),
        (0, 2, 1, ""),
        (0, 1, 1, "GPU 1 does not exist: the driver sees 1, counted from 0"),
        (0, 0, 0, "NVIDIA's driver is installed but sees no GPU"),
        (100, 0, 0, "NVIDIA's driver is installed but sees no GPU"),
        (34, 0, 0, "libcuda.so.1 is CUDA's stub for linking, not a driver"),
        (803, 0, 0, "NVIDIA's driver does not start (cuInit returns 803)"),
    ],
)
def test_what_its_answers_mean(code: int, count: int, index: int, text: str) -> None:
    problem = device_problem(code, count, index)
    assert problem.startswith(text)
    assert bool(problem) == bool(text)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "DRIVER", "libowl2-has-none.so.1")
    assert driver_problem(0).startswith(
        "NVIDIA's driver cannot be loaded (libowl2-has-none.so.1: cannot open shared object file"
    )


def test_a_library_without_its_functions_is_not_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "DRIVER", "libc.so.6")
    assert ctypes.CDLL("libc.so.6")
    assert driver_problem(0) == "libc.so.6 is not NVIDIA's driver: it lacks cuInit"
