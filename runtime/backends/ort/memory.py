"""K/V buffers and the inputs of a step, in the memory of the process or of a GPU.

ONNX Runtime's Python API copies only whole tensors, and growing a K/V buffer [1, H, S, D] moves each head: a buffer on
a GPU grows through host memory, one tensor at a time, and each growth copies twice what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        host: the same memory as an array; None on a GPU.
        positions: S of its shape [1, H, S, D].
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
        return cls(None if device.on_host else ("cuda", device.index))

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer of zeros: memory that is not cleared may hold NaN, which no mask takes away."""
        return self.holding(np.zeros(shape, dtype))

    def grown(self, old: Buffer, positions: int) -> Buffer:
        """A buffer [1, H, positions, D] that begins with as much of ``old`` as fits, followed by zeros."""
        content = old.numpy()
        kept = min(positions, old.positions)
        longer = np.zeros((*content.shape[:POSITION_AXIS], positions, content.shape[-1]), content.dtype)
        longer[:, :, :kept] = content[:, :, :kept]
        return self.holding(longer)

    def copy(self, array: Array) -> ort.OrtValue:
        """A copy of an array on the GPU."""
        value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, *self.gpu or ())
        value.update_inplace(array)
        return value

    def holding(self, array: Array) -> Buffer:
        """A buffer [1, H, S, D] with this content: the array itself on the host."""
        if self.gpu is None:
            return Buffer(ort.OrtValue.ortvalue_from_numpy(array), array, array.shape[POSITION_AXIS], array.nbytes)
        return Buffer(self.copy(array), None, array.shape[POSITION_AXIS], array.nbytes)


class StepFeeds:
    """The inputs of a binding, apart from its K/V buffers.

    Attributes:
        binding: of the decoder's session.
        copies: on the GPU, by the name of the input.
        is_text_step: whether the inputs of a step of one text row are bound.
    """

    def __init__(self, binding: ort.IOBinding, memory: Memory) -> None:
        self.binding, self._memory = binding, memory
        self.copies: dict[str, ort.OrtValue] = {}
        self.is_text_step = False
        self._fixed: dict[str, Array] = {}

    def fix(self, inputs: Mapping[str, Array]) -> None:
        """Bind inputs to constants, once for all steps."""
        self.put(inputs)
        self._fixed |= inputs  # in host memory, a binding reads the arrays themselves

    def put(self, inputs: Mapping[str, Array]) -> None:
        """Bind inputs to the contents of arrays, which must not change as long as steps read them."""
        for name, array in inputs.items():
            if self._memory.gpu is None or name in READ_BY_CPU:
                self.binding.bind_cpu_input(name, array)
            elif (copy := self.copies.get(name)) is not None and tuple(copy.shape()) == array.shape:
                copy.update_inplace(array)
            else:
                self.copies[name] = self._memory.copy(array)
                self.binding.bind_ortvalue_input(name, self.copies[name])
