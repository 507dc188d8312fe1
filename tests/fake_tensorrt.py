"""A GPU and its TensorRT that do not exist: the backend's calls of both are recorded, checked, and done on the CPU.

"Device memory" is host memory at real addresses, full of NaN at first and again after it was given back. Work of a
stream is queued, and done when it is waited for, so an array that is read too early is not filled yet. "Engines" name a
graph, which ONNX Runtime runs with the content of the addresses that were bound. Misuse that a real GPU would answer
with wrong numbers, or not at all, raises :class:`Misuse`.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from owl2.runtime.backends.tensorrt.cuda import ALIGNMENT, Strided
from owl2.runtime.errors import BackendError

POISON = 0xFF  # NaN as float16 and as float32


class Misuse(AssertionError):
    """Something that a GPU would not forgive."""


@dataclass(frozen=True)
class Copy:
    """A copy that was enqueued: ``up``, ``down`` or ``within``; the address is of device memory."""

    direction: str
    address: int
    nbytes: int


@dataclass
class FakeGpu:
    """See :class:`owl2.runtime.backends.tensorrt.cuda.Gpu`.

    Attributes:
        copies: all that were enqueued.
        launches, captures: how many graphs.
        captures_fail: makes every capture fail, as if something could not be recorded.
        limit: bytes of its memory.
    """

    name: str = "Fake Orin"
    compute_capability: tuple[int, int] = (8, 7)
    copies: list[Copy] = field(default_factory=list)
    launches: int = 0
    captures: int = 0
    captures_fail: bool = False
    limit: int = 1 << 40
    allocations: dict[int, NDArray[Any]] = field(default_factory=dict)
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    _kept: list[NDArray[Any]] = field(default_factory=list)
    _recording: list[Callable[[], None]] | None = None
    _handles: int = 100

    @property
    def allocated(self) -> int:
        """Bytes."""
        return sum(array.nbytes for array in self.allocations.values())

    @property
    def recording(self) -> bool:
        """Whether a capture is going on."""
        return self._recording is not None

    def use(self) -> None:
        """This one is always in use."""

    def allocate(self, nbytes: int) -> int:
        if nbytes <= 0:
            raise Misuse(f"{nbytes} bytes were asked for")
        if self.allocated + nbytes > self.limit:
            raise BackendError(f"the GPU has no room for {nbytes} bytes")
        block = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        # Never given back to the process, so that no address comes twice and each stale one is found.
        self._kept.append(block)
        start = -block.ctypes.data % ALIGNMENT
        array = block[start : start + nbytes]
        self.allocations[array.ctypes.data] = array
        return int(array.ctypes.data)

    def free(self, address: int) -> None:
        for stream in self.streams:
            self._drain(stream)
        if address not in self.allocations:
            raise Misuse(f"{address:#x} is not allocated")
        self.allocations.pop(address)[:] = POISON

    def create_stream(self) -> int:
        handle = self._handle()
        self.streams[handle] = []
        return handle

    def destroy_stream(self, stream: int) -> None:
        if self.streams.pop(stream):
            raise Misuse("a stream was destroyed with work left to do")

    def synchronize(self, stream: int) -> None:
        if self.recording:
            raise Misuse("nothing is done while recording, so there is nothing to wait for")
        self._drain(stream)

    def upload(self, address: int, array: NDArray[Any], stream: int) -> None:
        self._copied("up", address, array.nbytes)
        self._contiguous(array)
        nbytes, alive = array.nbytes, weakref.ref(array)

        def work() -> None:
            source = alive()
            if source is None:
                raise Misuse("an array was dropped before it was copied")
            np.copyto(self.bytes(address, nbytes), _bytes(source))

        self._host_copy(stream, work)

    def download(self, array: NDArray[Any], address: int, stream: int) -> None:
        self._copied("down", address, array.nbytes)
        self._contiguous(array)
        self._host_copy(stream, lambda: np.copyto(_bytes(array), self.bytes(address, array.nbytes)))

    def copy(self, target: Strided, source: Strided, width: int, rows: int, stream: int) -> None:
        if min(target.pitch, source.pitch) < width:
            raise Misuse(f"rows of {width} bytes overlap")
        self._copied("within", target.address, rows * width)

        def work() -> None:
            for row in range(rows):
                block = self.bytes(source.address + row * source.pitch, width)
                self.bytes(target.address + row * target.pitch, width)[:] = block

        self.submit(stream, work)

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        self.submit(stream, lambda: self.bytes(address, nbytes).fill(0))

    def begin_capture(self, stream: int) -> None:
        if self.recording:
            raise Misuse("two captures at once")
        self._recording = []

    def end_capture(self, stream: int) -> int:
        if self._recording is None:
            raise Misuse("no capture was begun")
        recorded, self._recording = self._recording, None
        if self.captures_fail:
            raise BackendError("cudaStreamEndCapture failed: cudaErrorStreamCaptureInvalidated")
        self.captures += 1
        handle = self._handle()
        self.graphs[handle] = recorded
        return handle

    def launch(self, graph: int, stream: int) -> None:
        self.launches += 1
        for work in self.graphs[graph]:
            self.submit(stream, work)

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Queue or record work."""
        if stream not in self.streams:
            raise Misuse("the stream is gone")
        (self.streams[stream] if self._recording is None else self._recording).append(work)

    def bytes(self, address: int, nbytes: int) -> NDArray[Any]:
        """The memory at an address, which must lie in one allocation."""
        for start, array in self.allocations.items():
            if start <= address and address + nbytes <= start + array.nbytes:
                return array[address - start : address - start + nbytes]
        raise Misuse(f"{nbytes} bytes at {address:#x} are not in any allocation")

    def _copied(self, direction: str, address: int, nbytes: int) -> None:
        self.copies.append(Copy(direction, address, nbytes))

    def _host_copy(self, stream: int, work: Callable[[], None]) -> None:
        if self.recording:
            raise Misuse("copies of host memory that is not pinned cannot be recorded")
        self.submit(stream, work)

    def _contiguous(self, array: NDArray[Any]) -> None:
        if not array.flags.c_contiguous:
            raise Misuse("only contiguous arrays can be copied")

    def _drain(self, stream: int) -> None:
        work = self.streams[stream]
        while work:
            work.pop(0)()

    def _handle(self) -> int:
        self._handles += 1
        return self._handles


