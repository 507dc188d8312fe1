"""The device on which layers are computed and quantized while they are exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from owl2.runtime.errors import ConfigError, ExportError
from owl2.runtime.foreign import shorten


def check_device(name: str) -> torch.device:
    """The device called ``name``: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: the installed torch cannot compute there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:  # of an index that is too large, or is not ASCII
        raise ConfigError(f"device {shorten(name)}: torch has no such device; use cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    build = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        raise ConfigError(
            f"device {name}: the installed {build} is built without CUDA; install a build with it "
            "(https://pytorch.org/get-started), or use device cpu"
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError(
            f"device {name}: {build} (CUDA {torch.version.cuda}) finds no GPU; check the driver with nvidia-smi, or "
            "use device cpu"
        )
    if device.index is not None and device.index >= count:
        raise ConfigError(f"device {name}: {build} finds {count} GPUs, the last one is cuda:{count - 1}")
    return device


@contextlib.contextmanager
def device_memory_errors(name: str) -> Iterator[None]:
    """Turn exhausted GPU memory into an ExportError that says what to do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ExportError(
            f"device {name} has too little free memory for a decoder layer and its Hessian (about 6 GiB at 7B); end "
            "other programs on it, or use device cpu"
        ) from error
