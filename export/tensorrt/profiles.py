"""The shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from owl2.runtime import spec
from owl2.runtime.config import ModelConfig, require

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
"""Least, usual and largest shape of an input."""
CountRange = tuple[int, int, int]
"""Least, usual and largest number of rows."""
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
    most = limits.prefill
    usual = min(most, 2 * model.rows_per_image)
    image = min(usual - 1, model.rows_per_image)
    cached = (1, min(limits.context, 512), limits.context)
    prefill = _inputs(model, tokens=(1, usual, most), cached=cached, image=(0, image, most), logits=(1, 1, most))
    decode = _inputs(model, tokens=(1, 1, 1), cached=cached, image=(0, 0, 0), logits=(1, 1, 1))
    return prefill, decode


def _inputs(
    model: ModelConfig, *, tokens: CountRange, cached: CountRange, image: CountRange, logits: CountRange
) -> Profile:
    """All inputs of the decoder for these numbers of rows."""
    config = model.decoder
    text = (0 if image[2] else 1, tokens[1] - image[1], tokens[2])

    def rows(counts: CountRange, *others: int) -> ShapeRange:
        least, usual, most = ((count, *others) for count in counts)
        return least, usual, most

    cache = rows(cached, spec.kv_row_width(config))
    table = rows(tokens, config.head_dim // 2)
    embeds = tuple((1, *shape) for shape in rows(tokens, config.hidden_size))
    mask = tuple((count, past + count) for count, past in zip(tokens, cached))
    return {
        spec.EMBEDS: (embeds[0], embeds[1], embeds[2]),
        spec.MODALITY: rows(tokens),
        spec.TEXT_ROWS: rows(text),
        spec.IMAGE_ROW_INDEX: rows(image),
        spec.ROW_ORDER: rows(tokens),
        spec.LOGIT_ROWS: rows(logits),
        spec.ATTENTION_MASK: (mask[0], mask[1], mask[2]),
        spec.ROTARY_COS: table,
        spec.ROTARY_SIN: table,
        **{name: cache for layer in range(config.num_hidden_layers) for name in spec.past_names(layer)},
    }


def vision_profile(model: ModelConfig, limits: Limits) -> Profile:
    """Shapes of the vision graph: images are square."""
    size = model.vision.image_size
    least, most = (1, 3, size, size), (limits.images, 3, size, size)
    return {spec.PIXELS: (least, least, most)}