def _bytes(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1).view(np.uint8)


Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Least and greatest shape of each input."""


@dataclass(frozen=True)
class FakeEngineFile:
    """Content of the file of an "engine"."""

    graph: str
    profiles: list[Profile]
    scratch: list[int]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self)))


NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class FakeTensorRt(ModuleType):
    """The module, with those names of TensorRT's Python API that the backend uses, and no others.

    With ``rtx`` it is ``tensorrt_rtx``, which captures CUDA graphs by itself.
    """

    def __init__(self, device: FakeGpu, version: str = "10.3.0", *, rtx: bool = False) -> None:
        super().__init__("tensorrt_rtx" if rtx else "tensorrt")
        self.__version__ = version
        self.device = device
        self.contexts: list[IExecutionContext] = []
        """All that were made."""
        self.ILogger = ILogger
        self.DataType = DataType
        self.TensorLocation = TensorLocation
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        if rtx:
            self.CudaGraphStrategy = CudaGraphStrategy

    def Runtime(self, logger: ILogger) -> Runtime:
        return Runtime(self, logger)


class ILogger:
    """Base class of loggers."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


DataType = SimpleNamespace(FLOAT=np.float32, HALF=np.float16, INT64=np.int64)
TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")
ExecutionContextAllocationStrategy = SimpleNamespace(STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2)


