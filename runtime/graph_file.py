"""What an ONNX graph says about other files, read before any backend sees the graph.

A graph names the files that hold its larger tensors, and a backend opens whatever it names. So the few messages that
can hold a tensor are walked here, by the wire format of Protocol Buffers and with the field numbers of onnx.proto;
everything else is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from owl2.runtime.foreign import ForeignError, read_bytes, reason, shorten

GRAPH_BYTES = 16 << 20
"""Largest graph file that is read; the decoder of a 7B model has about 0.3 MB, without its external data."""
MAX_FIELDS = 1 << 20
MAX_DEPTH = 32
SUBMESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""By message, the fields that hold messages in which there may be tensors."""
NODE_INPUT, NODE_OUTPUT, NODE_OPERATOR = 1, 2, 4
LOADS_FILES = ("EPContext",)
"""Operators that load files by themselves."""
MODEL_GRAPH, GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 7, 1, 5, 11, 12
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_TYPE_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 2, 1, 1
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW, TENSOR_EXTERNAL = 1, 2, 8, 9, 13
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Field = tuple[int, int | memoryview]
"""Number and value; those of fixed size are 0, which nothing here needs."""


@dataclass(frozen=True, slots=True)
class Initializer:
    """An initializer of the main graph.

    Attributes:
        name: in the graph.
        element: ONNX's number of its type.
        shape: its dimensions.
        offset: of its bytes in the data file; None where they are in ``data``.
        size: bytes.
        data: the bytes, where they are in the graph file.
    """

    name: str
    element: int
    shape: tuple[int, ...]
    offset: int | None
    size: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A tensor whose values are in another file.

    Attributes:
        name: in its graph.
        initializer: whether it is one of the main graph.
        element: ONNX's number of its type.
        shape: its dimensions.
        location: name of the file.
        offset, length: bytes in it.
    """

    name: str
    initializer: bool
    element: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def graph_problems(path: Path, data: str, size: int) -> list[str]:
    """Compare the references of a graph with the file it may use; returns one sentence for the first problem.

    Args:
        path: of the graph.
        data: name of the only file that it may take tensors from, in the same folder.
        size: bytes of that file.
    """
    try:
        for tensor in external_tensors(path):
            if tensor.location != data:
                return [f"{path.name} takes {shorten(tensor.name)} from {shorten(tensor.location)} instead of {data}"]
            if tensor.offset + tensor.length > size:
                return [f"{path.name} takes {shorten(tensor.name)} from beyond the {size} bytes of {data}"]
    except (ForeignError, OSError) as error:
        return [f"{path.name} cannot be read as a graph: {reason(error)}"]
    return []


def external_tensors(path: Path) -> list[ExternalTensor]:
    """Every tensor of a graph, its subgraphs, attributes and functions that is in another file.

    Raises:
        ForeignError: the file is no ONNX model, is too large, or has an operator that loads files by itself.
        OSError: it cannot be read.
    """
    found: list[ExternalTensor] = []
    pending, budget = [("model", memoryview(read_bytes(path, GRAPH_BYTES)), 0)], MAX_FIELDS
    while pending:
        kind, content, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ForeignError("it is nested too deeply")
        fields = list(_fields(content, budget))
        budget -= len(fields)
        if kind == "tensor":
            found += _external(fields, initializer=depth == 2)
        for number, value in fields:
            if kind == "node" and number == NODE_OPERATOR and (name := _text(value)) in LOADS_FILES:
                raise ForeignError(f"it has the operator {name}, which loads other files")
            inner = SUBMESSAGES.get(kind, {}).get(number)
            if inner is not None and not isinstance(value, int):
                pending.append((inner, value, depth + 1))
    return found


def graph_initializers(path: Path) -> list[Initializer]:
    """The initializers of the main graph; raises as :func:`external_tensors`."""
    return [_initializer(list(_fields(tensor, MAX_FIELDS))) for tensor in _graph_parts(path, GRAPH_INITIALIZER)]


def gathered_by(path: Path) -> dict[str, str]:
    """The indices of a Gather by the weights that its result is multiplied with; raises as :func:`external_tensors`.

    Both are names: of the second inputs of the Gather and of the node that takes its result first.
    """
    nodes = []
    for node in _graph_parts(path, GRAPH_NODE):
        fields = list(_fields(node, MAX_FIELDS))
        named = [[_text(value) for number, value in fields if number == wanted] for wanted in (NODE_INPUT, NODE_OUTPUT)]
        nodes.append((next((_text(value) for number, value in fields if number == NODE_OPERATOR), ""), *named))
    indices = {outputs[0]: inputs[1] for name, inputs, outputs in nodes if name == "Gather" and len(inputs) == 2}
    return {inputs[1]: indices[inputs[0]] for _, inputs, _ in nodes if len(inputs) > 1 and inputs[0] in indices}


def graph_shapes(path: Path) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the inputs and outputs of the main graph, None for a free dimension; as :func:`external_tensors`."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    for value in _graph_parts(path, GRAPH_INPUT, GRAPH_OUTPUT):
        fields = list(_fields(value, MAX_FIELDS))
        name = next((_text(text) for number, text in fields if number == VALUE_NAME), "")
        found: list[int | None] = []
        for dimension in _inside(value, VALUE_TYPE, TYPE_TENSOR, TENSOR_TYPE_SHAPE, SHAPE_DIM):
            sizes = [size for number, size in _fields(dimension, MAX_FIELDS) if number == DIM_VALUE]
            found.append(sizes[0] if sizes and isinstance(sizes[0], int) else None)
        shapes[name] = tuple(found)
    return shapes


def _graph_parts(path: Path, *numbers: int) -> Iterator[memoryview]:
    """The main graph's messages of these fields."""
    for graph in _inside(memoryview(read_bytes(path, GRAPH_BYTES)), MODEL_GRAPH):
        for number, part in _fields(graph, MAX_FIELDS):
            if number in numbers and not isinstance(part, int):
                yield part


