"""Frozen configuration of a model: what a bundle's manifest stores and what every part of owl2 reads.

The foreign ``config.json`` of a PyTorch checkpoint is translated to these classes by
:mod:`owl2.export.checkpoint.hf_config`; nothing else reads it.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import listed, shorten

IMAGE_TOKEN = "<|image|>"
LONGEST_CONTEXT = 1 << 20  # positions; tables of the whole context are kept in memory
IMAGE_TOKEN_ID = -200

LARGEST = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "max_position_embeddings": LONGEST_CONTEXT,
    "image_size": 4096,
    "patch_size": 4096,
    "grid_size": 512,
    "num_learnable_queries": 1 << 14,
    "size": 8192,
    "crop_size": 4096,
    "context": LONGEST_CONTEXT,
    "prefill": LONGEST_CONTEXT,
    "images": 1024,
}
"""Upper bounds of sizes and counts by name, far above any model of this family: what exceeds them is refused before
memory or time is spent on it."""
LARGEST_ROTARY_TABLE = 1 << 28  # angles of the whole context; 2048 positions of 128 take 1 << 18
LARGEST_INTEGER = 1 << 53  # what every reader of JSON holds exactly
LONGEST_TEXT = 256
MOST_ENTRIES = 64  # files, engines

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_known(name: str, known: Sequence[str], what: str) -> None:
    """Refuse a name that is not ``known``, as ``what`` it was given, with the nearest that is.

    Raises:
        ConfigError: with all known names.
    """
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    require(name in known, f"{name} is not {what}; {hint}known: {', '.join(known)}")


def require_positive(config: Any, part: str) -> None:  # noqa: ANN401 - any of the classes below
    """Refuse sizes and counts that are not positive, or beyond :data:`LARGEST`; token ids may be 0.

    Raises:
        ConfigError: naming the field.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and not field.name.endswith("_token_id"):
            require(value > 0, f"{part} {field.name} must be positive, got {value}")
            largest = LARGEST.get(field.name, value)
            require(value <= largest, f"{part} {field.name} {value} is more than {largest}, the most that is supported")


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """ViT encoder (SPEC: ViT-L/14 in the 7B model)."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6
    use_cls_token: bool = True
    use_post_layernorm: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "vision")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of its {self.num_attention_heads} heads",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"vision image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )
        require(
            self.hidden_act in ("quick_gelu", "gelu"),
            f"vision hidden_act {self.hidden_act!r} is not supported; known: quick_gelu, gelu",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Rows the tower hands on, CLS included."""
        return self.grid**2 + int(self.use_cls_token)


