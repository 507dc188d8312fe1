"""A small ONNX writer: nodes are kept in memory, weights go straight to an external file.

Weights are appended to ``<graph>.data`` as they arrive, so writing a graph of any size takes the memory of one weight.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from owl2.runtime.spec import FloatType
from owl2.runtime.version import __version__

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"

# Page-aligned offsets let ONNX Runtime map the file instead of reading it.
ALIGNMENT = 4096
# Small tensors (shapes, indices, single gains) live inside the graph file.
INLINE_BYTES = 1024

Attribute = int | float | str | Sequence[int]
Axis = int | str
DTYPES: dict[FloatType, type[np.float32 | np.float16]] = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class BuilderState:
    """A graph under construction, without its external data.

    Attributes:
        graph: serialized GraphProto of nodes and initializers.
        names: number of generated tensor names.
        length: bytes of the external data.
        sha256: hex digest of the external data written since the state before this one.
    """

    graph: bytes
    names: int
    length: int
    sha256: str


def data_path(path: Path) -> Path:
    """The file with the external data of the graph at ``path``."""
    return path.with_name(path.name + ".data")


class GraphBuilder:
    """Builds one ONNX file and its external data.

    Use as a context manager; call :meth:`save` before leaving it.
    """

    def __init__(self, path: Path, activations: FloatType = "fp32", *, resume: bool = False) -> None:
        """Begin a graph that computes in ``activations``; ``resume`` keeps the external data for :meth:`restore`."""
        self.path = path
        self.activations = activations
        self._data_path = data_path(path)
        self._data: BinaryIO = self._data_path.open("r+b" if resume else "wb")
        self._written = hashlib.sha256()
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._counter = 0
        self._shared: dict[tuple[object, ...], str] = {}

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def input(self, name: str, dtype: int, shape: Sequence[Axis]) -> str:
        """Declare a graph input; string axes are dynamic."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[Axis]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] | int = 1,
        domain: str = "",
        **attributes: Attribute,
    ) -> list[str]:
        """Append a node and return its output names; for a number of outputs, the builder makes up the names."""
        return self._append(op, inputs, outputs, domain, attributes)

    def op(self, op: str, *inputs: str, domain: str = "", **attributes: Attribute) -> str:
        """Append a node with one output and return its name."""
        return self._append(op, inputs, 1, domain, attributes)[0]

    def shared(self, op: str, *inputs: str, **attributes: Attribute) -> str:
        """As :meth:`op`, but the same operator on the same tensors is computed once and its name returned again."""
        key = (op, inputs, tuple(sorted(attributes.items())))
        if key not in self._shared:
            self._shared[key] = self._append(op, inputs, 1, "", attributes)[0]
        return self._shared[key]

    def _append(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | int,
        domain: str,
        attributes: Mapping[str, Attribute],
    ) -> list[str]:
        if isinstance(outputs, int):
            self._counter += 1
            suffixes = [""] + [f".{index}" for index in range(1, outputs)]
            outputs = [f"{op}_{self._counter}{suffix}" for suffix in suffixes]
        name = next(name for name in outputs if name)
        node = helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)
        return list(outputs)

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        """Add an initializer once; large ones go to the external file. The same name returns the same tensor."""
        if name not in self._initializers:
            values = np.ascontiguousarray(values)
            if values.nbytes <= INLINE_BYTES:
                tensor = numpy_helper.from_array(values, name)
            else:
                tensor = self._external(name, values, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
            self._initializers[name] = tensor
        return name

    @property
    def element(self) -> int:
        """ONNX's number of the activation type."""
        return helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[self.activations]))

    def floats(self, name: str, values: NDArray[np.floating[Any]]) -> str:
        """As :meth:`constant`, in the activation type."""
        return self.constant(name, values.astype(DTYPES[self.activations]))

    def cast(self, x: str, element: int) -> str:
        """Convert ``x`` from the activation type to another; the same type takes no node."""
        return x if element == self.element else self.op("Cast", x, to=element)

    def from_float32(self, x: str) -> str:
        """Convert a float32 ``x`` to the activation type; the same type takes no node."""
        return x if self.activations == "fp32" else self.op("Cast", x, to=self.element)

    def int4(self, name: str, codes: NDArray[np.int8]) -> str:
        """Add signed 4-bit integers [...] as an INT4 initializer: two per byte, the first in the low half."""
        if name not in self._initializers:
            halves = np.pad(codes.reshape(-1), (0, codes.size % 2)).view(np.uint8) & 0xF
            packed = halves[0::2] | np.left_shift(halves[1::2], 4, dtype=np.uint8)
            self._initializers[name] = self._external(name, packed, TensorProto.INT4, codes.shape)
        return name

    def indices(self, *values: int) -> str:
        """A one-dimensional int64 constant (shapes, axes, split sizes)."""
        return self.constant("i64_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def _external(self, name: str, values: NDArray[np.generic], element: int, shape: Sequence[int]) -> TensorProto:
        self._write(b"\0" * (-self._data.tell() % ALIGNMENT))
        offset = self._data.tell()
        self._write(values.data)
        tensor = TensorProto(name=name, data_type=element, dims=shape, data_location=TensorProto.EXTERNAL)
        entries = {"location": self._data_path.name, "offset": offset, "length": values.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _write(self, data: bytes | memoryview) -> None:
        self._data.write(data)
        self._written.update(data)

    def state(self) -> BuilderState:
        """The graph so far; its external data is on the disk when this returns."""
        self._data.flush()
        os.fsync(self._data.fileno())
        graph = onnx.GraphProto(node=self._nodes, initializer=self._initializers.values())
        digest, self._written = self._written.hexdigest(), hashlib.sha256()
        return BuilderState(graph.SerializeToString(), self._counter, self._data.tell(), digest)

    def restore(self, state: BuilderState) -> None:
        """Continue from ``state``: its nodes and initializers replace those here, inputs and outputs stay."""
        graph = onnx.GraphProto.FromString(state.graph)
        self._nodes = list(graph.node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._counter = state.names
        self._data.truncate(state.length)
        self._data.seek(state.length)
        self._written = hashlib.sha256()

    def save(self) -> None:
        self._data.flush()
        graph = helper.make_graph(
            self._nodes, self.path.stem, self._inputs, self._outputs, list(self._initializers.values())
        )
        domains = {node.domain for node in self._nodes} - {""}
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="owl2",
            producer_version=__version__,
        )
        self.path.write_bytes(model.SerializeToString())
