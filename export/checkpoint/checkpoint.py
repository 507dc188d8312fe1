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

from owl2.export.checkpoint.gptq_layout import GptqTensors, read_format, unpack
from owl2.export.checkpoint.hf_config import model_config
from owl2.quant.grid import QuantizedWeight
from owl2.quant.models.mplug_owl2 import Owl2Model
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
# What AutoGPTQ called its one file.
GPTQ_FILES = "gptq_model-*bit-*g.safetensors"
FLOAT_TYPES = ("float32", "float16", "bfloat16")
SAFETENSORS_TYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I32": "int32",
}
DECODER_LAYERS = "model.layers."
Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Shape and allowed dtypes of each tensor."""
OPTIONAL_SUFFIXES = (".q_pos_embed", ".k_pos_embed")
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
OPEN_SHARDS = 2
LISTED_PROBLEMS = 40


class Checkpoint:
    """An open checkpoint folder whose names and shapes have all been checked.

    Attributes:
        folder: where it lies.
        config: what its JSON files say.
        gptq: how quantized layers are stored; None for a checkpoint that is not quantized.
        quantized: names of the linear layers that are, as in ``model.layers.0.mlp.up_proj``.
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
        config = self._json("config.json")
        self.gptq = read_format(folder, config)
        self.config: ModelConfig = model_config(
            config,
            self._json("preprocessor_config.json"),
            self._json("generation_config.json") if (folder / "generation_config.json").exists() else {},
        )
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._weight_map = self._read_weight_map()
        # AutoGPTQ wrote a bias of zeros where a layer has none.
        self._idle_biases: set[str] = set()
        self.quantized = frozenset(name.removesuffix(".qweight") for name in self._weight_map if _is_qweight(name))
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
        return name in self._weight_map or self._linear(name) in self.quantized

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold weights."""
        return sorted(set(self._weight_map.values()))

    def stored(self, name: str) -> Tensor:
        """One tensor in the type of its file, unchecked; it stays mapped, so it takes no memory of the process."""
        return self._shard(self._weight_map[name]).tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor as float32; the weight of a quantized layer is what its integers stand for.

        Raises:
            CheckpointError: the tensor holds NaN or infinity.
        """
        if name not in self._weight_map and self._linear(name) in self.quantized:
            return self.quantized_weight(self._linear(name)).dequantize()
        value = self.stored(name).to(torch.float32, copy=True)
        bad = int((~value.isfinite()).sum())
        if bad:
            raise CheckpointError(
                f"{self.folder}: tensor {name} holds {bad} values that are NaN or infinite; the file is damaged "
                "or the training diverged"
            )
        return value

    def quantized_weight(self, linear: str) -> QuantizedWeight:
        """The integers of a layer named in :attr:`quantized`, as they are in the file.

        Raises:
            CheckpointError: they are damaged or malformed.
        """
        assert self.gptq is not None

        def read(suffix: str) -> Tensor:
            name = f"{linear}.{suffix}"
            return self._shard(self._weight_map[name]).tensor(name)

        bias = f"{linear}.bias"
        if bias in self._idle_biases and bias in self._weight_map and bool(read("bias").any()):
            raise CheckpointError(f"{self.folder}: {bias} is not zero, but config.json describes a model without it")
        g_idx = read("g_idx") if f"{linear}.g_idx" in self._weight_map else None
        tensors = GptqTensors(read("qweight"), read("qzeros"), read("scales"), g_idx)
        return unpack(tensors, self.gptq, f"{self.folder}: {linear}")

    @staticmethod
    def _linear(weight: str) -> str:
        return weight.removesuffix(".weight") if weight.startswith(DECODER_LAYERS) else ""

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
        if self._weight_file() is None:
            missing.append(f"weights (one of {', '.join(WEIGHT_FILES)})")
        if missing:
            raise CheckpointError(
                f"{self.folder} is not an official mPLUG-Owl2 checkpoint; missing: {', '.join(missing)}"
            )

    def _weight_file(self) -> str | None:
        """The index or the one file with the weights."""
        found = [name for name in WEIGHT_FILES if (self.folder / name).is_file()]
        single = [path.name for path in self.folder.glob(GPTQ_FILES)]
        return next(iter(found or single), None)

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
        name = self._weight_file()
        assert name is not None
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
            state = Owl2Model(self.config).state_dict()
        expected: Expected = {name: (tuple(value.shape), FLOAT_TYPES) for name, value in state.items()}
        optional = {name for name in expected if name.endswith(OPTIONAL_SUFFIXES)}
        if self.config.decoder.tie_word_embeddings:
            optional.add("lm_head.weight")
        optional |= self._expect_quantized(expected)
        problems = [
            f"missing {name} {list(expected[name][0])}"
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

    def _expect_quantized(self, expected: Expected) -> set[str]:
        """Expect the tensors of quantized layers instead of their weights; returns the names of optional ones.

        Raises:
            CheckpointError: the JSON files and the tensors disagree on whether there are any.
        """
        if self.gptq is None and self.quantized:
            raise CheckpointError(
                f"{self.folder}: {len(self.quantized)} layers are quantized, but neither config.json nor "
                "quantize_config.json says how; copy quantize_config.json from where the checkpoint comes from"
            )
        if self.gptq is not None and not self.quantized:
            raise CheckpointError(f"{self.folder} is said to be quantized, but no layer of the decoder is")
        optional = set()
        for linear in self.quantized:
            weight = expected.pop(f"{linear}.weight", None)
            if self.gptq is None or weight is None:
                continue  # not a layer of this model: its tensors are unexpected
            rows, width = weight[0]
            for suffix, (shape, dtypes) in GptqTensors.shapes(rows, width, self.gptq).items():
                expected[f"{linear}.{suffix}"] = shape, dtypes
            optional.add(f"{linear}.g_idx")  # older programs wrote none where it says nothing
            if f"{linear}.bias" not in expected:
                self._idle_biases.add(f"{linear}.bias")
                expected[f"{linear}.bias"] = (rows,), FLOAT_TYPES
        return optional | self._idle_biases

    def _misshaped(self, expected: Expected) -> Iterable[str]:
        # Shard by shard, so that each is opened once.
        for name in sorted(set(expected) & set(self._weight_map), key=lambda n: (self._weight_map[n], n)):
            file = self._weight_map[name]
            found = self._shard(file).describe(name)
            if found is None:
                yield f"missing {name}: the index says {file}, which does not hold it"
                continue
            (shape, dtype), (right, dtypes) = found, expected[name]
            if shape != right:
                yield f"misshaped {name}: {list(shape)}, expected {list(right)}"
            elif dtype not in dtypes:
                *most, last = dtypes
                yield f"{name} is stored as {dtype}; expected {', '.join(most)}{' or ' if most else ''}{last}"

    def _shard(self, file: str) -> _Shard:
        if file in self._shards:
            self._shards.move_to_end(file)
        else:
            self._shards[file] = _Shard(self.folder / file)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)[1].close()
        return self._shards[file]


def _is_qweight(name: str) -> bool:
    return name.startswith(DECODER_LAYERS) and name.endswith(".qweight")


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
