"""Installation of ONNX Runtime for a device: its wheel, NVIDIA's libraries, the plugin of TensorRT for RTX.

ONNX Runtime continues on the CPU when a library of a GPU provider cannot be loaded, and only its log says so. So
:func:`diagnose` tries first what a device needs, and names the package that each missing part comes with.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from owl2.runtime.backends.nvidia import DRIVER_LIBRARIES, driver_missing, driver_problem
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError
from owl2.runtime.placement import Placement

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""ONNX Runtime's provider for each kind of device."""
MINIMUM_VERSIONS = {"cuda": "1.24", "tensorrt-rtx": "1.25"}
"""The first version that tells which provider got which node, and that allocates in the memory of a plugin's GPU."""
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
RTX_PLUGIN_WHEEL = RTX_PLUGIN.replace("_", "-")
RTX_REGISTRATION = "owl2.tensorrt-rtx"
FIRST_CUDA_WITHOUT_SUFFIX = 13
"""From this major version on the names of NVIDIA's wheels of CUDA do not end with the version."""
_CUDA_LIBRARIES = (
    ("libcudart.so.{major}", "nvidia-cuda-runtime{suffix}"),
    ("libcublasLt.so.{major}", "nvidia-cublas{suffix}"),
    ("libcublas.so.{major}", "nvidia-cublas{suffix}"),
    ("libcurand.so.10", "nvidia-curand{suffix}"),
    ("libcudnn.so.9", "nvidia-cudnn-cu{major}"),
)


def diagnose(device: Placement) -> list[str]:
    """Sentences on why ONNX Runtime cannot use a device, empty if it can; loads the libraries that it needs.

    The only one on the CPU is on wheels that overwrite each other's files, which may work for now.
    """
    wheels = onnxruntime_wheels()
    mixed = overlap(wheels, device.kind)
    if mixed or device.on_host:
        return [mixed] if mixed else []
    import onnxruntime as ort

    wheel, minimum = next(iter(wheels), "onnxruntime"), MINIMUM_VERSIONS[device.kind]
    available = ort.get_available_providers()
    if device.kind == "cuda" and PROVIDERS["cuda"] not in available:
        return [
            f"the installed {wheel} {ort.__version__} has only {', '.join(available)}, not {PROVIDERS['cuda']}: "
            f"pip uninstall -y {wheel}; pip install 'owl2[cuda]'"
        ]
    if is_older(ort.__version__, minimum):
        return [
            f"{wheel} {ort.__version__} is installed, {minimum} or newer is needed, which has wheels for Python 3.11 "
            f"and newer: pip install -U {wheel}"
        ]
    problems = _cuda_problems(device.index) if device.kind == "cuda" else [_rtx_problem(device.index, wheel)]
    return [problem for problem in problems if problem]


def _cuda_problems(index: int) -> list[str]:
    import onnxruntime as ort

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    major = ort.cuda_version.partition(".")[0]
    wheels = cuda_libraries(int(major)) if major else {}
    return [library_problem(absent(wheels), wheels), driver_problem(index)]


def _rtx_problem(index: int, wheel: str) -> str:
    if find_spec(RTX_PLUGIN) is None:
        # The extra would install the wheel for CPUs over another one.
        missing = "'owl2[tensorrt-rtx]'" if wheel == "onnxruntime" else RTX_PLUGIN_WHEEL
        return f"ONNX Runtime's plugin for TensorRT-RTX is not installed: pip install {missing}"
    problem = driver_problem(index) or _load_rtx_plugin()
    if problem:
        return problem
    found = len(rtx_devices())
    if index < found:
        return ""
    return f"TensorRT-RTX can use {found} of this machine's GPUs; it needs a GeForce RTX or one of its relatives"


def _load_rtx_plugin() -> str:
    """Register the plugin with ONNX Runtime, or a sentence on why that is not possible."""
    import onnxruntime as ort

    try:
        library = Path(importlib.import_module(RTX_PLUGIN).get_library_path())
        for runtime in library.parent.glob("libcudart.so.*"):
            # Version 0.5 has it under a name by which its own library does not ask for it.
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        ort.register_execution_provider_library(RTX_REGISTRATION, str(library))
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        text = " ".join(str(error).split()) or type(error).__name__
        missing = missing_library(text)
        if missing in DRIVER_LIBRARIES:
            return driver_missing(f"{missing} is missing")
        if missing is not None:
            return f"its plugin needs {missing}: pip install --force-reinstall {RTX_PLUGIN_WHEEL}"
        return text
    return ""


