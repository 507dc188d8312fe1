"""Where the tensors of a graph are: in its data file, or in the graph file itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from owl2.runtime.errors import BackendError, BundleCorruptError
from owl2.runtime.foreign import ForeignError, reason
from owl2.runtime.graph_file import gathered_by, graph_initializers, graph_shapes

CODES = ".codes"
"""How the names of a linear layer's integers end."""
TensorType = Literal["uint8", "int8", "int4", "int64", "float16", "float32"]
ONNX_TYPES: dict[int, TensorType] = {1: "float32", 2: "uint8", 3: "int8", 7: "int64", 10: "float16", 22: "int4"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a bundle.

    Attributes:
        name: in its graph.
        type: of its values.
        shape: its dimensions.
        offset: of its bytes in the graph's data file; None where they are in ``data``.
        size: bytes.
        data: the bytes themselves, of a small tensor of an older bundle.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int | None
    size: int
    data: bytes | None = None


def stored_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """The initializers of a graph by name.

    Where a Gather puts the input of a linear layer into the order of its columns, the order is ``NAME.columns``.

    Raises:
        BundleCorruptError: the file cannot be read as a graph.
    """
    try:
        found, gathered = graph_initializers(path), gathered_by(path)
    except (ForeignError, OSError) as error:
        raise BundleCorruptError(f"{path} cannot be read as a graph: {reason(error)}") from error
    tensors = {
        entry.name: StoredTensor(
            entry.name, ONNX_TYPES[entry.element], entry.shape, entry.offset, entry.size, entry.data
        )
        for entry in found
        if entry.element in ONNX_TYPES
    }
    orders = {
        codes.removesuffix(CODES) + ".columns": tensors[order]
        for codes, order in gathered.items()
        if codes.endswith(CODES) and order in tensors
    }
    return tensors | orders


def check_shapes(path: Path, expected: Mapping[str, tuple[int | None, ...]]) -> None:
    """Compare inputs and outputs of a graph with those of the model; None stands for any size.

    Raises:
        BackendError: one is missing or has another shape.
        BundleCorruptError: the file cannot be read as a graph.
    """
    try:
        found = graph_shapes(path)
    except (ForeignError, OSError) as error:
        raise BundleCorruptError(f"{path} cannot be read as a graph: {reason(error)}") from error
    for name, shape in expected.items():
        have = found.get(name)
        if have is None or len(have) != len(shape) or any(w not in (None, h) for w, h in zip(shape, have)):
            problem = "is missing" if have is None else f"has shape {list(have)}"
            raise BackendError(
                f"{path} does not fit the manifest: {name} {problem}, the model needs {list(shape)}; export the bundle "
                "again"
            )
