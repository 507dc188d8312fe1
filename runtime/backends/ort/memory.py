"""Where K/V buffers and the inputs of a step lie: in the memory of the process, or in that of a GPU.

ONNX Runtime's Python API copies whole tensors only, and growing a K/V buffer [1, H, S, D] moves each head to another
place. So growing a buffer on a GPU goes through host memory, one tensor at a time: twice the bytes of what is kept, at
each growth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from owl2.runtime.placement import Placement

Array = NDArray[Any]
POSITION_AXIS = 2
CUDA = "cuda"
"""How ONNX Runtime calls the memory of NVIDIA's GPUs, whichever provider uses it."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """A tensor that graphs read and write in place.

    Attributes:
        value: is bound to sessions.
        host: the same memory as an array; None on a device.
        positions: S of its shape [1, H, S, D].
        nbytes: its size.
    """

    value: ort.OrtValue
    host: Array | None
    positions: int
    nbytes: int

    def numpy(self) -> Array:
        """The content: the memory itself on the host, a copy of that of a device."""
        if self.host is not None:
            return self.host
        copied: Array = self.value.numpy()
        return copied


class Feeds(Protocol):
    """The inputs of one binding."""

    def put(self, name: str, array: Array) -> None:
        """Bind an input to the content of ``array``, which may be used anew only after the step.

        An array that cannot be written to is taken to keep its content: it is copied to a device once.
        """


class Memory(Protocol):
    """Allocates for one device."""

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A new buffer full of zeros."""

    def grown(self, old: Buffer, positions: int) -> Buffer:
        """A new buffer [1, H, positions, D] that begins with what ``old`` has room for, followed by zeros."""

    def feeds(self, binding: ort.IOBinding, on_host: frozenset[str]) -> Feeds:
        """Inputs for a binding; those named in ``on_host`` are read by the CPU and stay there."""


class HostMemory:
    """The memory of the process: nothing is copied."""

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A new buffer full of zeros."""
        return self._buffer(np.zeros(shape, dtype))

    def grown(self, old: Buffer, positions: int) -> Buffer:
        """A new buffer that begins with what ``old`` holds."""
        return self._buffer(_lengthened(old.numpy(), positions))

    def feeds(self, binding: ort.IOBinding, on_host: frozenset[str]) -> Feeds:
        """Inputs for a binding."""
        return HostFeeds(binding)

    def _buffer(self, array: Array) -> Buffer:
        return Buffer(ort.OrtValue.ortvalue_from_numpy(array), array, array.shape[POSITION_AXIS], array.nbytes)


class HostFeeds:
    """Inputs that are used where they lie."""

    def __init__(self, binding: ort.IOBinding) -> None:
        self._binding = binding

    def put(self, name: str, array: Array) -> None:
        """Bind an input to ``array`` itself."""
        self._binding.bind_cpu_input(name, array)


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a GPU.

    Attributes:
        kind: of memory, as ONNX Runtime calls it.
        index: of the GPU.
    """

    kind: str
    index: int

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A new buffer full of zeros: what was in the memory before could be NaN, which no mask takes away."""
        return self._buffer(np.zeros(shape, dtype))

    def grown(self, old: Buffer, positions: int) -> Buffer:
        """A new buffer that begins with what ``old`` holds; it is put together in host memory."""
        return self._buffer(_lengthened(old.numpy(), positions))

    def feeds(self, binding: ort.IOBinding, on_host: frozenset[str]) -> Feeds:
        """Inputs for a binding."""
        return DeviceFeeds(self, binding, on_host)

    def _buffer(self, array: Array) -> Buffer:
        return Buffer(self.copied(array), None, array.shape[POSITION_AXIS], array.nbytes)

    def copied(self, array: Array) -> ort.OrtValue:
        """A copy of an array on the device."""
        value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, self.kind, self.index)
        value.update_inplace(array)
        return value


class DeviceFeeds:
    """Inputs that are kept on a device: bound once, copied when they change, allocated when they change in shape."""

    def __init__(self, memory: DeviceMemory, binding: ort.IOBinding, on_host: frozenset[str]) -> None:
        self._memory, self._binding, self._on_host = memory, binding, on_host
        self._values: dict[str, ort.OrtValue] = {}
        self._constants: dict[str, Array] = {}

    def put(self, name: str, array: Array) -> None:
        """Bind an input to a copy of ``array`` on the device."""
        if name in self._on_host:
            self._binding.bind_cpu_input(name, array)
            return
        if self._constants.get(name) is array:
            return
        # The reference keeps its identity from being given to another array.
        self._constants.pop(name, None)
        value = self._values.get(name)
        if value is not None and tuple(value.shape()) == array.shape:
            value.update_inplace(array)
        else:
            value = self._values[name] = self._memory.copied(array)
            self._binding.bind_ortvalue_input(name, value)
        if not array.flags.writeable:
            self._constants[name] = array


def memory_of(device: Placement) -> Memory:
    """Where the tensors of a session on ``device`` lie."""
    return HostMemory() if device.on_host else DeviceMemory(CUDA, device.index)


def _lengthened(array: Array, positions: int) -> Array:
    """[1, H, S, D] -> [1, H, positions, D]: cut, or filled with zeros."""
    kept = min(positions, array.shape[POSITION_AXIS])
    longer = np.zeros((*array.shape[:POSITION_AXIS], positions, array.shape[-1]), array.dtype)
    longer[:, :, :kept] = array[:, :, :kept]
    return longer
