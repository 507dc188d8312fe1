"""K/V rows on a GPU."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass

from owl2.runtime.backends.tensorrt.cuda import Gpu, Strided
from owl2.runtime.errors import BackendError


@dataclass(eq=False)
class DeviceRows:
    """K/V rows of all layers in one allocation of a GPU: [2 · layers, capacity, W], keys and values in turn.

    Attributes:
        gpu: they are on; gets the allocation back when these rows are dropped.
        address: of the allocation.
        count: 2 · layers.
        capacity: positions they hold.
        row: bytes of a row, a multiple of 256.
        written: positions that may hold something; zeros after them.
    """

    gpu: Gpu
    address: int
    count: int
    capacity: int
    row: int
    written: int = 0

    @classmethod
    def zeros(cls, gpu: Gpu, count: int, capacity: int, row: int, stream: int) -> DeviceRows:
        """Allocate rows full of zeros.

        Raises:
            BackendError: there is not that much memory.
        """
        rows = cls(gpu, gpu.allocate(count * capacity * row), count, capacity, row)
        weakref.finalize(rows, _free, gpu, rows.address)
        gpu.clear(rows.address, rows.nbytes, stream)
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.count * self.pitch

    @property
    def pitch(self) -> int:
        """Bytes from the rows of one tensor to those of the next."""
        return self.capacity * self.row

    def at(self, index: int, position: int) -> int:
        """Address of a position's row in tensor ``index``."""
        return self.address + index * self.pitch + position * self.row

    def copy_from(self, other: DeviceRows, stream: int) -> None:
        """Begin with as much of ``other`` as fits."""
        self.written, width = min(self.capacity, other.written), min(self.capacity, other.capacity) * self.row
        target, source = Strided(self.address, self.pitch), Strided(other.address, other.pitch)
        self.gpu.copy(target, source, width, self.count, stream)

    def begin(self, past: int, total: int, stream: int) -> None:
        """Before a step writes positions ``past`` to ``total``, clear those of earlier steps that were undone.

        Decoding reads rows after ``past``. The mask is added to their scores, which hides numbers but not NaN, and an
        undone step may have left that.
        """
        self.written, stale = max(self.written, total), self.written
        if stale > past:
            for index in range(self.count):
                self.gpu.clear(self.at(index, past), (stale - past) * self.row, stream)
            self.written = total


def _free(gpu: Gpu, address: int) -> None:
    """Runs wherever and whenever Python drops the owner."""
    with contextlib.suppress(BackendError):
        gpu.use()
        gpu.free(address)
