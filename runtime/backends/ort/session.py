"""Opening a session of ONNX Runtime on the device that was asked for, or saying why not.

ONNX Runtime falls back to the CPU on its own in three ways: when a provider is not built in, when its libraries cannot
be loaded, and node by node, where a provider has no kernel for an operator with these element types. None of them is
an error to it. Here all three are.

A native TensorRT backend does not come through here: it opens no session of ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from owl2.runtime.backends.ort.installation import (
    DRIVER_LIBRARIES,
    absent,
    cuda_libraries,
    driver_problem,
    is_older,
    library_problems,
    missing_library,
    no_driver,
    onnxruntime_wheels,
    overlap,
)
from owl2.runtime.backends.ort.onnx_decoder import first_line
from owl2.runtime.errors import BackendError, BackendUnavailableError, Owl2Warning
from owl2.runtime.placement import Placement

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
RTX_REGISTRATION = "owl2.tensorrt-rtx"
MINIMUM: dict[str, str] = {"cuda": "1.24", "tensorrt-rtx": "1.25"}
"""The first version that tells which provider got which node, and that allocates in the memory of a plugin's GPU."""

HOST_OPERATORS = frozenset({"Cast", "Concat", "Gather", "Shape", "Size", "Slice", "Squeeze", "Unsqueeze"})
"""What may stay on the CPU: ONNX Runtime computes shapes there on purpose, a few integers per step.

``session.disable_cpu_ep_fallback`` would refuse these too, and with them every graph that has a ``Shape``.
"""
_LISTED = 4


def open_session(
    path: Path, device: Placement, settings: ort.SessionOptions, skipped: Iterable[str] = ()
) -> ort.InferenceSession:
    """Load a graph onto a device; every node that computes is there, or it is an error.

    Args:
        path: of the graph.
        device: where it shall run.
        settings: of the session; the provider may be added to them.
        skipped: names of graph optimizers to leave out.

    Raises:
        BackendUnavailableError: the device cannot be had here; says what is missing.
        BackendError: ONNX Runtime refuses the graph, or would run a part of it elsewhere.
    """
    prepare(device)
    if not device.on_host:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        # The fallback of the Python class prints to stdout and takes the CPU.
        session = ort.InferenceSession(
            path,
            settings,
            providers=_providers(device, settings),
            disabled_optimizers=list(skipped),
            enable_fallback=0,
        )
    except BackendUnavailableError:
        raise
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        raise BackendError(f"{path} cannot be loaded: {first_line(error)}") from error
    if not device.on_host:
        check_placement(path, device, session.get_providers(), assignments(session))
    return session


@lru_cache
def prepare(device: Placement) -> None:
    """Check, once, that a device can be had, and load what it needs.

    Warns:
        Owl2Warning: several wheels of ONNX Runtime are in each other's way, which the CPU may survive.

    Raises:
        BackendUnavailableError: it cannot be had; says everything that is missing.
    """
    wheels = onnxruntime_wheels()
    mixed = overlap(wheels, device.kind)
    if device.on_host:
        if mixed:
            warnings.warn(mixed, Owl2Warning, stacklevel=2)
        return
    raise_for(device, [mixed])
    wheel = next(iter(wheels), "onnxruntime")
    if device.kind == "cuda":
        _prepare_cuda(device, wheel)
    else:
        _prepare_rtx(device, wheel)


def _prepare_cuda(device: Placement, wheel: str) -> None:
    available = ort.get_available_providers()
    if PROVIDERS["cuda"] not in available:
        raise _unavailable(
            device,
            [
                f"the installed {wheel} {ort.__version__} has only {', '.join(available)}, not {PROVIDERS['cuda']}: "
                f"pip uninstall -y {wheel}; pip install 'owl2[cuda]'"
            ],
        )
    raise_for(device, [_too_old(device, wheel)])
    # It prints what it does not find.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    major = ort.cuda_version.partition(".")[0]
    libraries = cuda_libraries(int(major)) if major else {}
    problems = library_problems(absent(libraries), libraries)
    raise_for(device, [*problems, driver_problem(device.index)])


def _too_old(device: Placement, wheel: str) -> str:
    minimum = MINIMUM[device.kind]
    if not is_older(ort.__version__, minimum):
        return ""
    return (
        f"{wheel} {ort.__version__} is installed, {minimum} or newer is needed, which has wheels for Python 3.11 and "
        f"newer: pip install -U {wheel}"
    )