def _inside(content: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages that a path of field numbers leads to."""
    for number, value in _fields(content, MAX_FIELDS):
        if number == path[0] and not isinstance(value, int):
            if len(path) == 1:
                yield value
            else:
                yield from _inside(value, *path[1:])


def _initializer(fields: list[Field]) -> Initializer:
    external = _external(fields, initializer=True)
    if external:
        one = external[0]
        return Initializer(one.name, one.element, one.shape, one.offset, one.length, None)
    name, element = _identity(fields)
    data = next((bytes(value) for number, value in fields if number == TENSOR_RAW and not isinstance(value, int)), b"")
    return Initializer(name, element, _shape(fields), None, len(data), data)


def _external(fields: list[Field], *, initializer: bool) -> list[ExternalTensor]:
    """The tensor of these fields, if it is in another file."""
    entries: dict[str, str] = {}
    for number, value in fields:
        if number == TENSOR_EXTERNAL and not isinstance(value, int):
            pair = {key: _text(text) for key, text in _fields(value, MAX_FIELDS)}
            key = pair.get(1, "")
            if key in entries:
                raise ForeignError(f"a tensor has {shorten(key)} twice")
            entries[key] = pair.get(2, "")
    if not entries:
        return []
    if not {"location", "offset", "length"} <= set(entries) <= {"location", "offset", "length", "checksum"}:
        raise ForeignError(f"a tensor in another file has the keys {shorten(sorted(entries))}")
    name, element = _identity(fields)
    offset, length = _count(entries["offset"]), _count(entries["length"])
    return [ExternalTensor(name, initializer, element, _shape(fields), entries["location"], offset, length)]


def _identity(fields: list[Field]) -> tuple[str, int]:
    """Name of a tensor, and ONNX's number of its type."""
    name = next((_text(value) for number, value in fields if number == TENSOR_NAME), "")
    return name, next((value for number, value in fields if number == TENSOR_TYPE and isinstance(value, int)), 0)


def _shape(fields: list[Field]) -> tuple[int, ...]:
    shape: list[int] = []
    for number, value in fields:
        if number == TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else _varints(value)
    return tuple(shape)


def _varints(packed: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(packed):
        value, place = _varint(packed, place)
        values.append(value)
    return values


def _text(value: int | memoryview) -> str:
    try:
        return "" if isinstance(value, int) else bytes(value).decode()
    except UnicodeDecodeError:
        raise ForeignError("it has a name that is not UTF-8") from None


def _count(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 16):
        raise ForeignError(f"a tensor in another file has the offset or length {shorten(digits)}")
    return int(digits)


def _fields(content: memoryview, budget: int) -> Iterator[Field]:
    place, count = 0, 0
    while place < len(content):
        count += 1
        if count > budget:
            raise ForeignError(f"it has more than {MAX_FIELDS} fields")
        tag, place = _varint(content, place)
        number, wire = tag >> 3, tag & 7
        value: int | memoryview = 0
        if wire == VARINT:
            value, place = _varint(content, place)
        elif wire == BYTES:
            size, place = _varint(content, place)
            value = content[place : place + size]
            place += size
        elif wire in (FIXED32, FIXED64):
            place += 4 if wire == FIXED32 else 8
        if number == 0 or wire not in (VARINT, FIXED64, BYTES, FIXED32) or place > len(content):
            raise ForeignError("it is not a complete ONNX model")
        yield number, value


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(content) and shift < 64:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ForeignError("it is not a complete ONNX model")
