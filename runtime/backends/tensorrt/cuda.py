"""The CUDA calls that a native backend makes: memory, copies, streams, graphs.

Addresses, streams and graphs are integers, as in CUDA itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from owl2.runtime.backends.nvidia import driver_problem
from owl2.runtime.errors import BackendError, BackendUnavailableError

Array = NDArray[Any]
ALIGNMENT = 256
"""Bytes; CUDA's allocations begin at multiples of it, and TensorRT wants addresses that do."""
CUDA_PYTHON = "cuda.bindings.runtime"


@dataclass(frozen=True, slots=True)
class Strided:
    """Rows of bytes in device memory, ``pitch`` bytes from the start of one to that of the next."""

    address: int
    pitch: int


class Gpu(Protocol):
    """One GPU. Everything that takes a stream returns at once and happens there in order.

    Every call raises BackendError if CUDA reports an error.
    """

    @property
    def name(self) -> str:
        """Its product name."""

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Such as (8, 7)."""

    def use(self) -> None:
        """Make it the GPU of the calling thread, which must come before other calls there."""

    def allocate(self, nbytes: int) -> int:
        """Reserve device memory -> address, a multiple of :data:`ALIGNMENT`; the content is undefined."""

    def free(self, address: int) -> None:
        """Give an allocation back once all work that was enqueued has ended."""

    def create_stream(self) -> int:
        """-> a stream that does not wait for the default one."""

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""

    def synchronize(self, stream: int) -> None:
        """Wait until all of a stream's work has ended; errors of that work are raised here."""

    def upload(self, address: int, array: Array, stream: int) -> None:
        """Copy a contiguous array to the device; it must live until the stream is synchronized."""

    def download(self, array: Array, address: int, stream: int) -> None:
        """Fill a contiguous array from the device; it is full when the stream is synchronized."""

    def copy(self, target: Strided, source: Strided, width: int, rows: int, stream: int) -> None:
        """Copy ``rows`` rows of ``width`` bytes within the device."""

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Fill with zero bytes."""

    def begin_capture(self, stream: int) -> None:
        """From now on, record a stream's work instead of doing it."""

    def end_capture(self, stream: int) -> int:
        """-> a graph of the recorded work, ready to launch; fails if some of it cannot be recorded."""

    def launch(self, graph: int, stream: int) -> None:
        """Do the work that a graph recorded."""

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""


class CudaGpu:
    """A GPU through NVIDIA's ``cuda-python``; :class:`Gpu` describes the methods."""

    def __init__(self, runtime: Any, index: int) -> None:  # noqa: ANN401 - a module without types
        """Use GPU ``index`` through the module ``cuda.bindings.runtime``; :func:`open_gpu` checks both."""
        self._cuda, self._index = runtime, index

    @property
    def name(self) -> str:
        properties = self._call(self._cuda.cudaGetDeviceProperties, self._index)
        text: bytes = properties.name
        return text.split(b"\0")[0].decode("ascii", "replace")

    @property
    def compute_capability(self) -> tuple[int, int]:
        attribute = self._cuda.cudaDeviceAttr
        major = self._call(self._cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMajor, self._index)
        minor = self._call(self._cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMinor, self._index)
        return int(major), int(minor)

    def use(self) -> None:
        self._call(self._cuda.cudaSetDevice, self._index)

    def memory(self) -> tuple[int, int]:
        free, total = self._call(self._cuda.cudaMemGetInfo)
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        try:
            return int(self._call(self._cuda.cudaMalloc, nbytes))
        except BackendError as error:
            if "cudaErrorMemoryAllocation" not in str(error):
                raise
            free, total = self.memory()
            raise BackendError(
                f"the GPU has no room for {nbytes / 2**20:.0f} MiB: {free / 2**20:.0f} of {total / 2**20:.0f} MiB are "
                "free; close other programs that use it or load with a smaller context"
            ) from error

    def free(self, address: int) -> None:
        self._call(self._cuda.cudaFree, address)

    def create_stream(self) -> int:
        return int(self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call(self._cuda.cudaStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        self._call(self._cuda.cudaStreamSynchronize, stream)

    def upload(self, address: int, array: Array, stream: int) -> None:
        direction = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, address, host_address(array), array.nbytes, direction, stream)

    def download(self, array: Array, address: int, stream: int) -> None:
        direction = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, host_address(array), address, array.nbytes, direction, stream)

    def copy(self, target: Strided, source: Strided, width: int, rows: int, stream: int) -> None:
        direction = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        blocks = (target.address, target.pitch, source.address, source.pitch)
        self._call(self._cuda.cudaMemcpy2DAsync, *blocks, width, rows, direction, stream)

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        self._call(self._cuda.cudaMemsetAsync, address, 0, nbytes, stream)

    def begin_capture(self, stream: int) -> None:
        # Relaxed: Python may give memory back meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call(self._cuda.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        recorded = self._call(self._cuda.cudaStreamEndCapture, stream)
        try:
            return int(self._call(self._cuda.cudaGraphInstantiate, recorded, 0))
        finally:
            self._call(self._cuda.cudaGraphDestroy, recorded)

    def launch(self, graph: int, stream: int) -> None:
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call(self._cuda.cudaGraphExecDestroy, graph)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - as the module has it
        return results(self._cuda, function(*arguments), function.__name__)


