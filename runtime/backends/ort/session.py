"""Sessions of ONNX Runtime on the device that was asked for, or an error that says why not.

ONNX Runtime falls back to the CPU by itself in three ways: when a provider is not built in, when its libraries cannot
be loaded, and node by node, where a provider has no kernel for an operator with these element types. None of them is
an error to it. Here all three are.
"""

from __future__ import annotations

import mmap
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from owl2.runtime import spec
from owl2.runtime.backends.ort.installation import PROVIDERS, diagnose, rtx_devices
from owl2.runtime.backends.ort.stoppable import LOG_FATAL, first_line, run_stoppable
from owl2.runtime.cancellation import Cancellation
from owl2.runtime.engine import Floats, check_threads
from owl2.runtime.errors import BackendError, BackendUnavailableError, Owl2Warning
from owl2.runtime.foreign import reading, reason
from owl2.runtime.graph_file import external_tensors
from owl2.runtime.placement import HOST, Placement
from owl2.runtime.spec import FloatType, KvType

Element = type[np.float32 | np.float16 | np.int8]
ELEMENTS: dict[KvType, tuple[Element, str]] = {
    "fp32": (np.float32, "tensor(float)"),
    "fp16": (np.float16, "tensor(float16)"),
    "int8": (np.int8, "tensor(int8)"),
}
"""Element types of activations and K/V caches, as numpy and ONNX Runtime name them."""
Tensor = tuple[tuple[int | None, ...], str | None]
"""Shape and element type of an input or output; None for any."""
SHAPE_OPERATORS = frozenset({"Cast", "Concat", "Gather", "Shape", "Size", "Slice", "Squeeze", "Unsqueeze"})
"""Operators that may stay on the CPU: ONNX Runtime computes shapes there on purpose, a few integers per step.

``session.disable_cpu_ep_fallback`` would refuse these too, and with them every graph that has a ``Shape``.
"""
HELD_TYPES = {1: np.float32, 10: np.float16}
"""Element types of tensors that are held in memory, by ONNX's number. Integers are the codes of matrices, which ONNX
Runtime copies anyway."""
HELD_BYTES = 8 << 20
"""Largest such tensor; the scales and position embeddings of a 7B model have up to 4 MB each, 0.3 GB together."""
MAX_LISTED_OPERATORS = 4
LOG_ERRORS = 3
"""Severity of ONNX Runtime's log."""


@dataclass(frozen=True, slots=True)
class OrtOptions:
    """Settings of ONNX Runtime's sessions.

    Attributes:
        device: where graphs run.
        threads: of one operator; None lets ONNX Runtime choose the physical cores.
        kv_cache, activations: types of the K/V cache and of the activations that a graph must have; None for any.
        frugal: keep weights as they are in the file instead of a faster copy in memory. Slow; for checks.
        exact: do not quantize activations where a graph leaves that to ONNX Runtime. Slow; for checks.
    """

    device: Placement = HOST
    threads: int | None = None
    kv_cache: KvType | None = None
    activations: FloatType | None = None
    frugal: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_threads(self.threads)


DEFAULT_OPTIONS = OrtOptions()


@lru_cache
def prepare_device(device: Placement) -> None:
    """Check, once, that ONNX Runtime can use a device, and load what it needs.

    Warns:
        Owl2Warning: several wheels of ONNX Runtime overwrite each other's files, which the CPU may survive.

    Raises:
        BackendUnavailableError: it cannot; names everything that is missing.
    """
    problems = "; ".join(diagnose(device))
    if problems and not device.on_host:
        raise _unavailable(device, problems)
    if problems:
        warnings.warn(problems, Owl2Warning, stacklevel=2)


def open_session(path: Path, options: OrtOptions) -> ort.InferenceSession:
    """Load a graph; every node that computes is on the device, or it is an error.

    Raises:
        BackendUnavailableError: the device is not available; says what is missing.
        BackendError: ONNX Runtime refuses the graph, or would run a part of it elsewhere.
    """
    device, skipped, providers = options.device, [], None
    prepare_device(device)
    settings = ort.SessionOptions()
    # Failures come back as exceptions; of a GPU's provider, the log may say more.
    settings.log_severity_level = LOG_FATAL if device.on_host else LOG_ERRORS
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if options.frugal:
        settings.add_session_config_entry("session.disable_prepacking", "1")
        skipped = ["ConstantFolding"]
    if options.exact:
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    held = held_tensors(path) if device.on_host else None
    if not device.on_host:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device.kind == "tensorrt-rtx":
        settings.add_provider_for_devices([rtx_devices()[device.index]], {})
    else:
        providers = [(PROVIDERS[device.kind], {} if device.on_host else {"device_id": str(device.index)})]
    try:
        if held is not None:
            settings.add_external_initializers(*held)
        # The fallback of the Python class prints to stdout and takes the CPU.
        session = ort.InferenceSession(
            path, settings, providers=providers, disabled_optimizers=skipped, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        raise BackendError(f"{path} cannot be loaded: {first_line(error)}") from error
    if not device.on_host:
        check_assignments(path, device, session.get_providers(), assignments(session))
    return session


def held_tensors(path: Path) -> tuple[list[str], list[ort.OrtValue]]:
    """Names and values of the tensors of a graph that are read into memory.

    ONNX Runtime maps the file of external data, copies the matrices into the layout of its kernels, and goes on using
    the mapping for the rest: scales, biases and norms. A program that truncated the file would then kill the process.

    Raises:
        BackendError: the graph or its external data cannot be read.
    """
    names, values = [], []
    try:
        for tensor in external_tensors(path):
            dtype = HELD_TYPES.get(tensor.element)
            if tensor.initializer and dtype is not None and tensor.length <= HELD_BYTES:
                content = mmap.mmap(-1, tensor.length)  # what ONNX Runtime copies goes back to the system at once
                with (path.parent / tensor.location).open("rb") as file:
                    file.seek(tensor.offset)
                    if file.readinto(content) != tensor.length:
                        raise ValueError(f"{tensor.location} ends before {tensor.name}")
                values.append(ort.OrtValue.ortvalue_from_numpy(np.frombuffer(content, dtype).reshape(tensor.shape)))
                names.append(tensor.name)
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} cannot be loaded: {reason(error)}") from error
    return names, values