def _prepare_rtx(device: Placement, wheel: str) -> None:
    raise_for(device, [_too_old(device, wheel)])
    if importlib.util.find_spec(RTX_PLUGIN) is None:
        # The extra would put the wheel for CPUs over another one.
        missing = "'owl2[tensorrt-rtx]'" if wheel == "onnxruntime" else RTX_PLUGIN.replace("_", "-")
        raise _unavailable(device, [f"ONNX Runtime's plugin for TensorRT-RTX is not installed: pip install {missing}"])
    raise_for(device, [driver_problem(device.index)])
    register_plugin(device)
    found = len(_rtx_devices())
    if device.index >= found:
        raise _unavailable(
            device, [f"TensorRT-RTX can use {found} of this machine's GPUs; it needs a GeForce RTX or its relatives"]
        )


def register_plugin(device: Placement) -> None:
    """Load the plugin of TensorRT-RTX into ONNX Runtime.

    Raises:
        BackendUnavailableError: it cannot be loaded.
    """
    try:
        plugin = importlib.import_module(RTX_PLUGIN)
        library = Path(plugin.get_library_path())
        for runtime in library.parent.glob("libcudart.so.*"):
            # Version 0.5 brings it under a name by which its own library does not ask for it.
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        ort.register_execution_provider_library(RTX_REGISTRATION, str(library))
    except Exception as error:
        text = first_line(error)
        missing = missing_library(text)
        if missing in DRIVER_LIBRARIES:
            text = no_driver(f"{missing} is missing")
        elif missing is not None:
            text = f"its plugin needs {missing}: pip install --force-reinstall {RTX_PLUGIN.replace('_', '-')}"
        raise _unavailable(device, [text]) from error


def _rtx_devices() -> list[Any]:
    return [one for one in ort.get_ep_devices() if one.ep_name == PROVIDERS["tensorrt-rtx"]]


def _providers(device: Placement, settings: ort.SessionOptions) -> list[Any] | None:
    """What a session is opened with; None where the plugin's device was put into ``settings``."""
    if device.kind == "tensorrt-rtx":
        settings.add_provider_for_devices([_rtx_devices()[device.index]], {})
        return None
    options = {} if device.on_host else {"device_id": str(device.index)}
    return [(PROVIDERS[device.kind], options)]


def assignments(session: ort.InferenceSession) -> list[tuple[str, str]]:
    """Provider and operator of each node.

    Args:
        session: was opened with ``session.record_ep_graph_assignment_info``.
    """
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]


def check_placement(
    path: Path, device: Placement, providers: Sequence[str], assigned: Sequence[tuple[str, str]]
) -> None:
    """Refuse a session that runs elsewhere, as a whole or in part.

    Args:
        path: of the graph, for the message.
        device: was asked for.
        providers: that the session has.
        assigned: see :func:`assignments`.

    Raises:
        BackendUnavailableError: the provider itself fell out.
        BackendError: nodes that compute were given to another provider.
    """
    wanted = PROVIDERS[device.kind]
    if wanted not in providers:
        raise _unavailable(device, [f"ONNX Runtime did not start {wanted} and would have used {', '.join(providers)}"])
    elsewhere = strays(assigned, wanted)
    if elsewhere:
        listed = ", ".join(f"{name} ({count})" for name, count in elsewhere.most_common(_LISTED))
        more = "" if len(elsewhere) <= _LISTED else f" and {len(elsewhere) - _LISTED} other operators"
        raise BackendError(
            f"{path}: {elsewhere.total()} of {len(assigned)} nodes would run on the CPU and not on {device}: "
            f"{listed}{more}; {wanted} has no kernels for them with these types; export the bundle for it with "
            "owl2-export --activations fp16 --vision fp16, or use the device cpu"
        )


def strays(assigned: Iterable[tuple[str, str]], wanted: str) -> Counter[str]:
    """How many nodes of which operators are not where they should be, shape computations apart.

    Args:
        assigned: provider and operator of each node.
        wanted: the provider that was asked for.
    """
    return Counter(operator for provider, operator in assigned if provider != wanted and operator not in HOST_OPERATORS)


def raise_for(device: Placement, problems: Iterable[str]) -> None:
    """Raise if there is any problem; empty sentences are none.

    Raises:
        BackendUnavailableError: with all of them.
    """
    found = [problem for problem in problems if problem]
    if found:
        raise _unavailable(device, found)


def _unavailable(device: Placement, problems: list[str]) -> BackendUnavailableError:
    return BackendUnavailableError(f"device {device} cannot be used: {'; '.join(problems)}")