def results(runtime: Any, answer: tuple[Any, ...], name: str) -> Any:  # noqa: ANN401 - a module without types
    """Unpack the answer of a CUDA call, (error, results...): None, the result, or a tuple of results.

    Raises:
        BackendError: the call failed, with CUDA's name for the error.
    """
    code, *values = answer
    if code != runtime.cudaError_t.cudaSuccess:
        # An enumerator, or a number that this version of the package does not know.
        raise BackendError(f"{name} failed: {getattr(code, 'name', code)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def host_address(array: Array) -> int:
    """The address of a contiguous array's bytes.

    Raises:
        BackendError: it is not contiguous.
    """
    if not array.flags.c_contiguous:
        raise BackendError(f"an array of strides {array.strides} cannot be copied as one block")
    return int(array.ctypes.data)


def open_gpu(index: int) -> CudaGpu:
    """GPU ``index``.

    Raises:
        BackendUnavailableError: the package, the driver or the GPU is missing, or they do not fit together.
    """
    try:
        runtime = importlib.import_module(CUDA_PYTHON)
    except ImportError as error:
        raise BackendUnavailableError(
            f"engines reach the GPU through cuda-python, which cannot be imported ({error}); install it: "
            "pip install 'owl2[tensorrt]'"
        ) from error
    problem = driver_problem(index) or version_problem(runtime)
    if problem:
        raise BackendUnavailableError(f"engines cannot be run: {problem}")
    return CudaGpu(runtime, index)


def version_problem(runtime: Any) -> str:  # noqa: ANN401 - a module without types
    """A sentence on a ``cuda.bindings.runtime`` that is for a newer driver; empty if it can be used."""
    driver, built = (
        int(results(runtime, call(), call.__name__))
        for call in (runtime.cudaDriverGetVersion, runtime.cudaRuntimeGetVersion)
    )
    if driver // 1000 >= built // 1000:
        return ""
    known, needed = (f"{number // 1000}.{number % 1000 // 10}" for number in (driver, built))
    return (
        f"the NVIDIA driver knows CUDA {known}, the installed cuda-python is for CUDA {needed}; install the one for "
        f"the driver (pip install 'cuda-python=={driver // 1000}.*') or a newer driver"
    )


def aligned(nbytes: int) -> int:
    """The next multiple of :data:`ALIGNMENT`, at least one."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class Slots:
    """Blocks of device memory by name, which grow when more is asked for and are used over and over."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._slots: dict[str, tuple[int, int]] = {}

    def reserve(self, name: str, nbytes: int) -> int:
        """-> address with room for ``nbytes``, the same as before if that had it; never null.

        Raises:
            BackendError: there is not that much memory; the block is as before.
        """
        address, size = self._slots.get(name, (0, 0))
        if size >= max(nbytes, 1):
            return address
        larger = self._gpu.allocate(aligned(nbytes))
        self._slots[name] = larger, aligned(nbytes)
        if size:
            self._gpu.free(address)
        return larger

    def upload(self, name: str, array: Array, stream: int) -> int:
        """Copy an array into its block -> address."""
        address = self.reserve(name, array.nbytes)
        if array.nbytes:
            self._gpu.upload(address, array, stream)
        return address

    def close(self) -> None:
        """Give everything back."""
        while self._slots:
            _, (address, _) = self._slots.popitem()
            self._gpu.free(address)
