"""Reading an official checkpoint, tensor by tensor.

Nothing is held but the shard in use: ``.bin`` shards are memory-mapped through torch's restricted unpickler,
safetensors shards are read by slice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from owl2.export.checkpoint.files import (
    GENERATION,
    PREPROCESSOR,
    check_pointers,
    find_weights,
    json_object,
    preprocessor_of_base,
)
from owl2.export.checkpoint.gptq_format import read_format
from owl2.export.checkpoint.gptq_layout import GptqTensors, unpack
from owl2.export.checkpoint.hf_config import config_notes, model_config
from owl2.export.checkpoint.lora import Adapter
from owl2.export.checkpoint.naming import (
    ADAPTER_EFFECT,
    HEAD_WEIGHT,
    OPTIONAL_SUFFIXES,
    TABLE,
    USUAL_BUFFER,
    official_names,
)
from owl2.export.checkpoint.remarks import find_cause, notes
from owl2.export.checkpoint.scoring import find_preset
from owl2.export.checkpoint.shard import Shard
from owl2.export.checkpoint.tokenizer_source import read_tokenizer
from owl2.quant.grid import QuantizedWeight
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.config import ModelConfig, require
from owl2.runtime.errors import BundleError, CheckpointError
from owl2.runtime.foreign import cut, listed, reading
from owl2.runtime.harmless import harmless

FLOAT_TYPES = ("float32", "float16", "bfloat16")
DECODER_LAYERS = "model.layers."
VOCABULARY = (TABLE, HEAD_WEIGHT)
"""Tensors with a row for every token id."""
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
        tokenizer: its tokenizer, and what a bundle needs of it.
        preset: name of the preset with which it scores images; empty where its names do not tell.
        quantized: names of the quantized linear layers, as in ``model.layers.0.mlp.up_proj``.
        preprocessor: content of preprocessor_config.json, or what stands for it.
        adapter: what is added to its weights; None for the weights alone.
        notes: what was converted, taken for granted or left out, and what its JSON files say that has no effect here, a
            sentence each.
    """

    def __init__(self, folder: Path, *, base_preprocessor: bool = False, adapter: Path | None = None) -> None:
        """Open ``folder`` and check everything but the numbers.

        Args:
            folder: in the official layout, or in one whose meaning is certain.
            base_preprocessor: take the values of mPLUG-Owl2 itself instead of preprocessor_config.json.
            adapter: folder of a LoRA adapter that was trained on it; every tensor is read with the adapter merged.

        Raises:
            CheckpointError: files are missing or unreadable, or tensors are missing, unexpected or misshaped;
                all of them are named at once. Or the adapter cannot be merged into this checkpoint.
            ConfigError: config.json describes an unsupported model.
        """
        self.folder = folder
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        weights = find_weights(folder, base_preprocessor=base_preprocessor)
        config = json_object(folder / "config.json")
        require(
            not (base_preprocessor and (folder / PREPROCESSOR).exists()),
            f"{folder} has a {PREPROCESSOR}; leave --base-preprocessor (base_preprocessor) out",
        )
        self.gptq = read_format(folder, config)
        self.preprocessor = preprocessor_of_base(config) if base_preprocessor else json_object(folder / PREPROCESSOR)
        generation = json_object(folder / GENERATION) if (folder / GENERATION).exists() else None
        self.config: ModelConfig = model_config(config, self.preprocessor, generation or {})
        try:
            self.tokenizer = read_tokenizer(folder, self.config.decoder.vocab_size)
            self.tokenizer.tokenizer.require_fit(self.config.decoder, folder)
        except BundleError as error:
            raise CheckpointError(str(error)) from error
        files = self._read_weight_map(weights)
        names = official_names(files, str(folder))
        self._stored = names.stored
        self._weight_map = {name: files[stored] for name, stored in names.stored.items()}
        # AutoGPTQ wrote a bias of zeros where a layer has none.
        self._idle_biases: set[str] = set()
        self.quantized = frozenset(
            name.removesuffix(".qweight")
            for name in self._weight_map
            if name.startswith(DECODER_LAYERS) and name.endswith(".qweight")
        )
        self._check_adapter({name: files[name] for name in names.adapter})
        rows = self._check_tensors()
        self.adapter = None if adapter is None else self._open_adapter(adapter)
        self.preset = find_preset(folder, config, adapter)
        said = config_notes(config, self.preprocessor, generation), self.tokenizer.notes
        merged = () if self.adapter is None else (self.adapter.note,)
        self.notes = (*said[0], *said[1], *notes(folder, names, rows, self.config), *merged)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._shards:
            self._shards.popitem()[1].close()
        if self.adapter is not None:
            self.adapter.close()

    def __contains__(self, name: str) -> bool:
        return name in self._weight_map

    @property
    def weight_files(self) -> list[str]:
        return sorted(set(self._weight_map.values()))

    def stored(self, name: str) -> Tensor:
        """One tensor in the type of its file, unchecked; it stays mapped, so it takes no memory of the process.

        One that an adapter changes is float32, in memory.
        """
        tensor = self._shard(self._weight_map[name]).tensor(self._stored[name])
        if self.adapter is not None:
            tensor = self.adapter.merged(name, tensor)
        return tensor[: self.config.decoder.vocab_size] if name in VOCABULARY else tensor

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

    def _read_weight_map(self, name: str) -> dict[str, str]:
        """File of every tensor, by its name there."""
        if not name.endswith(".index.json"):
            return dict.fromkeys(self._shard(name).names, name)
        weight_map = json_object(self.folder / name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{self.folder / name}: weight_map must map tensor names to file names")
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise CheckpointError(f"{self.folder / name}: shards must be next to it, not at {listed(outside)}")
        with reading(self.folder / name, CheckpointError, "copy or download it again"):
            missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {len(shards)} shards named by {name} are missing: "
                f"{listed(missing)}; copy or download them"
            )
        check_pointers(self.folder, shards)
        return weight_map

    def _check_adapter(self, files: Mapping[str, str]) -> None:
        """Refuse tensors of a LoRA adapter that changes something."""
        apart = [name for name in self._stored.values() if ".base_layer." in name]
        working = [
            name
            for name, file in files.items()
            if ADAPTER_EFFECT.fullmatch(name)
            and (tensor := self._shard(file).tensor(name)).any() | tensor.isnan().any()
        ]
        if apart or working:
            raise CheckpointError(
                f"{self.folder} holds a LoRA adapter beside the weights ({listed(working or apart)}): merge it first "
                "(PEFT: merge_and_unload, then save_pretrained), and export the result"
            )

    def _open_adapter(self, folder: Path) -> Adapter:
        if self.gptq is not None:
            raise CheckpointError(
                f"{self.folder} is quantized, and an adapter cannot be merged into integers; give the original "
                "checkpoint"
            )
        adapter = Adapter(folder, self._weight_map.keys())
        if self.config.decoder.tie_word_embeddings and adapter.replaces(TABLE):
            raise CheckpointError(
                f"{folder} replaces the token table, which is the head too (tie_word_embeddings), and whether the head "
                "was trained with it is not certain; merge it with PEFT, and export the result"
            )
        changed = self._described(filter(adapter.__contains__, self._weight_map))
        adapter.check_shapes({name: found[0] for name, found in changed if found is not None})
        return adapter

    def _is_zero(self, file: str, name: str) -> bool:
        found = self._shard(file).describe(name)
        return found is not None and found[1] in FLOAT_TYPES and not self._shard(file).tensor(name).any()

    def _check_tensors(self) -> int:
        """Check names, shapes and types; returns the rows of the token table."""
        with torch.device("meta"):
            state = Owl2Model(self.config).state_dict()
        expected: Expected = {name: (tuple(value.shape), FLOAT_TYPES) for name, value in state.items()}
        rows = self._expect_rows(expected)
        optional = {name for name in expected if name.endswith(OPTIONAL_SUFFIXES)}
        if self.config.decoder.tie_word_embeddings:
            optional.add(HEAD_WEIGHT)
        optional |= self._expect_quantized(expected)
        missing = [name for name in expected if name not in self and name not in optional]
        unexpected = [name for name in self._weight_map if name not in expected and not name.endswith(USUAL_BUFFER)]
        problems = [f"missing {name} {list(expected[name][0])}" for name in missing]
        problems += [f"unexpected {harmless(cut(self._stored[name], 200))}" for name in unexpected]
        problems += self._misshaped(expected)
        if problems:
            shown = problems[:MAX_LISTED_PROBLEMS]
            if len(problems) > len(shown):
                shown.append(f"… and {len(problems) - len(shown)} more")
            cause = find_cause(missing, unexpected, self.config, rows)
            raise CheckpointError(
                f"{self.folder}: {len(problems)} tensors do not fit its config.json{cause}:\n  " + "\n  ".join(shown)
            )
        return rows

    def _expect_rows(self, expected: Expected) -> int:
        """Expect more rows of token table and head where both have them: config.json's size tells which are in use."""
        rows, own = [], self.config.decoder.vocab_size
        for name in VOCABULARY:
            if name in self and (found := self._shard(self._weight_map[name]).describe(self._stored[name])):
                rows.append(found[0][0] if found[0] else 0)
        if len(set(rows)) == 1 and rows[0] > own:
            for name in VOCABULARY:
                shape, dtypes = expected[name]
                expected[name] = (rows[0], *shape[1:]), dtypes
        return rows[0] if rows else own

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

    def _described(self, names: Iterable[str]) -> Iterator[tuple[str, tuple[tuple[int, ...], str] | None]]:
        """Names with what their files say of them, shard by shard, so that each is opened once."""
        for name in sorted(names, key=lambda n: (self._weight_map[n], n)):
            yield name, self._shard(self._weight_map[name]).describe(self._stored[name])

    def _misshaped(self, expected: Expected) -> Iterable[str]:
        for name, found in self._described(set(expected) & set(self._weight_map)):
            if found is None:
                yield f"missing {name}: the index says {self._weight_map[name]}, which does not hold it"
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
