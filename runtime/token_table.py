"""Embeddings of tokens: rows of a table, in a file or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.config import DecoderConfig
from owl2.runtime.open_file import OpenFile
from owl2.runtime.spec import FloatType

Rows = NDArray[np.float32]


class TokenTable(Protocol):
    """Token embeddings [V, C]."""

    @property
    def width(self) -> int:
        """C, values of a row."""

    def rows(self, ids: Sequence[int]) -> Rows:
        """Rows of tokens: float32 [T, C]."""

    def close(self) -> None:
        """Give back what it holds."""


class FileTable:
    """``embeddings.bin``: only the rows in use are read, and the system's cache keeps them."""

    def __init__(self, file: OpenFile, decoder: DecoderConfig, stored: FloatType) -> None:
        """A table in an open file of V · C numbers of the type ``stored``."""
        self._file = file
        self._dtype = np.dtype("<f2" if stored == "fp16" else "<f4")
        self.width = decoder.hidden_size

    def rows(self, ids: Sequence[int]) -> Rows:
        """See :class:`TokenTable`.

        Raises:
            BundleCorruptError: the file was truncated or overwritten.
            BackendError: the model was closed.
        """
        nbytes = self.width * self._dtype.itemsize
        content = b"".join([self._file.read(token * nbytes, nbytes) for token in ids])
        self._file.check()  # after reading: a change in between is seen
        return np.frombuffer(content, self._dtype).reshape(len(ids), self.width).astype(np.float32)

    def close(self) -> None:
        self._file.close()


class ArrayTable:
    """A table in memory: [V, C] of any float type."""

    def __init__(self, array: NDArray[np.floating[Any]]) -> None:
        self._array = array
        self.width = array.shape[1]

    def rows(self, ids: Sequence[int]) -> Rows:
        """See :class:`TokenTable`."""
        return self._array[list(ids)].astype(np.float32)

    def close(self) -> None: ...
