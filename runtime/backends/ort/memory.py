"""K/V buffers and the inputs of a step, in the memory of the process or of a GPU.

ONNX Runtime's Python API copies whole tensors only, and growing a K/V buffer [1, H, S, D] moves each head. So a buffer
on a GPU grows by way of host memory, one tensor at a time: each growth copies what is kept twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from owl2.runtime import spec
from owl2.runtime.placement import Placement

Array = NDArray[Any]
POSITION_AXIS = 2
READ_BY_CPU = frozenset({spec.TOTAL_LENGTH})
"""Inputs that the attention of every provider reads on the CPU."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """A tensor that graphs read and write in place.

    Attributes:
        value: is bound to sessions.
        host: the same memory as an array; None on a GPU.
        positions: S of its shape [1, H, S, D].
        nbytes: its size.
    """

    value: ort.OrtValue
    host: Array | None
    positions: int
    nbytes: int

    def numpy(self) -> Array:
        """The content: the memory itself on the host, a copy of that of a GPU."""
        array: Array = self.value.numpy() if self.host is None else self.host
        return array


@dataclass(frozen=True)
class Memory:
    """Memory that tensors are allocated in.

    Attributes:
        gpu: its kind of memory, as ONNX Runtime calls it, and its index; None for the memory of the process.
    """

    gpu: tuple[str, int] | None

    @classmethod
    def of(cls, device: Placement) -> Memory:
        """The memory of a device."""
        return cls(None if device.on_host else ("cuda", device.index))

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer of zeros: memory that is not cleared may hold NaN, which no mask takes away."""
        return self._buffer(np.zeros(shape, dtype))

    def grown(self, old: Buffer, positions: int) -> Buffer:
        """A buffer [1, H, positions, D] that begins with as much of ``old`` as fits, followed by zeros."""
        content = old.numpy()
        kept = min(positions, old.positions)
        longer = np.zeros((*content.shape[:POSITION_AXIS], positions, content.shape[-1]), content.dtype)
        longer[:, :, :kept] = content[:, :, :kept]
        return self._buffer(longer)

    def copy(self, array: Array) -> ort.OrtValue:
        """A copy of an array on the GPU."""
        value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, *self.gpu or ())
        value.update_inplace(array)
        return value

    def _buffer(self, array: Array) -> Buffer:
        if self.gpu is None:
            return Buffer(ort.OrtValue.ortvalue_from_numpy(array), array, array.shape[POSITION_AXIS], array.nbytes)
        return Buffer(self.copy(array), None, array.shape[POSITION_AXIS], array.nbytes)


class StepFeeds:
    """The inputs of a binding that change from step to step.

    Attributes:
        binding: of the session.
        copies: tensors on the GPU by the name of the input; empty on the host.
    """

    def __init__(self, binding: ort.IOBinding, memory: Memory) -> None:
        self.binding, self._memory = binding, memory
        self.copies: dict[str, ort.OrtValue] = {}
        self._constants: dict[str, Array] = {}

    def put(self, name: str, array: Array) -> None:
        """Bind an input to the content of ``array``, which must not change before the step has ended.

        An array that cannot be written to is taken to be constant: it is bound, and copied to a GPU, only once.
        """
        if self._constants.get(name) is array:
            return
        self._constants.pop(name, None)
        if self._memory.gpu is None or name in READ_BY_CPU:
            self.binding.bind_cpu_input(name, array)
        elif (copy := self.copies.get(name)) is not None and tuple(copy.shape()) == array.shape:
            copy.update_inplace(array)
        else:
            self.copies[name] = self._memory.copy(array)
            self.binding.bind_ortvalue_input(name, self.copies[name])
        if not array.flags.writeable:
            # The reference also keeps the identity from being given to another array.
            self._constants[name] = array
