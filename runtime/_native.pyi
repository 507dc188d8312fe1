"""The native core; owl2.runtime.backends.native is its only user."""

from collections.abc import Sequence

import numpy
import numpy.typing

def kernels() -> str:
    """
    Instruction set whose kernels are in use: the best of the processor's, or what OWL2_CPU says.
    """

def available_kernels() -> list[str]:
    """Instruction sets that this processor has kernels for, the best first."""

def roof(threads: int, seconds: float) -> tuple[float, float, float]:
    """
    What the machine can do at most, each measured for about `seconds`.

    Bytes read per second, and multiply-adds of int8 and of float32 per second.
    """

def usable_processors() -> int:
    """Processors that this process may use."""

class MappedFile:
    """A file in memory, read only."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map an open file, which may be closed then."""

    @property
    def damaged(self) -> bool:
        """Whether the file was truncated since, and a read met the hole."""

class View:
    """Bytes that weights are read from."""

    def __init__(self, file: object, offset: int, size: int) -> None:
        """Bytes of a mapped file."""

    @staticmethod
    def of(content: bytes) -> View:
        """The bytes of an object."""

class Linear:
    """A linear layer: views of its weights, which must outlive it."""

    @staticmethod
    def integers(
        outputs: int,
        inputs: int,
        bits: int,
        group: int,
        codes: View,
        scales: View,
        zero_points: View | None,
        bias: View | None,
        columns: View | None,
    ) -> Linear:
        """Integers in the layout of MatMulNBits, scales float32."""

    @staticmethod
    def floats(outputs: int, inputs: int, half: bool, values: View, bias: View | None, columns: View | None) -> Linear:
        """A float matrix [K, N]."""

class Stop:
    """Ends a step; any thread may set it."""

    def __init__(self) -> None: ...
    def set(self) -> None: ...

class KvCache:
    """
    Keys and values of one sequence; copies share memory until one is written to.
    """

    def __init__(self, layers: int, heads: int, width: int, type: str, capacity: int) -> None: ...
    def resized(self, capacity: int) -> KvCache:
        """A copy with room for other positions."""

    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def read(self, positions: int) -> tuple[numpy.typing.NDArray[numpy.uint8], ...]:
        """
        Bytes of the keys and of the values [layers, heads, positions, width], and with int8 of their scales.
        """

    def write(self, positions: int, parts: Sequence[numpy.typing.NDArray[numpy.uint8]]) -> None:
        """Make what read() gave the first positions."""

class Decoder:
    """The decoder of a model. The views of its weights must outlive it."""

    def __init__(self, width: int, inner: int, heads: int, vocabulary: int, epsilon: float, threads: int) -> None: ...
    def add_layer(self, input_gains: View, post_gains: View, linears: Sequence[Linear]) -> None:
        """
        Linears are q, k and v of text and of images (k, k, v, v), o, gate, up, down.
        """

    def finish(self, norm: View, head: Linear) -> None: ...
    def step(
        self,
        embeddings: numpy.typing.NDArray[numpy.float32],
        modality: numpy.typing.NDArray[numpy.uint8],
        cosines: numpy.typing.NDArray[numpy.float32],
        sines: numpy.typing.NDArray[numpy.float32],
        sequences: Sequence[tuple[KvCache, int, int]],
        logit_rows: Sequence[int],
        stop: Stop,
    ) -> numpy.typing.NDArray[numpy.float32] | None:
        """
        Run new rows [M, C] of sequences (cache, past, rows): -> logits float32 [R, V], None if it was stopped.
        """
