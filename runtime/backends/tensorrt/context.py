"""Engines and execution contexts of TensorRT, and everything else that a loaded model has to give back."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

from owl2.runtime.backends.tensorrt.cuda import Gpu, Slots, aligned
from owl2.runtime.backends.tensorrt.module import Messages
from owl2.runtime.backends.tensorrt.tensors import Shape
from owl2.runtime.errors import BackendError


def load_engine(runtime: Any, path: Path, messages: Messages) -> Any:  # noqa: ANN401 - TensorRT has no types
    """Deserialize an engine; the file is mapped, so that it is not in memory twice.

    Raises:
        BackendError: TensorRT refuses it.
    """
    messages.clear()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(f"{path} cannot be loaded: {messages.take()}")
    return engine


def captures_graphs(trt: ModuleType) -> bool:
    """Whether this TensorRT captures CUDA graphs by itself.

    TensorRT for RTX does: it compiles kernels while it runs, and only it knows when a graph is worth capturing.
    """
    return hasattr(trt, "CudaGraphStrategy")


class Context:
    """An execution context of one profile: remembers what is bound, and turns refusals into errors."""

    def __init__(self, trt: ModuleType, engine: Any, profile: int, stream: int, messages: Messages) -> None:  # noqa: ANN401
        """Make a context without scratch memory; :meth:`lend` gives it some.

        Args:
            trt: the module.
            engine: to be run.
            profile: optimization profile.
            stream: on which it works.
            messages: of TensorRT's logger.

        Raises:
            BackendError: TensorRT refuses.
        """
        self._messages, self._stream = messages, stream
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self.scratch = int(engine.get_device_memory_size_for_profile_v2(profile))
        messages.clear()
        settings = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if captures_graphs(trt):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(settings)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            settings = config
        self._context = engine.create_execution_context(settings)
        if self._context is None or not self._context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"no execution context for profile {profile}: {messages.take()}")

    def lend(self, address: int, nbytes: int) -> None:
        """Let it use device memory while it runs."""
        self._context.set_device_memory(address, nbytes)

    def bind(self, name: str, address: int, shape: Shape | None = None) -> None:
        """Set the address of an input or output, and the shape of an input.

        Raises:
            BackendError: the shape is outside the profile.
        """
        self._messages.clear()
        if shape is not None and self._shapes.get(name) != shape:
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"TensorRT refuses the shape {list(shape)} of {name}: {self._messages.take()}")
            self._shapes[name] = shape
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise BackendError(f"TensorRT refuses the address {address:#x} of {name}: {self._messages.take()}")
            self._addresses[name] = address

    def enqueue(self, what: str) -> None:
        """Run on the stream.

        Raises:
            BackendError: ``what`` failed.
        """
        self._messages.clear()
        if not self._context.execute_async_v3(self._stream):
            raise BackendError(f"{what} failed: {self._messages.take()}")

    def close(self) -> None:
        """Give TensorRT's own context back; it cannot run any more."""
        self._context = None


class Resources:
    """Everything of a loaded model that has to be given back; apart from the engine, so that a finalizer can hold it.

    Attributes:
        gpu: they are on.
        messages: of TensorRT's logger.
        stream: on which everything happens.
        fixed: device memory of one size, whose addresses CUDA graphs keep.
        growing: device memory that grows with the steps.
        graph: the CUDA graph of a decoding step; 0 for none.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.messages = Messages()
        self.stream = gpu.create_stream()
        self.fixed, self.growing = Slots(gpu), Slots(gpu)
        self.graph = 0
        self._contexts: list[Context] = []
        self._others: list[object] = []

    def keep(self, contexts: list[Context], others: list[object]) -> None:
        """Take over TensorRT's objects, and lend the contexts scratch memory: one block, since one runs at a time.

        Args:
            contexts: to be destroyed first.
            others: engines, runtime and logger, to be destroyed next and in this order.
        """
        self._contexts, self._others = contexts, others
        nbytes = aligned(max(context.scratch for context in contexts))
        address = self.fixed.reserve("scratch", nbytes)
        for context in contexts:
            context.lend(address, nbytes)

    def drop_graph(self) -> None:
        """Give the CUDA graph back."""
        if self.graph:
            graph, self.graph = self.graph, 0
            self.gpu.destroy_graph(graph)

    def close(self) -> None:
        """Give everything back; errors are ignored: the process may be ending, or the GPU may have failed before."""
        with contextlib.suppress(BackendError):
            self.gpu.use()
            self.gpu.synchronize(self.stream)
        with contextlib.suppress(BackendError):
            self.drop_graph()
        for context in self._contexts:
            context.close()
        while self._others:
            self._others.pop(0)
        for slots in (self.fixed, self.growing):
            with contextlib.suppress(BackendError):
                slots.close()
        with contextlib.suppress(BackendError):
            self.gpu.destroy_stream(self.stream)
