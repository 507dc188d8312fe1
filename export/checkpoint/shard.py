"""One weight file of a checkpoint; both formats answer the same three questions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from owl2.runtime.errors import CheckpointError
from owl2.runtime.foreign import cut, listed, reason

# Under these names training programs save a model beside its optimizer.
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
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
        self._path = path
        try:
            path.open("rb").close()  # safetensors calls a file missing that it may not read
            if path.suffix == ".safetensors":
                self._safe = self._stack.enter_context(safe_open(path, framework="pt"))
                self.names = set(self._safe.keys())
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # on what it may not understand, and then refuses
                loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UnpicklingError as error:
            # Torch's own text advises to switch this protection off.
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            why = f"it asks for {cut(found[1])}" if found else "its pickle is damaged"
            raise CheckpointError(
                f"{path} holds more than tensors, or no tensors at all, and was not loaded: {why}"
            ) from error
        except Exception as error:
            raise _unreadable(path, error) from error
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}")
        self._bin = _tensors(loaded, path)
        self.names = set(self._bin)

    def describe(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """Shape and dtype without reading the numbers; None if this file does not hold the tensor."""
        if name not in self.names:
            return None
        if self._bin is not None:
            value = self._bin[name]
            dtype = str(value.dtype).removeprefix("torch.")
            return tuple(value.shape), dtype if _is_plain(value) else f"{_storage(value)} {dtype}"
        view = self._safe.get_slice(name)
        stored: str = view.get_dtype()
        return tuple(view.get_shape()), SAFETENSORS_TYPES.get(stored, stored)

    def tensor(self, name: str) -> Tensor:
        """One tensor in the type of the file; it stays mapped.

        Raises:
            CheckpointError: the file no longer holds what it held.
        """
        try:
            return self._bin[name].detach() if self._bin is not None else self._safe.get_tensor(name)
        except Exception as error:
            raise _unreadable(self._path, error) from error

    def close(self) -> None:
        self._bin = None
        self._stack.close()


def _tensors(loaded: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Those of a dictionary, or of the one in it that training programs put them in."""
    found = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    wrapped = {name: loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)}
    inner = {name: tensors for name, content in wrapped.items() if (tensors := _tensors(content, path))}
    if len(inner) + bool(found) > 1:
        sets = [*inner, *(["the outermost"] if found else [])]
        raise CheckpointError(
            f"{path}: more than one set of tensors is in it ({listed(sets)}), so which one is the model is not "
            "certain; save the model's alone"
        )
    return next(iter(inner.values()), found)


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _storage(value: Tensor) -> str:
    """What keeps a tensor from being read as it is."""
    if value.device.type != "cpu":
        return f"{value.device.type} (without its numbers)"
    return "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError) and error.errno:
        return CheckpointError(f"{path} cannot be read: {error.strerror}; make it readable, or copy it again")
    why = reason(error)
    if "mmap can only be used" in why:
        why = "it is not the zip file that torch has written since version 1.6"
    return CheckpointError(f"{path} cannot be read; it is truncated or damaged: {why}")
