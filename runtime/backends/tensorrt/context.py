"""The calls to TensorRT, whose module is ``tensorrt`` or ``tensorrt_rtx``: engines, contexts, what it has to say."""

from __future__ import annotations

import importlib
import logging
import mmap
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owl2.runtime.backends.tensorrt.cuda import Gpu, aligned
from owl2.runtime.errors import BackendError, BackendUnavailableError
from owl2.runtime.placement import EngineKind

Shape = tuple[int, ...]
MODULES: dict[EngineKind, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
HINTS: dict[EngineKind, str] = {
    "tensorrt": "on a Jetson it comes with JetPack, for the system's Python: make the virtual environment with "
    "python3 -m venv --system-site-packages; on other machines install NVIDIA's TensorRT",
    "tensorrt-rtx": "install it: pip install tensorrt-rtx",
}
KEPT_MESSAGES = 8

log = logging.getLogger(__name__)


def import_tensorrt(kind: EngineKind) -> Any:  # noqa: ANN401 - a module without types
    """The module that runs engines of ``kind``.

    Raises:
        BackendUnavailableError: it cannot be imported.
    """
    try:
        return importlib.import_module(MODULES[kind])
    except Exception as error:  # its libraries are loaded here, and fail in their own ways
        raise BackendUnavailableError(
            f"the Python module {MODULES[kind]} cannot be imported ({error}); {HINTS[kind]}"
        ) from error


class Messages:
    """What TensorRT reported lately: its calls return no reasons."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=KEPT_MESSAGES)

    def logger(self, trt: Any) -> Any:  # noqa: ANN401 - a module without types
        """An ``ILogger`` that reports here; warnings go to :mod:`logging`."""
        serious = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self, messages: Messages) -> None:
                trt.ILogger.__init__(self)
                self._messages = messages

            def log(self, severity: object, message: str) -> None:
                if severity in serious:
                    self._messages.add(message)
                elif severity == trt.ILogger.WARNING:
                    log.debug("TensorRT: %s", message)

        return Logger(self)

    def add(self, message: str) -> None:
        """Keep an error's message."""
        self._errors.append(" ".join(message.split()))

    def forget(self) -> None:
        """Before a call: what was reported until now is no reason for its failure."""
        self._errors.clear()

    def error(self, what: str) -> BackendError:
        """An error that says ``what`` failed and why; the reasons are forgotten."""
        reasons = "; ".join(dict.fromkeys(self._errors)) or "TensorRT gave no reason"
        self._errors.clear()
        return BackendError(f"{what}: {reasons}")


def load_engine(runtime: Any, path: Path, messages: Messages) -> Any:  # noqa: ANN401 - TensorRT has no types
    """Deserialize an engine; the file is mapped, so that it is not in memory twice.

    Raises:
        BackendError: TensorRT refuses it.
    """
    messages.forget()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise messages.error(f"{path} cannot be loaded")
    return engine


def check_engine(
    trt: Any,  # noqa: ANN401
    engine: Any,  # noqa: ANN401
    path: Path,
    expected: Mapping[str, tuple[Shape, Any]],
    profiles: int,
) -> None:
    """Compare inputs and outputs of an engine with those ``expected``: by name, shape (-1 where it varies) and type.

    Raises:
        BackendError: they differ.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: (tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)) for name in names}
    every = dict.fromkeys((*expected, *found))
    differ = [name for name in every if not _fits(found.get(name), expected.get(name))]
    if differ:
        name = differ[0]
        raise BackendError(
            f"{path} does not fit the manifest: {name} is {found.get(name)}, {expected.get(name)} is needed; "
            "build the engines again"
        )
    on_host = [name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE]
    if on_host:
        raise BackendError(f"{path} wants {on_host[0]} in host memory; build the engines again")
    if engine.num_optimization_profiles != profiles:
        raise BackendError(
            f"{path} has {engine.num_optimization_profiles} optimization profiles, {profiles} are needed; build the "
            "engines again"
        )


def _fits(found: tuple[Shape, Any] | None, expected: tuple[Shape, Any] | None) -> bool:
    """What varies in the engine may be a fixed size that is needed; not the other way round."""
    if found is None or expected is None or len(found[0]) != len(expected[0]) or found[1] != expected[1]:
        return False
    return all(have in (need, -1) for have, need in zip(found[0], expected[0]))


class Context:
    """An execution context of one profile: remembers what is bound, and turns refusals into errors."""

    def __init__(
        self,
        trt: Any,  # noqa: ANN401
        engine: Any,  # noqa: ANN401
        profile: int,
        stream: int,
        messages: Messages,
        graphs: bool,
    ) -> None:
        """Make a context without scratch memory; :meth:`lend` gives it some.

        Args:
            trt: the module.
            engine: of which.
            profile: optimization profile.
            stream: on which it works.
            messages: TensorRT's reasons.
            graphs: whether a TensorRT that makes CUDA graphs by itself may do so.

        Raises:
            BackendError: TensorRT refuses.
        """
        self._messages, self._stream = messages, stream
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self.scratch = int(engine.get_device_memory_size_for_profile_v2(profile))
        messages.forget()
        self._context = _create(trt, engine, graphs)
        if self._context is None or not self._context.set_optimization_profile_async(profile, stream):
            raise messages.error(f"no execution context for profile {profile}")

    def lend(self, address: int, nbytes: int) -> None:
        """Let it use device memory while it runs."""
        self._context.set_device_memory(address, nbytes)

    def bind(self, name: str, address: int, shape: Shape | None = None) -> None:
        """Say where an input or output lies, and the shape of an input.

        Raises:
            BackendError: the shape is outside the profile.
        """
        self._messages.forget()
        if shape is not None and self._shapes.get(name) != shape:
            if not self._context.set_input_shape(name, shape):
                raise self._messages.error(f"TensorRT refuses the shape {list(shape)} of {name}")
            self._shapes[name] = shape
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise self._messages.error(f"TensorRT refuses the address {address:#x} of {name}")
            self._addresses[name] = address

    def enqueue(self, what: str) -> None:
        """Run on the stream.

        Raises:
            BackendError: ``what`` failed.
        """
        self._messages.forget()
        if not self._context.execute_async_v3(self._stream):
            raise self._messages.error(f"{what} failed")

    def close(self) -> None:
        """Give TensorRT's own context back; it cannot run any more."""
        self._context = None


def _create(trt: Any, engine: Any, graphs: bool) -> Any:  # noqa: ANN401 - TensorRT has no types
    managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not makes_graphs(trt):
        return engine.create_execution_context(managed)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(managed)
    strategy = trt.CudaGraphStrategy
    config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if graphs else strategy.DISABLED
    return engine.create_execution_context(config)


def makes_graphs(trt: Any) -> bool:  # noqa: ANN401 - a module without types
    """Whether this TensorRT captures CUDA graphs by itself.

    TensorRT for RTX does: it compiles kernels while it runs, and only it knows when a graph is worth capturing.
    """
    return hasattr(trt, "CudaGraphStrategy")


def shared_scratch(device: Gpu, contexts: list[Context]) -> int:
    """Allocate what the hungriest of ``contexts`` needs, for all of them: they never run at the same time.

    Returns:
        Its address.
    """
    nbytes = aligned(max(context.scratch for context in contexts))
    address = device.allocate(nbytes)
    for context in contexts:
        context.lend(address, nbytes)
    return address
