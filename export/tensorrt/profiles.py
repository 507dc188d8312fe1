"""The shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from owl2.runtime import spec
from owl2.runtime.backends.steps import cache_names
from owl2.runtime.config import ModelConfig, require

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
"""Smallest, usual and largest shape of an input."""
Profile = Mapping[str, ShapeRange]
"""Shapes by name of the input."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step that an engine takes.

    Attributes:
        context: positions of a conversation.
        prefill: new positions of one step; longer prompts take several.
        images: encoded at a time.

    Raises:
        ConfigError: a value that is not positive, or a step longer than the context.
    """

    context: int
    prefill: int
    images: int

    def __post_init__(self) -> None:
        for name in ("context", "prefill", "images"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(
            self.prefill <= self.context,
            f"a step of {self.prefill} positions does not fit a context of {self.context}; give a smaller --prefill",
        )


def decoder_profiles(model: ModelConfig, limits: Limits) -> tuple[Profile, Profile]:
    """Shapes of prefill, with text and image rows, and of decode, which has one text row.

    The runtime gives at least one row of the K/V cache, masked where nothing is cached yet.
    """
    config, most = model.decoder, limits.prefill
    usual = min(most, 2 * model.rows_per_image)
    image = min(usual - 1, model.rows_per_image)
    usually_cached = min(limits.context, 512)

    def shapes(tokens: int, text: int, image: int, cached: int, logits: int = 1) -> dict[str, Shape]:
        """Inputs of the decoder for these numbers of rows."""
        angles = (tokens, config.head_dim // 2)
        return {
            spec.EMBEDS: (1, tokens, config.hidden_size),
            spec.MODALITY: (tokens,),
            spec.TEXT_ROWS: (text,),
            spec.IMAGE_ROW_INDEX: (image,),
            spec.ROW_ORDER: (tokens,),
            spec.LOGIT_ROWS: (logits,),
            spec.ATTENTION_MASK: (tokens, cached + tokens),
            spec.ROTARY_COS: angles,
            spec.ROTARY_SIN: angles,
            **{past: (cached, spec.kv_row_width(config)) for past, _ in cache_names(config)},
        }

    prefill = (
        shapes(1, 0, 0, 1),
        shapes(usual, usual - image, image, usually_cached),
        shapes(most, most, most, limits.context, logits=most),
    )
    decode = [shapes(1, 1, 0, cached) for cached in (1, usually_cached, limits.context)]
    return _ranges(*prefill), _ranges(*decode)


def _ranges(least: Mapping[str, Shape], usual: Mapping[str, Shape], most: Mapping[str, Shape]) -> Profile:
    return {name: (least[name], usual[name], most[name]) for name in least}


def vision_profile(model: ModelConfig, limits: Limits) -> Profile:
    """Shapes of the vision graph: images are square."""
    size = model.vision.image_size
    least, most = (1, 3, size, size), (limits.images, 3, size, size)
    return {spec.PIXELS: (least, least, most)}
