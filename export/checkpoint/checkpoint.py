"""Reading an official checkpoint, tensor by tensor.

Nothing is held but the shard in use: ``.bin`` shards are memory-mapped through torch's restricted unpickler,
safetensors shards are read by slice.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owl2.export.checkpoint.files import REQUIRED_FILES, WEIGHT_FILES
from owl2.export.checkpoint.gptq_format import read_format
from owl2.export.checkpoint.gptq_layout import GptqTensors, unpack
from owl2.export.checkpoint.hf_config import model_config
from owl2.export.checkpoint.shard import Shard
from owl2.quant.grid import QuantizedWeight
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.config import ModelConfig
from owl2.runtime.errors import CheckpointError

# AutoGPTQ's name for its one file.
GPTQ_FILES = "gptq_model-*bit-*g.safetensors"
FLOAT_TYPES = ("float32", "float16", "bfloat16")
DECODER_LAYERS = "model.layers."
OPTIONAL_SUFFIXES = (".q_pos_embed", ".k_pos_embed")
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
MAX_OPEN_SHARDS = 2
MAX_LISTED_PROBLEMS = 40

Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Shape and allowed dtypes of each tensor."""


class Checkpoint:
    """An open checkpoint folder whose names and shapes have all been checked.

    Attributes:
        folder: of the files.
        config: the model that its JSON files describe.
        gptq: how quantized layers are stored; None for a checkpoint that is not quantized.
        quantized: names of the quantized linear layers, as in ``model.layers.0.mlp.up_proj``.
    """

    def __init__(self, folder: Path) -> None:
        """Open ``folder`` and check everything but the numbers.

        Raises:
            CheckpointError: files are missing or unreadable, or tensors are missing, unexpected or misshaped;
                all of them are named at once.
            ConfigError: config.json describes an unsupported model.
        """
        self.folder = folder
        weights = self._check_files()
        config = self._json("config.json")
        self.gptq = read_format(folder, config)
        self.config: ModelConfig = model_config(
            config,
            self._json("preprocessor_config.json"),
            self._json("generation_config.json") if (folder / "generation_config.json").exists() else {},
        )
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._weight_map = self._read_weight_map(weights)
        # AutoGPTQ wrote a bias of zeros where a layer has none.
        self._idle_biases: set[str] = set()
        self.quantized = frozenset(
            name.removesuffix(".qweight")
            for name in self._weight_map
            if name.startswith(DECODER_LAYERS) and name.endswith(".qweight")
        )
        self._check_tensors()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._shards:
            self._shards.popitem()[1].close()

    def __contains__(self, name: str) -> bool:
        return name in self._weight_map

    @property
    def weight_files(self) -> list[str]:
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

    def quantized_weight(self, linear: str) -> QuantizedWeight:
        assert self.gptq is not None
        bias = f"{linear}.bias"
        if bias in self._idle_biases and bias in self and bool(self.stored(bias).any()):
            raise CheckpointError(f"{self.folder}: {bias} is not zero, but config.json describes a model without it")
        qweight, qzeros, scales = (self.stored(f"{linear}.{suffix}") for suffix in ("qweight", "qzeros", "scales"))
        g_idx = self.stored(f"{linear}.g_idx") if f"{linear}.g_idx" in self else None
        return unpack(GptqTensors(qweight, qzeros, scales, g_idx), self.gptq, f"{self.folder}: {linear}")

    @torch.no_grad()
    def load_into(self, module: torch.nn.Module, prefix: str) -> dict[str, QuantizedWeight]:
        """Fill ``module`` from the tensors under ``prefix``; absent position buffers keep their computed values.

        Returns:
            The integers of quantized linear layers, by their names within ``module``, which holds what they stand for.
        """
        integers = {}
        for name, target in (*module.named_parameters(), *module.named_buffers()):
            linear = name.removesuffix(".weight")
            if prefix + linear in self.quantized:
                integers[linear] = weight = self.quantized_weight(prefix + linear)
                target.copy_(weight.dequantize())
            elif prefix + name in self:
                target.copy_(self.tensor(prefix + name))
        return integers

    def _check_files(self) -> str:
        """Name of the index or of the one file with the weights."""
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder; expected a checkpoint in the official layout (config.json, weights, "
                "tokenizer.model, …)"
            )
        missing = [name for name in REQUIRED_FILES if not (self.folder / name).is_file()]
        weights = [name for name in WEIGHT_FILES if (self.folder / name).is_file()]
        weights += [path.name for path in self.folder.glob(GPTQ_FILES)]
        if not weights:
            missing.append(f"weights (one of {', '.join(WEIGHT_FILES)})")
        if missing:
            raise CheckpointError(
                f"{self.folder} is not an official mPLUG-Owl2 checkpoint; missing: {', '.join(missing)}"
            )
        return weights[0]

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
        return value

    def _read_weight_map(self, name: str) -> dict[str, str]:
        if not name.endswith(".index.json"):
            return dict.fromkeys(self._shard(name).names, name)
        weight_map = self._json(name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{self.folder / name}: weight_map must map tensor names to file names")
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise CheckpointError(f"{self.folder / name}: shards must be next to it, not at {', '.join(outside)}")
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
            shown = problems[:MAX_LISTED_PROBLEMS]
            if len(problems) > len(shown):
                shown.append(f"… and {len(problems) - len(shown)} more")
            raise CheckpointError(
                f"{self.folder}: {len(problems)} tensors do not fit its config.json:\n  " + "\n  ".join(shown)
            )

    def _expect_quantized(self, expected: Expected) -> set[str]:
        """Expect the tensors of quantized layers instead of their weights; returns the names of optional ones."""
        if self.gptq is None and self.quantized:
            raise CheckpointError(
                f"{self.folder}: {len(self.quantized)} layers are quantized, but neither config.json nor "
                "quantize_config.json says how; copy quantize_config.json from the source of the checkpoint"
            )
        if self.gptq is not None and not self.quantized:
            raise CheckpointError(
                f"{self.folder}: its JSON files describe a quantized checkpoint, but no layer is quantized; export the "
                "original checkpoint"
            )
        optional = set()
        for linear in self.quantized:
            weight = expected.pop(f"{linear}.weight", None)
            if self.gptq is None or weight is None:
                continue  # not a layer of this model: its tensors are unexpected
            rows, width = weight[0]
            for suffix, (shape, dtypes) in GptqTensors.shapes(rows, width, self.gptq).items():
                expected[f"{linear}.{suffix}"] = shape, dtypes
            optional.add(f"{linear}.g_idx")  # older programs left it out where columns are in order
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

    def _shard(self, file: str) -> Shard:
        if file in self._shards:
            self._shards.move_to_end(file)
        else:
            self._shards[file] = Shard(self.folder / file)
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)[1].close()
        return self._shards[file]
