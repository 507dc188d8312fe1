"""Reading an official checkpoint, tensor by tensor.

Nothing is held but the shard in use: ``.bin`` shards are memory-mapped through torch's restricted unpickler,
safetensors shards are read by slice.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from owl2.export.hf_config import model_config
from owl2.export.model import Owl2Model
from owl2.runtime.config import ModelConfig
from owl2.runtime.errors import CheckpointError
from owl2.runtime.spec import TOKENIZER_FILES

REQUIRED_FILES = ("config.json", "preprocessor_config.json", *TOKENIZER_FILES)

# Weight files in the order transformers prefers them: index or single file.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
FLOAT_TYPES = ("float32", "float16", "bfloat16")
SAFETENSORS_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
OPTIONAL_SUFFIXES = (".q_pos_embed", ".k_pos_embed")
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
OPEN_SHARDS = 2
LISTED_PROBLEMS = 40


class Checkpoint:
    """An open checkpoint folder whose names and shapes have all been checked.

    Attributes:
        folder: where it lies.
        config: what its JSON files say.
    """

    def __init__(self, folder: Path) -> None:
        """Open ``folder`` and check everything but the numbers.

        Raises:
            CheckpointError: files are missing or unreadable, or tensors are missing, unexpected or misshaped;
                all of them are named at once.
            ConfigError: config.json describes a model that is not supported.
        """
        self.folder = folder
        self._check_files()
        self.config: ModelConfig = model_config(
            self._json("config.json"),
            self._json("preprocessor_config.json"),
            self._json("generation_config.json") if (folder / "generation_config.json").exists() else {},
        )
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._weight_map = self._read_weight_map()
        self._check_tensors()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the mapped shards."""
        while self._shards:
            self._shards.popitem()[1].close()

    def __contains__(self, name: str) -> bool:
        return name in self._weight_map

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold weights."""
        return sorted(set(self._weight_map.values()))

    def stored(self, name: str) -> Tensor:
        """One tensor in the type of its file, unchecked; it stays mapped, so it takes no memory of the process."""
        return self._shard(self._weight_map[name]).tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor as float32.

        Raises:
            CheckpointError: the tensor holds NaN or infinity.
        """
        value = self.stored(name).to(torch.float32, copy=True)
        bad = int((~value.isfinite()).sum())
        if bad:
            raise CheckpointError(
                f"{self.folder}: tensor {name} holds {bad} values that are NaN or infinite; the file is damaged "
                "or the training diverged"
            )
        return value

    def load_into(self, module: torch.nn.Module, prefix: str) -> None:
        """Fill ``module`` from the tensors under ``prefix``; absent position buffers keep their computed values."""
        targets: Mapping[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, target in targets.items():
                if prefix + name in self:
                    target.copy_(self.tensor(prefix + name))

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder; expected a checkpoint in the official layout (config.json, weights, "
                "tokenizer.model, …)"
            )
        missing = [name for name in REQUIRED_FILES if not (self.folder / name).is_file()]
        if not any((self.folder / name).is_file() for name in WEIGHT_FILES):
            missing.append(f"weights (one of {', '.join(WEIGHT_FILES)})")
        if missing:
            raise CheckpointError(
                f"{self.folder} is not an official mPLUG-Owl2 checkpoint; missing: {', '.join(missing)}"
            )

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no readable JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
        return value

    def _read_weight_map(self) -> dict[str, str]:
        name = next(name for name in WEIGHT_FILES if (self.folder / name).is_file())
        if not name.endswith(".index.json"):
            return dict.fromkeys(self._shard(name).names(), name)
        weight_map = self._json(name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{self.folder / name}: weight_map must map tensor names to file names")
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise CheckpointError(f"{self.folder / name}: shards must lie beside it, not at {', '.join(outside)}")
        missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {len(shards)} shards named by {name} are missing: "
                f"{', '.join(missing)}; copy or download them"
            )
        return weight_map

    def _check_tensors(self) -> None:
        with torch.device("meta"):
            expected = Owl2Model(self.config).state_dict()
        optional = {name for name in expected if name.endswith(OPTIONAL_SUFFIXES)}
        if self.config.decoder.tie_word_embeddings:
            optional.add("lm_head.weight")
        problems = [
            f"missing {name} {list(expected[name].shape)}"
            for name in expected
            if name not in self and name not in optional
        ]
        problems += [
            f"unexpected {name}"
            for name in self._weight_map
            if name not in expected and not name.endswith(IGNORED_SUFFIX)
        ]
        problems += self._misshaped(expected)
        if problems:
            shown = problems[:LISTED_PROBLEMS]
            if len(problems) > len(shown):
                shown.append(f"… and {len(problems) - len(shown)} more")
            raise CheckpointError(
                f"{self.folder}: {len(problems)} tensors do not fit its config.json:\n  " + "\n  ".join(shown)
            )

    def _misshaped(self, expected: Mapping[str, Tensor]) -> Iterable[str]:
        # Shard by shard, so that each is opened once.
        for name in sorted(set(expected) & set(self._weight_map), key=lambda n: (self._weight_map[n], n)):
            file = self._weight_map[name]
            found = self._shard(file).describe(name)
            if found is None:
                yield f"missing {name}: the index says {file}, which does not hold it"
                continue
            shape, dtype = found
            if shape != tuple(expected[name].shape):
                yield f"misshaped {name}: {list(shape)}, expected {list(expected[name].shape)}"
            elif dtype not in FLOAT_TYPES:
                yield f"{name} is stored as {dtype}; expected float32, float16 or bfloat16"

    def _shard(self, file: str) -> _Shard:
        if file in self._shards:
            self._shards.move_to_end(file)
        else:
            self._shards[file] = _Shard(self.folder / file)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)[1].close()
        return self._shards[file]


class _Shard:
    """One weight file, opened lazily; both formats answer the same three questions."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._bin: Mapping[str, Tensor] | None = None
        try:
            if path.suffix == ".safetensors":
                self._safe = self._stack.enter_context(safe_open(path, framework="pt"))
                self._names = set(self._safe.keys())
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
        self._names = set(self._bin)

    def names(self) -> set[str]:
        return self._names

    def describe(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """Shape and dtype without reading the numbers; None when this file does not hold the tensor."""
        if name not in self._names:
            return None
        value = self.tensor(name) if self._bin is not None else None
        if value is not None:
            return tuple(value.shape), str(value.dtype).removeprefix("torch.")
        view = self._safe.get_slice(name)
        stored: str = view.get_dtype()
        return tuple(view.get_shape()), SAFETENSORS_TYPES.get(stored, stored)

    def tensor(self, name: str) -> Tensor:
        return self._bin[name] if self._bin is not None else self._safe.get_tensor(name)

    def close(self) -> None:
        self._bin = None
        self._stack.close()
