"""LoRA adapters in PEFT's layout, added to the weights that they were trained on.

A matrix W [out, in] becomes W + s * B A, with A [r, in] and B [out, r] of the adapter and s = alpha / r (LoRA, Hu et
al. 2021, section 4.1) or alpha / sqrt(r) where it is rank-stabilised (rsLoRA, Kalajdzievski 2023). Modules that were
trained as a whole take the place of the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owl2.export.checkpoint.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WHOLE_WEIGHTS, check_pointers, json_object
from owl2.export.checkpoint.naming import OPTIONAL_SUFFIXES
from owl2.export.checkpoint.shard import Shard
from owl2.runtime.errors import CheckpointError
from owl2.runtime.foreign import listed, shorten
from owl2.runtime.harmless import harmless

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(\.default)?(\.weight)?")
WRAPPERS = re.compile(r"\.(modules_to_save|base_layer)(\.default)?(?=\.)")
IDLE = ".original_module."
"""PEFT keeps the base's own module beside one that is saved whole."""
LISTED = 5
FRONT = "base_model.model."
"""What PEFT puts in front of the base's names."""

USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "init_lora_weights")
TRAINING = (
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config fan_in_fan_out inference_mode lora_dropout "
    "megatron_config megatron_core peft_version qalora_group_size revision runtime_config task_type"
)
TARGETS = "bias exclude_modules layers_pattern layers_to_transform modules_to_save target_modules"
WITHOUT_EFFECT = frozenset((*TRAINING.split(), *TARGETS.split()))
"""Settings of training, of saving and of layers that this model does not have; and those that names of tensors tell."""
SAME_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights as they are; the others begin by changing them."""


@dataclass(frozen=True)
class Factors:
    """Where the two factors of a matrix are, by the letters A and B; each a file and a name in it."""

    places: Mapping[str, tuple[Path, str]]
    rank: int
    scale: float
    transposed: bool


class Adapter:
    """An adapter whose names all belong to a model.

    Attributes:
        folder: of its files.
        files: all of them that are read.
        base: the model that it says it was trained on; empty if it does not.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        """Open ``folder``.

        Args:
            folder: with adapter_config.json and its weights, as PEFT's save_pretrained writes them; a file
                non_lora_trainables.bin, as the training programs of LLaVA and mPLUG-Owl2 write it, is read too.
            names: official names of the base's tensors.

        Raises:
            CheckpointError: files are missing or damaged, or it is an adapter of another kind or of another model.
        """
        self.folder = folder
        if not (folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} is not a LoRA adapter: {ADAPTER_CONFIG} is missing; give the folder that PEFT's "
                "save_pretrained wrote"
            )
        check_pointers(folder, (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, WHOLE_WEIGHTS))
        config = json_object(folder / ADAPTER_CONFIG)
        weights = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
        if not weights:
            raise CheckpointError(f"{folder}: the adapter's weights ({' or '.join(ADAPTER_WEIGHTS)}) are missing")
        whole = [folder / WHOLE_WEIGHTS] if (folder / WHOLE_WEIGHTS).is_file() else []
        self.files = (folder / ADAPTER_CONFIG, weights[0], *whole)
        self.base = str(config.get("base_model_name_or_path") or "")
        _check_kind(config, folder)
        self._shards = {path: Shard(path) for path in self.files[1:]}
        self._factors, self._whole = self._assign(config, names)

    @property
    def note(self) -> str:
        """What is done with it, a sentence without its full stop."""
        ranks = sorted({factors.rank for factors in self._factors.values()})
        parts = []
        if self._factors:
            parts.append(f"{len(self._factors)} matrices get what it adds (rank {', '.join(map(str, ranks))})")
        if self._whole:
            parts.append(f"{len(self._whole)} tensors are replaced ({listed(sorted(self._whole), 3)})")
        base = f", which was trained on {shorten(self.base)}" if self.base else ""
        return f"merged with the LoRA adapter{base}: {'; '.join(parts)}"

    def __contains__(self, name: str) -> bool:
        return name in self._factors or name in self._whole

    def replaces(self, name: str) -> bool:
        """Whether it has this tensor as a whole."""
        return name in self._whole

    def merged(self, name: str, base: Tensor) -> Tensor:
        """The tensor of this official name once the adapter is merged: float32, or ``base`` itself if it stays.

        Raises:
            CheckpointError: the adapter's numbers are NaN or infinite.
        """
        if name not in self:
            return base
        value = self._read(self._whole[name]) if name in self._whole else base.to(torch.float32)
        if name in self._factors:
            factors = self._factors[name]
            change = self._read(factors.places["B"]) @ self._read(factors.places["A"])
            value = value + factors.scale * (change.T if factors.transposed else change)
        return value

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if a tensor does not fit the base's, whose shapes these are by official name."""
        problems = []
        for name, place in self._whole.items():
            if (found := self._shape(place)) != shapes[name]:
                problems.append(f"{name} is {list(found)}, in the base {list(shapes[name])}")
        for name, factors in self._factors.items():
            a, b = self._shape(factors.places["A"]), self._shape(factors.places["B"])
            made = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] == factors.rank else None
            if made is None or (made[::-1] if factors.transposed else made) != shapes[name]:
                problems.append(
                    f"{name}: A {list(a)} and B {list(b)} of rank {factors.rank} do not fit its {list(shapes[name])}"
                )
        if problems:
            more = f", and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
            raise CheckpointError(
                f"{self.folder}: the adapter does not fit this model: {', '.join(problems[:LISTED])}{more}; give the "
                "checkpoint it was trained on"
            )

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _assign(
        self, config: Mapping[str, Any], names: Collection[str]
    ) -> tuple[dict[str, Factors], dict[str, tuple[Path, str]]]:
        """Tell which tensor changes which of the base."""
        places: dict[str, dict[str, tuple[Path, str]]] = {}
        own_names: dict[str, str] = {}
        transposed, whole, strange = set[str](), dict[str, tuple[Path, str]](), list[str]()
        for path, shard in self._shards.items():
            for stored in sorted(shard.names):
                if IDLE in stored:
                    continue
                found = FACTOR.fullmatch(stored)
                inner = WRAPPERS.sub("", found["module"] if found else stored)
                inner = inner.removeprefix(FRONT)
                official = _official(f"{inner}.weight" if found else inner, names)
                other = places.get(official or "", {}).get(found["letter"]) if found else whole.get(official or "")
                if other is not None:
                    # The training programs load PEFT's file on top of the other one; PEFT saves some biases twice.
                    if path == other[0] and not torch.equal(self._read(other), self._read((path, stored))):
                        raise CheckpointError(
                            f"{path}: {listed([other[1], stored])} would both be {official}, so which one is meant is "
                            "not certain; keep one"
                        )
                    continue
                if official is None:
                    if not inner.endswith(OPTIONAL_SUFFIXES):  # computed where a checkpoint has none
                        strange.append(stored)
                elif found:
                    places.setdefault(official, {})[found["letter"]] = path, stored
                    own_names[official] = inner
                    if found["embedding"]:
                        transposed.add(official)
                else:
                    whole[official] = path, stored
        strange += [f"{name} (one factor of two)" for name, pair in places.items() if len(pair) < 2]
        if strange or not (places or whole):
            raise CheckpointError(
                f"{self.folder}: the adapter "
                f"{f'has tensors that this model does not: {listed(strange, 5)}' if strange else 'is empty'}; give the "
                "checkpoint it was trained on"
            )
        factors = {
            name: Factors(pair, *_rank_and_scale(config, own_names[name], self.folder), name in transposed)
            for name, pair in places.items()
        }
        return factors, whole

    def _shape(self, place: tuple[Path, str]) -> tuple[int, ...]:
        path, name = place
        found = self._shards[path].describe(name)
        assert found is not None  # its name is from there
        return found[0]

    def _read(self, place: tuple[Path, str]) -> Tensor:
        path, name = place
        value = self._shards[path].tensor(name).to(torch.float32)
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: tensor {harmless(name)} holds NaN or infinite values; the file is damaged")
        return value


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what would change the model in another way than adding two factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is an adapter of kind {shorten(kind)}; only LORA can be merged here")
    start = config.get("init_lora_weights", True)
    others = [name for name, value in config.items() if value and name not in WITHOUT_EFFECT and name not in USED]
    if start not in SAME_BASE:
        others.append(f"init_lora_weights {shorten(start)}")
    if others:
        raise CheckpointError(
            f"{folder}: its {ADAPTER_CONFIG} sets {listed(sorted(others))}, which cannot be merged here; merge it with "
            "PEFT (merge_and_unload, then save_pretrained), and export the result"
        )


def _official(name: str, names: Collection[str]) -> str | None:
    """The base's name for it: the adapter may be of the inner model, which has no ``model.`` in front."""
    return next((found for found in (name, f"model.{name}") if found in names), None)


def _rank_and_scale(config: Mapping[str, Any], module: str, folder: Path) -> tuple[int, float]:
    """Of one module by the adapter's own name, as PEFT finds them: the first pattern that fits goes first."""
    rank = _patterned(config, "rank_pattern", module, config.get("r"))
    alpha = _patterned(config, "alpha_pattern", module, config.get("lora_alpha"))
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {name} of {module} is {shorten(value)}, not a number")
    if rank < 1 or rank != int(rank):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: r of {module} is {rank}, expected 1 or more")
    return int(rank), float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _patterned(config: Mapping[str, Any], key: str, module: str, usual: Any) -> Any:  # noqa: ANN401 - JSON
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{key} must map patterns to numbers, got {shorten(patterns)}")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{key}: {shorten(pattern)} is not a pattern ({error})") from error
    return usual
