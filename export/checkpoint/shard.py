"""One weight file of a checkpoint; both formats answer the same three questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from owl2.runtime.errors import CheckpointError

SAFETENSORS_TYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I32": "int32",
}


class Shard:
    """An open weight file; numbers are read when they are asked for. ``names`` are those of its tensors."""

    def __init__(self, path: Path) -> None:
        """Open a ``.bin`` or ``.safetensors`` file.

        Raises:
            CheckpointError: the file is damaged, or holds something other than tensors.
        """
        self._stack = ExitStack()
        self._bin: Mapping[str, Tensor] | None = None
        try:
            if path.suffix == ".safetensors":
                self._safe = self._stack.enter_context(safe_open(path, framework="pt"))
                self.names = set(self._safe.keys())
                return
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UnpicklingError as error:
            # Torch's own text advises to switch this protection off.
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it asks for {found[1]}" if found else "its pickle is damaged"
            raise CheckpointError(
                f"{path} holds more than tensors, or no tensors at all, and was not loaded: {reason}"
            ) from error
        except Exception as error:  # A damaged pickle raises nearly anything.
            reason = f"{type(error).__name__}: {error}"
            if "mmap can only be used" in reason:
                reason = "it is not the zip file that torch has written since version 1.6"
            raise CheckpointError(f"{path} cannot be read; it is truncated or damaged: {reason}") from error
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}")
        self._bin = {
            name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)
        }
        self.names = set(self._bin)

    def describe(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """Shape and dtype without reading the numbers; None if this file does not hold the tensor."""
        if name not in self.names:
            return None
        if self._bin is not None:
            value = self._bin[name]
            return tuple(value.shape), str(value.dtype).removeprefix("torch.")
        view = self._safe.get_slice(name)
        stored: str = view.get_dtype()
        return tuple(view.get_shape()), SAFETENSORS_TYPES.get(stored, stored)

    def tensor(self, name: str) -> Tensor:
        """One tensor in the type of the file; it stays mapped."""
        return self._bin[name] if self._bin is not None else self._safe.get_tensor(name)

    def close(self) -> None:
        self._bin = None
        self._stack.close()