CudaGraphStrategy = SimpleNamespace(DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole")


class IRuntimeConfig:
    """How a context of TensorRT for RTX runs."""

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy


class Runtime:
    """Reads engines."""

    def __init__(self, trt: FakeTensorRt, logger: ILogger) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            content = FakeEngineFile(**json.loads(bytes(serialized_engine)))
        except ValueError:
            self._logger.log(ILogger.ERROR, "magicTag failed:\n  it is not a TRT engine file")
            return None
        return ICudaEngine(self._trt, self._logger, content)


class ICudaEngine:
    """A graph and its profiles."""

    def __init__(self, trt: FakeTensorRt, logger: ILogger, content: FakeEngineFile) -> None:
        self.trt, self.logger, self.content = trt, logger, content
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        self.session = ort.InferenceSession(content.graph, settings, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self._all = self.inputs | self.outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self._all)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.content.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(map(str, self._all))[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._all[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return NUMPY[self._all[name].type]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self.content.scratch[profile_index]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: int | IRuntimeConfig = 0) -> IExecutionContext:
        config = strategy if isinstance(strategy, IRuntimeConfig) else IRuntimeConfig()
        if not isinstance(strategy, IRuntimeConfig):
            config.strategy = strategy
        if config.strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Misuse("every context would allocate for itself")
        context = IExecutionContext(self, config)
        self.trt.contexts.append(context)
        return context


class IExecutionContext:
    """Runs an engine with what is bound."""

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self.engine, self.config = engine, config
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.enqueued: list[dict[str, tuple[int, ...]]] = []
        """Shapes of the inputs each time."""
        self.failures = 0
        """The number of next runs that fail."""
        self._state = 0
        self._ran_in = -1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < self.engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            raise Misuse("scratch memory is not aligned")
        self.memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = self.engine.content.profiles[self.profile][name]
        if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most)):
            self.engine.logger.log(ILogger.ERROR, f"{name}: {shape} is outside the profile {least}..{most}")
            return False
        self.shapes[name] = tuple(shape)
        self._state += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.inputs and name not in self.engine.outputs:
            raise Misuse(f"there is no {name}")
        if memory % ALIGNMENT:
            raise Misuse(f"{name} is bound at {memory:#x}, which is not aligned")
        self.addresses[name] = memory
        self._state += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        device = self.engine.trt.device
        if self.failures:
            self.failures -= 1
            self.engine.logger.log(ILogger.ERROR, "Cuda Runtime (an illegal memory access was encountered)")
            return False
        if device.recording and self._ran_in != self._state:
            raise Misuse("a context must run once with its shapes before it is captured")
        self._check()
        state, shapes, addresses, captured = self._state, dict(self.shapes), dict(self.addresses), device.recording

        def work() -> None:
            if captured and state != self._state:
                raise Misuse("the context of a captured graph was given other shapes or addresses")
            self._run(shapes, addresses)

        device.submit(stream_handle, work)
        self.enqueued.append(shapes)
        self._ran_in = state
        return True

    def _check(self) -> None:
        missing = [name for name in self.engine.inputs if name not in self.shapes]
        missing += [name for name in (*self.engine.inputs, *self.engine.outputs) if not self.addresses.get(name)]
        if missing:
            raise Misuse(f"{missing} not bound")
        needed = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        if self.memory[1] < needed:
            raise Misuse(f"scratch memory of {self.memory[1]} bytes, {needed} are needed")

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        device = self.engine.trt.device
        device.bytes(*self.memory)
        read, feeds = [], {}
        for name in self.engine.inputs:
            dtype = np.dtype(self.engine.get_tensor_dtype(name))
            nbytes = int(np.prod(shapes[name])) * dtype.itemsize
            feeds[name] = device.bytes(addresses[name], nbytes).view(dtype).reshape(shapes[name]).copy()
            read.append((addresses[name], nbytes))
        results = self.engine.session.run(None, feeds)
        for name, array in zip(self.engine.outputs, results):
            written, address = _bytes(np.ascontiguousarray(array)), addresses[name]
            if any(address < start + nbytes and start < address + written.nbytes for start, nbytes in read):
                raise Misuse(f"{name} is written where something else is read")
            device.bytes(address, written.nbytes)[:] = written
