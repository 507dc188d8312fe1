"""What is installed for a device: the wheel of ONNX Runtime, NVIDIA's libraries, the driver.

ONNX Runtime goes on with the CPU when a library of a GPU provider cannot be loaded, and tells only its log. So what it
needs is tried here first, and each thing that is missing is named with the package that brings it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata

from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError

DRIVER = "libcuda.so.1"
DRIVER_LIBRARIES = frozenset({DRIVER, "libnvidia-ml.so.1", "libnvidia-ptxjitcompiler.so.1"})
"""What comes with the driver and with nothing else."""
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""
STUB_LIBRARY = 34
"""CUDA_ERROR_STUB_LIBRARY."""
UNNAMED_SINCE = 13
"""From this major version on NVIDIA's wheels of CUDA carry no version in their names."""

_OWNED_FILE = "onnxruntime/__init__.py"
_CUDA_LIBRARIES = (
    ("libcudart.so.{major}", "nvidia-cuda-runtime{suffix}"),
    ("libcublasLt.so.{major}", "nvidia-cublas{suffix}"),
    ("libcublas.so.{major}", "nvidia-cublas{suffix}"),
    ("libcurand.so.10", "nvidia-curand{suffix}"),
    ("libcudnn.so.9", "nvidia-cudnn-cu{major}"),
)
_DRIVER_HINT = (
    "install NVIDIA's driver; in a container, start it with the GPU passed through (docker run --gpus all, or "
    "--runtime nvidia on a Jetson)"
)


def check_onnxruntime(minimum: str) -> None:
    """Refuse an ONNX Runtime older than ``minimum``.

    Raises:
        BackendUnavailableError: it is older, or there is none.
        BundleCorruptError: ``minimum`` is not a version.
    """
    if is_older(onnxruntime_version(), minimum):
        raise BackendUnavailableError(
            f"this bundle needs onnxruntime {minimum} or newer, {onnxruntime_version()} is installed; "
            f"upgrade it ({upgrade_command()})"
        )


def upgrade_command() -> str:
    """How to install a newer ONNX Runtime over the installed one; a second wheel would overwrite its files."""
    return f"pip install -U {' '.join(onnxruntime_wheels()) or 'onnxruntime'}"


def is_older(version: str, minimum: str) -> bool:
    """Whether a version of ONNX Runtime comes before ``minimum``; patch levels do not count.

    Raises:
        BundleCorruptError: one of them is not a version.
    """
    from packaging.version import InvalidVersion, Version  # comes with ONNX Runtime

    try:
        return Version(version).release[:2] < Version(minimum).release[:2]
    except InvalidVersion as error:
        raise BundleCorruptError(f"owl2.json: minimum_onnxruntime {minimum!r} is not a version such as 1.22") from error


def onnxruntime_version() -> str:
    """Of the installed ONNX Runtime.

    Raises:
        BackendUnavailableError: there is none, or it cannot be loaded.
    """
    with needs_onnxruntime():
        # Where files were left behind by a wheel that is gone, this is a module without content.
        from onnxruntime import __version__
    return str(__version__)