@dataclass(frozen=True, slots=True)
class AbstractorConfig:
    """Visual abstractor: learned queries that cross-attend to the vision tower's rows."""

    hidden_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    num_learnable_queries: int = 64
    grid_size: int = 32
    layer_norm_eps: float = 1e-6
    use_cls_token: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "abstractor")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"abstractor hidden_size {self.hidden_size} is not a multiple of its {self.num_attention_heads} heads",
        )
        require(
            self.hidden_size % 4 == 0,
            f"abstractor hidden_size {self.hidden_size} must be a multiple of 4 (2-D sine positions)",
        )


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of rotary positions: ``linear`` divides positions, ``dynamic`` raises theta (NTK)."""

    type: Literal["linear", "dynamic"]
    factor: float

    def __post_init__(self) -> None:
        require(self.type in ("linear", "dynamic"), f"rope_scaling type {self.type!r}: linear or dynamic only")
        require(1.0 < self.factor < math.inf, f"rope_scaling factor {self.factor} must be greater than 1 and finite")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """LLaMA decoder with two k/v projections and two of each RMSNorm per layer (0 text, 1 image)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        require_positive(self, "decoder")
        ends = self.eos_token_ids
        require(0 < len(set(ends)) == len(ends), f"eos_token_ids must be different ids, got {shorten(ends)}")
        for name, token in (("bos_token_id", self.bos_token_id), *(("eos_token_ids", token) for token in ends)):
            require(0 <= token < self.vocab_size, f"{name} {token} is outside the vocabulary of {self.vocab_size}")
        width, heads = self.hidden_size, self.num_attention_heads
        require(width % heads == 0, f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
        require(0.0 < self.rope_theta < math.inf, f"rope_theta {self.rope_theta} must be a positive number")
        require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even (rotary positions)")
        require(
            self.max_position_embeddings * self.head_dim <= LARGEST_ROTARY_TABLE,
            f"max_position_embeddings {self.max_position_embeddings} with head_dim {self.head_dim}: the rotary table "
            f"would have more than {LARGEST_ROTARY_TABLE} angles",
        )

    @property
    def steady_limit(self) -> int | None:
        """Longest sequence whose rotary angles do not depend on its length; None where no length changes them."""
        dynamic = self.rope_scaling is not None and self.rope_scaling.type == "dynamic"
        return self.max_position_embeddings if dynamic else None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def resolve_context(decoder: DecoderConfig, context: int | None) -> int:
    """Positions of a conversation: the model's own unless fewer, or more of a stretched model, are asked for.

    Raises:
        ConfigError: the context is not positive or longer than the model's.
    """
    limit = decoder.max_position_embeddings
    if context is None:
        return limit
    require(context > 0, f"context must be positive, got {context}")
    require(
        context <= limit or decoder.rope_scaling is not None,
        f"context {context} exceeds the {limit} positions this model was trained for, and it has no rope scaling; use "
        f"{limit} or less",
    )
    return context


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """Preprocessing of an image into the vision tower's input.

    Attributes:
        mode: one of :data:`owl2.runtime.preprocess.MODES`.
        size: length of the shorter edge after the CLIP resize, pixels.
        crop_size: side of the centre crop, pixels; equals the vision tower's image size.
        mean, std: per channel, on the 0..1 scale, RGB.
    """

    mode: str = "resize"
    size: int = 448
    crop_size: int = 448
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        require_positive(self, "preprocess")
        require(all(value > 0 for value in self.std), f"preprocess std must be positive, got {list(self.std)}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The whole model."""

    vision: VisionConfig
    abstractor: AbstractorConfig
    decoder: DecoderConfig
    preprocess: PreprocessConfig

    def __post_init__(self) -> None:
        require(
            self.vision.hidden_size == self.abstractor.hidden_size,
            f"abstractor hidden_size {self.abstractor.hidden_size} must equal vision hidden_size "
            f"{self.vision.hidden_size}",
        )
        require(
            self.vision.use_cls_token == self.abstractor.use_cls_token,
            "use_cls_token must agree between visual_model and visual_abstractor",
        )
        require(
            self.abstractor.grid_size == self.vision.grid,
            f"abstractor grid_size {self.abstractor.grid_size} must equal the vision tower's "
            f"{self.vision.grid} (image_size / patch_size)",
        )
        require(
            self.preprocess.crop_size == self.vision.image_size,
            f"preprocessor crop_size {self.preprocess.crop_size} must equal vision image_size {self.vision.image_size}",
        )

    @property
    def rows_per_image(self) -> int:
        """Decoder positions one image takes: the queries and the end-of-image row."""
        return self.abstractor.num_learnable_queries + 1

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read what :meth:`to_json` wrote; unknown or missing keys are refused by name."""
        return from_json(cls, data, "model")


def from_json(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from parsed JSON, refusing unknown and missing keys by name.

    Raises:
        ConfigError: ``data`` is not an object, or its keys are not exactly the fields of ``cls``.
    """
    require(isinstance(data, Mapping), f"{where}: expected an object, got {type(data).__name__}")
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    unknown, missing = sorted(set(data) - names), sorted(names - set(data))
    require(not unknown, f"{where}: unknown keys {listed(unknown)}; known: {', '.join(sorted(names))}")
    require(not missing, f"{where}: missing keys {', '.join(missing)}")
    hints = get_type_hints(cls)
    return cls(**{name: _from_json_value(hints[name], data[name], f"{where}.{name}") for name in data})


def _from_json_value(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401 - any JSON value
    origin, choices = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        hint = next(choice for choice in choices if choice is not type(None))
    if hasattr(hint, "__dataclass_fields__"):
        return from_json(hint, value, where)
    if origin is Literal:
        known = ", ".join(map(str, choices))
        require(value in choices, f"{where}: expected one of {known}, got {shorten(value)}")
    if origin is Mapping:
        require(isinstance(value, Mapping), f"{where}: expected an object, got {shorten(value)}")
        require(len(value) <= MOST_ENTRIES, f"{where}: {len(value)} entries are more than {MOST_ENTRIES}")
        return {name: _from_json_value(choices[1], entry, f"{where}.{listed([name])}") for name, entry in value.items()}
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {shorten(value)}")
        if choices[1:] == (...,):
            choices = choices[:1] * len(value)
        require(len(value) == len(choices), f"{where}: expected a list of {len(choices)}, got {shorten(value)}")
        return tuple(_from_json_value(choice, entry, where) for choice, entry in zip(choices, value))
    if isinstance(value, int):
        require(abs(value) <= LARGEST_INTEGER, f"{where}: {shorten(value)} is beyond {LARGEST_INTEGER}")
    if isinstance(value, str):
        require(len(value) <= LONGEST_TEXT, f"{where}: a text of {len(value)} characters is too long")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(hint, type):
        right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
        require(right, f"{where}: expected {hint.__name__}, got {shorten(value)}")
        require(hint is not float or math.isfinite(value), f"{where}: expected a number, got {shorten(value)}")
    return value