def assignments(session: ort.InferenceSession) -> list[tuple[str, str]]:
    """Provider and operator of each node of a session that records them."""
    subgraphs = session.get_provider_graph_assignment_info()
    return [(subgraph.ep_name, node.op_type) for subgraph in subgraphs for node in subgraph.get_nodes()]


def check_assignments(
    path: Path, device: Placement, providers: Sequence[str], assigned: Sequence[tuple[str, str]]
) -> None:
    """Refuse a session that runs elsewhere, as a whole or in part; ``assigned`` is from :func:`assignments`.

    Raises:
        BackendUnavailableError: the device's provider is not among ``providers``.
        BackendError: nodes that compute were given to another provider.
    """
    wanted = PROVIDERS[device.kind]
    if wanted not in providers:
        raise _unavailable(device, f"ONNX Runtime did not start {wanted} and would have used {', '.join(providers)}")
    elsewhere = strays(assigned, wanted)
    if elsewhere:
        listed = ", ".join(f"{name} ({count})" for name, count in elsewhere.most_common(MAX_LISTED_OPERATORS))
        others = len(elsewhere) - MAX_LISTED_OPERATORS
        raise BackendError(
            f"{path}: {elsewhere.total()} of {len(assigned)} nodes would run on the CPU and not on {device}: {listed}"
            f"{f' and {others} other operators' if others > 0 else ''}; {wanted} has no kernels for them with these "
            "types; export the bundle for it with owl2-export --activations fp16 --vision fp16, or use the device cpu"
        )


def strays(assigned: Iterable[tuple[str, str]], wanted: str) -> Counter[str]:
    """Count the nodes of each operator that are not on the provider ``wanted``, except computations of shapes."""
    return Counter(
        operator for provider, operator in assigned if provider != wanted and operator not in SHAPE_OPERATORS
    )


def tensors_of(path: Path, session: ort.InferenceSession) -> dict[str, tuple[list[Any], str]]:
    """Shape and element type of each input and output of a graph; raises BackendError if a name in them is no text."""
    with reading(path, BackendError, "export the bundle again"):
        return {value.name: (value.shape, value.type) for value in (*session.get_inputs(), *session.get_outputs())}


def check_tensors(path: Path, session: ort.InferenceSession, expected: Mapping[str, Tensor]) -> None:
    """Refuse a graph whose inputs and outputs are not those of the model."""
    found = tensors_of(path, session)
    for name, (shape, element) in expected.items():
        have, of = found.get(name, (None, None))
        problem = ""
        if have is None or len(have) != len(shape) or any(w not in (None, h) for w, h in zip(shape, have)):
            problem = f"has shape {have}, the model needs {list(shape)}"
        elif element not in (None, of):
            problem = f"is a {of}, a {element} is needed"
        if problem:
            raise BackendError(f"{path} does not fit the manifest: {name} {problem}; export the bundle again")


def element_of(
    path: Path, session: ort.InferenceSession, name: str, expected: KvType | None = None
) -> tuple[Element, str]:
    """The element type of an input, one of :data:`ELEMENTS`, as numpy and ONNX Runtime name it.

    Raises:
        BackendError: it is none of these, or not the ``expected`` one.
    """
    _, found = tensors_of(path, session).get(name, (None, None))
    for kind, (dtype, element) in ELEMENTS.items():
        if element == found and expected in (None, kind):
            return dtype, element
    needed = f", {expected} is needed" if expected else ""
    raise BackendError(f"{path} does not fit the manifest: {name} is {found}{needed}; export the bundle again")


def run_bound(session: ort.InferenceSession, binding: ort.IOBinding, cancellation: Cancellation) -> Floats:
    """Run a decoder whose inputs and K/V outputs are bound -> logits [R, V]; raises as :func:`run_stoppable`."""
    binding.bind_output(spec.LOGITS, "cpu")
    run_stoppable("the decoder", cancellation, lambda options: session.run_with_iobinding(binding, options))
    # Outputs come in the order of binding: keys and values first, the logits last.
    logits: Floats = binding.get_outputs()[-1].numpy()
    return logits


def _unavailable(device: Placement, problems: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"device {device} cannot be used: {problems}")