def rtx_devices() -> list[Any]:
    """The GPUs that TensorRT-RTX can use, once its plugin is registered."""
    import onnxruntime as ort

    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDERS["tensorrt-rtx"]]


def check_onnxruntime(minimum: str) -> None:
    """Refuse an ONNX Runtime older than ``minimum``.

    Raises:
        BackendUnavailableError: it is older, or not installed.
        BundleCorruptError: ``minimum`` is not a version.
    """
    version = onnxruntime_version()
    if is_older(version, minimum):
        raise BackendUnavailableError(
            f"this bundle needs onnxruntime {minimum} or newer, {version} is installed; upgrade it "
            f"({upgrade_command()})"
        )


def upgrade_command() -> str:
    """The command that upgrades the installed ONNX Runtime; a second wheel would overwrite its files."""
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
    """The version of the installed ONNX Runtime.

    Raises:
        BackendUnavailableError: it is not installed, or cannot be loaded.
    """
    with needs_onnxruntime():
        # Where a wheel was removed but left files behind, this is a module without content.
        from onnxruntime import __version__
    return str(__version__)


@contextlib.contextmanager
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
        raise BackendUnavailableError(import_problem(onnxruntime_wheels(), str(error))) from error


def import_problem(wheels: Mapping[str, str], text: str) -> str:
    """A sentence on an ONNX Runtime that cannot be imported.

    Args:
        wheels: see :func:`onnxruntime_wheels`.
        text: of the error.
    """
    if not wheels:
        return (
            "ONNX Runtime is not installed: pip install 'owl2[cpu]', or 'owl2[cuda]' for an NVIDIA GPU; install only "
            "one of them, because their files have the same names"
        )
    return (
        f"the files of {' and '.join(wheels)} are not complete ({text}): perhaps another wheel with files of the same "
        f"names was removed or replaced; pip install --force-reinstall --no-deps {list(wheels)[-1]}"
    )


def onnxruntime_wheels() -> dict[str, str]:
    """Names and versions of the installed distributions that own the package ``onnxruntime``."""
    wheels = {}
    for distribution in metadata.distributions():
        name, files = distribution.metadata["Name"] or "", distribution.files or ()
        if name.startswith(("onnxruntime", "ort-")) and "onnxruntime/__init__.py" in map(str, files):
            wheels[name] = distribution.version
    return dict(sorted(wheels.items()))


def overlap(wheels: Mapping[str, str], extra: str) -> str:
    """A sentence on several distributions of ONNX Runtime in one environment; empty if there is at most one.

    Args:
        wheels: see :func:`onnxruntime_wheels`.
        extra: of owl2, which installs the right one.
    """
    if len(wheels) < 2:
        return ""
    named = " and ".join(f"{name} {version}" for name, version in wheels.items())
    return (
        f"{named} are installed in one environment and overwrite each other's files; keep one: "
        f"pip uninstall -y {' '.join(wheels)}; pip install 'owl2[{extra}]'"
    )


def missing_library(text: str) -> str | None:
    """The file that is missing according to a message of the dynamic loader, or of ONNX Runtime quoting it."""
    found = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file", text)
    return found and found[1]


def cuda_libraries(major: int) -> dict[str, str]:
    """Files that ONNX Runtime's CUDA provider needs, each with its package.

    Args:
        major: version of CUDA that the provider was built for.
    """
    suffix = "" if major >= FIRST_CUDA_WITHOUT_SUFFIX else f"-cu{major}"
    return {library.format(major=major): wheel.format(major=major, suffix=suffix) for library, wheel in _CUDA_LIBRARIES}


def absent(libraries: Iterable[str]) -> dict[str, str]:
    """The libraries that the dynamic loader cannot load, each with its message."""
    problems = {}
    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError as error:
            problems[library] = str(error)
    return problems


def library_problem(problems: Mapping[str, str], wheels: Mapping[str, str]) -> str:
    """A sentence on libraries that could not be loaded; empty if all could.

    Args:
        problems: messages of the dynamic loader, by file.
        wheels: packages, by file.
    """
    if not problems:
        return ""
    named = []
    for library, text in problems.items():
        cause = missing_library(text) or text
        named.append(library if cause == library else f"{library} (because of {cause})")
    packages = dict.fromkeys(wheels[library] for library in problems)
    return f"{', '.join(named)} cannot be loaded: pip install {' '.join(packages)}, or install CUDA and cuDNN 9"
