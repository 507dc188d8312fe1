"""Writing safetensors files tensor by tensor: in memory is one tensor, whatever the size of the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from owl2.runtime.errors import ExportError

SHARD_BYTES = 5_000_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"I32": torch.int32, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Dtype and shape of a tensor that will be written."""

    dtype: Literal["I32", "F16"]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsWriter:
    """Lays out all files beforehand, then takes the tensors in any order; call :meth:`finish` before leaving it.

    Args:
        folder: where the files go: one, or several with an index.
        plan: every tensor by name, in the order of the files.
        shard_bytes: most bytes of tensors in a file; one that is larger has a file of its own.
    """

    def __init__(self, folder: Path, plan: Mapping[str, TensorEntry], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._plan = folder, plan
        self._missing = set(plan)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: dict[str, str] = {}
        self._stack = ExitStack()
        shards = _shards(plan, shard_bytes)
        for number, names in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._begin(file, names)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _begin(self, file: str, names: Iterable[str]) -> None:
        """Write the header: 8 bytes with its length, then JSON, filled with spaces to whole words."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        # Wider numbers first, so that every tensor is aligned.
        for name in sorted(names, key=lambda name: self._plan[name].dtype != "I32"):
            entry = self._plan[name]
            offsets[name], start, end = end, end, end + entry.size
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream = self._stack.enter_context((self._folder / file).open("wb"))
        stream.write(len(text).to_bytes(8, "little") + text)
        base = stream.tell()
        stream.truncate(base + end)
        self._places |= {name: (stream, base + offset) for name, offset in offsets.items()}
        self._files |= dict.fromkeys(offsets, file)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place; floating-point ones become fp16.

        Raises:
            ExportError: values that fp16 does not hold, or another shape or dtype than planned.
        """
        entry = self._plan[name]
        value = tensor.detach().to(DTYPES[entry.dtype]) if tensor.is_floating_point() else tensor
        if value.dtype != DTYPES[entry.dtype] or tuple(value.shape) != entry.shape:
            raise ExportError(f"{name}: {entry} was announced, got {value.dtype} of shape {tuple(value.shape)}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ExportError(
                f"{name} holds values up to {float(tensor.abs().max()):.3g}; fp16, which is stored, ends at 65504"
            )
        stream, offset = self._places[name]
        stream.seek(offset)
        stream.write(value.contiguous().numpy().tobytes())
        self._missing.discard(name)

    def missing(self) -> list[str]:
        """Names of the tensors that are still to be written, in the order of the files."""
        return [name for name in self._plan if name in self._missing]

    def finish(self) -> None:
        """Complete the files and write the index if there are several.

        Raises:
            ExportError: a planned tensor was not written.
        """
        if self._missing:
            raise ExportError(f"{len(self._missing)} tensors were not written: {', '.join(self.missing()[:5])}")
        self._stack.close()
        if len(set(self._files.values())) > 1:
            total = sum(entry.size for entry in self._plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._files.items()))}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(plan: Mapping[str, TensorEntry], limit: int) -> list[list[str]]:
    """Names of the tensors of each file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in plan.items():
        if shards[-1] and filled + entry.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.size
    return shards