@contextmanager
def needs_onnxruntime() -> Iterator[None]:
    """Say what to install where an import of ONNX Runtime fails.

    Raises:
        BackendUnavailableError: it did.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "onnxruntime":
            raise
        raise BackendUnavailableError(broken(onnxruntime_wheels(), str(error))) from error


def broken(wheels: Mapping[str, str], text: str) -> str:
    """A sentence on an ONNX Runtime that cannot be imported.

    Args:
        wheels: see :func:`onnxruntime_wheels`.
        text: of the error.
    """
    if not wheels:
        return (
            "ONNX Runtime is not installed: pip install 'owl2[cpu]', or 'owl2[cuda]' for an NVIDIA GPU; only one of "
            "them, for their files have the same names"
        )
    return (
        f"the files of {' and '.join(wheels)} are not complete ({text}): perhaps another wheel with files of the same "
        f"names was removed or replaced; pip install --force-reinstall --no-deps {list(wheels)[-1]}"
    )


def onnxruntime_wheels(path: Sequence[str] | None = None) -> dict[str, str]:
    """Names and versions of the installed distributions that own the package ``onnxruntime``.

    Args:
        path: folders to look into; None for those of this interpreter.
    """
    found = metadata.distributions() if path is None else metadata.distributions(path=list(path))
    wheels = {}
    for distribution in found:
        name = distribution.metadata["Name"] or ""
        if name.startswith(("onnxruntime", "ort-")) and _owns(distribution.files, _OWNED_FILE):
            wheels[name] = distribution.version
    return dict(sorted(wheels.items()))


def _owns(files: Iterable[metadata.PackagePath] | None, name: str) -> bool:
    return any(file.as_posix() == name for file in files or ())


def overlap(wheels: Mapping[str, str], extra: str) -> str:
    """A sentence on several distributions of ONNX Runtime in one environment; empty if there are not.

    Args:
        wheels: see :func:`onnxruntime_wheels`.
        extra: of owl2, that brings the right one.
    """
    if len(wheels) < 2:
        return ""
    named = " and ".join(f"{name} {version}" for name, version in wheels.items())
    return (
        f"{named} are installed in one environment and overwrite each other's files; keep one: "
        f"pip uninstall -y {' '.join(wheels)}; pip install 'owl2[{extra}]'"
    )


def missing_library(text: str) -> str | None:
    """The file that a message of the dynamic loader, or of ONNX Runtime quoting it, says is missing."""
    found = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file", text)
    return found and found[1]


def cuda_libraries(major: int) -> dict[str, str]:
    """Files that ONNX Runtime's CUDA provider needs, each with the package that brings it.

    Args:
        major: version of CUDA that it was built for.
    """
    suffix = "" if major >= UNNAMED_SINCE else f"-cu{major}"
    return {library.format(major=major): wheel.format(major=major, suffix=suffix) for library, wheel in _CUDA_LIBRARIES}


def absent(libraries: Iterable[str], load: Callable[[str], object] = ctypes.CDLL) -> dict[str, str]:
    """Those that the dynamic loader cannot load, each with what it says."""
    problems = {}
    for library in libraries:
        try:
            load(library)
        except OSError as error:
            problems[library] = str(error)
    return problems


def library_problems(problems: Mapping[str, str], wheels: Mapping[str, str]) -> list[str]:
    """A sentence on the libraries that could not be loaded; none if there are none.

    Args:
        problems: what the dynamic loader said, by file.
        wheels: packages by file.
    """
    if not problems:
        return []
    named = []
    for library, text in problems.items():
        cause = missing_library(text) or text
        named.append(library if cause == library else f"{library} (for want of {cause})")
    packages = dict.fromkeys(wheels[library] for library in problems)
    return [f"{', '.join(named)} cannot be loaded: pip install {' '.join(packages)}, or install CUDA and cuDNN 9"]


def no_driver(text: str) -> str:
    """A sentence on a driver that cannot be loaded.

    Args:
        text: what the dynamic loader says.
    """
    return f"NVIDIA's driver cannot be loaded ({text}): {_DRIVER_HINT}"


def driver_problem(index: int) -> str:
    """A sentence on why GPU ``index`` cannot be had from the driver; empty if it can."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return no_driver(str(error))
    count = ctypes.c_int()
    try:
        code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except AttributeError:
        return f"{DRIVER} is no driver of NVIDIA: it lacks cuInit"
    return device_problem(code, count.value, index)


def device_problem(code: int, count: int, index: int) -> str:
    """What the driver's answer means for GPU ``index``; empty if it can be used.

    Args:
        code: of ``cuInit`` and ``cuDeviceGetCount``; 0 if both succeeded.
        count: GPUs that the driver sees.
        index: counted from 0.
    """
    if code == STUB_LIBRARY:
        return f"{DRIVER} is the stub that CUDA brings for linking, not a driver: {_DRIVER_HINT}"
    if code not in (0, NO_DEVICE):
        return f"NVIDIA's driver does not start (cuInit answers {code}): see what nvidia-smi says"
    if code == NO_DEVICE or count == 0:
        return (
            "NVIDIA's driver is there but sees no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say, and pass the "
            "GPU through to a container"
        )
    if index >= count:
        return f"GPU {index} is not there: the driver sees {count}, the first is 0"
    return ""
