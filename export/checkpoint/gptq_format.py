"""Settings of a checkpoint in the GPTQ layout: the JSON that says how its quantized layers are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from owl2.quant.config import BITS, GROUP_SIZES
from owl2.runtime.errors import CheckpointError
from owl2.runtime.foreign import cut, listed, read_json, reading, shorten
from owl2.runtime.harmless import harmless

CONFIG_FILE = "quantize_config.json"
CONFIG_KEY = "quantization_config"
FORMATS: dict[str, Literal[1, 2]] = {"gptq": 1, "gptq_v2": 2}
# The block sizes of a bundle, the fastest in ONNX Runtime first; longer groups are cut into them.
BLOCKS = (128, 64, 32, 16)
ALIASES = {
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "groupsize": "group_size",
    "quant_method": "method",
    "checkpoint_format": "format",
}
COMPARED = ("bits", "group_size", "format", "method", "desc_act", "sym", "lm_head")
"""Settings that must be the same wherever they are given, in whatever spelling."""
# These change the result in a way that the tensors do not show.
REFUSED = ("adapter", "rotation", "activation")


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """Storage of such a checkpoint's tensors, as its JSON files describe it.

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale; -1 for whole rows.
        desc_act: whether inputs were quantized by importance, so that ``g_idx`` matters.
        symmetric: all zero points are 2^(bits-1); None if the files do not say.
        version: 1 if zero points are stored minus one, 2 if they are not.
        producer: the program and its version, if given.
    """

    bits: int
    group_size: int
    desc_act: bool = False
    symmetric: bool | None = True
    version: Literal[1, 2] = 1
    producer: str = ""

    @property
    def block(self) -> int:
        """Columns per scale in a bundle; repeating the scales of longer groups changes no value."""
        if self.group_size in GROUP_SIZES:
            return self.group_size
        return next(size for size in BLOCKS if self.group_size == -1 or self.group_size % size == 0)

    def group_columns(self, width: int) -> int:
        """Columns per scale in the file, for K = ``width``."""
        return width if self.group_size == -1 else self.group_size

    def groups(self, width: int) -> int:
        """G for K = ``width``."""
        return -(-width // self.group_columns(width))

    def to_json(self) -> dict[str, Any]:
        """The content of ``quantize_config.json``, with the names that all readers know."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": bool(self.symmetric),
            "lm_head": False,
            "true_sequential": True,
            "static_groups": False,
            "quant_method": "gptq",
            "checkpoint_format": next(name for name, version in FORMATS.items() if version == self.version),
            "pack_dtype": "int32",
            "meta": {"quantizer": [self.producer]},
        }


def read_format(folder: Path, config: Mapping[str, Any]) -> GptqFormat | None:
    """The format of a quantized checkpoint with this config.json; None for one that is not quantized.

    Raises:
        CheckpointError: an unsupported quantization, missing settings, or two files that disagree.
    """
    sources = {}
    if config.get(CONFIG_KEY) is not None:
        sources[f"config.json, {CONFIG_KEY}"] = config[CONFIG_KEY]
    path = folder / CONFIG_FILE
    if path.is_file():
        with reading(path, CheckpointError, "copy or download it again from the source of the checkpoint"):
            sources[CONFIG_FILE] = read_json(path)
    if not sources:
        return None
    settings: dict[str, Any] = {}
    for name, source in sources.items():
        if not isinstance(source, Mapping):
            raise CheckpointError(f"{folder}: {name} must be a JSON object, got {shorten(source)}")
        for spelled, value in source.items():
            key = ALIASES.get(str(spelled), str(spelled))
            if value is not None and settings.setdefault(key, value) != value and key in COMPARED:
                raise CheckpointError(
                    f"{folder}: {key} is {shorten(settings[key])} in one place and {shorten(value)} in {name}"
                )
    return _checked(settings, f"{folder}: {' and '.join(sources)}")


def _checked(settings: Mapping[str, Any], where: str) -> GptqFormat:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise CheckpointError(f"{where}: {message}")

    method, form, pack = (
        cut(harmless(str(settings.get(key, default)).lower()))
        for key, default in (("method", "gptq"), ("format", "gptq"), ("pack_dtype", "int32"))
    )
    require(
        method == "gptq" and form in FORMATS and not settings.get("is_marlin_format"),
        f"the weights are quantized as {listed([method])}, format {listed([form])}; of quantized checkpoints only gptq "
        f"in the formats {' and '.join(FORMATS)} can be read. Export the original checkpoint instead",
    )
    for key in ("bits", "group_size"):
        value = settings.get(key)
        require(type(value) is int, f"{key} must be an integer, got {shorten(value)}")
    bits, size = settings["bits"], settings["group_size"]
    require(bits in BITS, f"bits is {bits}; only {BITS} can be read")
    require(
        size == -1 or (size > 0 and size % 16 == 0),
        f"group_size is {size}; -1 and multiples of 16 can be read",
    )
    for key in ("desc_act", "sym", "lm_head"):
        value = settings.get(key)
        require(value is None or isinstance(value, bool), f"{key} must be true or false, got {shorten(value)}")
    require(not settings.get("lm_head"), "the output head is quantized too; only decoder layers can be")
    for key in REFUSED:
        require(not settings.get(key), f"{key} is used, which cannot be read")
    require(pack.removeprefix("torch.") == "int32", f"numbers are packed in {pack}; only int32 can be read")
    dynamic = settings.get("dynamic") or {}
    require(isinstance(dynamic, Mapping), f"dynamic must be an object, got {shorten(dynamic)}")
    changed = [pattern for pattern in dynamic if not str(pattern).startswith("-:")]
    require(not changed, f"dynamic gives some layers settings of their own ({listed(changed, 3)})")
    meta = settings.get("meta")
    producer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return GptqFormat(
        bits=bits,
        group_size=size,
        desc_act=bool(settings.get("desc_act", False)),
        symmetric=settings.get("sym"),
        version=FORMATS[form],
        producer=", ".join(map(str, producer)) if isinstance(producer, list) else str(producer or ""),
    )
