"""Translation of a checkpoint's foreign JSON files to :class:`owl2.runtime.config.ModelConfig`.

Keys that have the names of fields of these classes are read, and some more that are named here; what all others mean is
said in :mod:`owl2.export.checkpoint.keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from owl2.export.checkpoint import keys
from owl2.export.checkpoint.decoder_keys import decoder_object, end_ids, rope
from owl2.export.checkpoint.keys import check_keys
from owl2.runtime.config import AbstractorConfig, DecoderConfig, ModelConfig, PreprocessConfig, VisionConfig, require
from owl2.runtime.foreign import shorten

Json = Mapping[str, Any]
T = TypeVar("T")

# The default of the CLIP processor, which is not the model's.
CLIP_SIZE = 224


def model_config(config: Json, preprocessor: Json, generation: Json) -> ModelConfig:
    """Read config.json, preprocessor_config.json and generation_config.json (may be empty).

    Raises:
        ConfigError: a value that the official code cannot run, or that is not supported here.
    """
    model_type = config.get("model_type")
    require(
        model_type == "mplug_owl2",
        f"config.json: model_type is {shorten(model_type)}; only 'mplug_owl2' (mPLUG-Owl2, Q-Align, OneAlign, DeQA) "
        "can be exported",
    )
    visual = _section(config, "visual_config")
    vision = _section(visual, "visual_model")
    return ModelConfig(
        vision=_read(VisionConfig, vision, {"hidden_act": str(vision.get("hidden_act", VisionConfig().hidden_act))}),
        abstractor=_abstractor(_section(visual, "visual_abstractor")),
        decoder=_decoder(decoder_object(config), generation),
        preprocess=_preprocess(preprocessor, config.get("image_aspect_ratio")),
    )


def config_notes(config: Json, preprocessor: Json, generation: Json | None) -> list[str]:
    """What these files say that is not obeyed, a sentence each; ``generation`` is None without generation_config.json.

    Raises:
        ConfigError: a key would change results in a way that cannot be converted.
    """
    visual = _section(config, "visual_config")
    if generation is None:  # older checkpoints kept these settings among the model's
        generation = {key: value for key, value in config.items() if key in keys.GENERATION_KEYS}
    nested = [part for part in keys.NESTED if _section(config, part)]
    return [
        *check_keys("config.json", config, keys.CONFIG),
        *(note for part in nested for note in check_keys(f"config.json, {part}", config[part], keys.CONFIG)),
        *check_keys("config.json, visual_config", visual, keys.VISUAL),
        *check_keys("config.json, visual_model", _section(visual, "visual_model"), keys.VISION),
        *check_keys("config.json, visual_abstractor", _section(visual, "visual_abstractor"), keys.ABSTRACTOR),
        *check_keys("generation_config.json", generation, keys.GENERATION),
        *check_keys("preprocessor_config.json", preprocessor, keys.PREPROCESSOR),
    ]


def _section(parent: Json, key: str) -> Json:
    value = parent.get(key) or {}
    require(isinstance(value, Mapping), f"config.json: {key} must be an object, got {shorten(value)}")
    return value


def _read(cls: type[T], source: Json, given: Mapping[str, Any]) -> T:
    """``cls`` from the keys with the names of its fields, its own defaults where one is absent; ``given`` as it is."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    read = {name: _value(source, name, default) for name, default in defaults.items() if name not in given}
    return cls(**read, **given)


def _value(source: Json, key: str, default: bool | int | float) -> bool | int | float:
    value = source.get(key)
    if value is None:
        return default
    if isinstance(default, bool):
        require(isinstance(value, bool), f"config.json: {key} must be true or false, got {shorten(value)}")
        return bool(value)
    real = isinstance(default, float)
    right = isinstance(value, int | float if real else int) and not isinstance(value, bool) and value > 0
    require(right, f"config.json: {key} must be a positive {'number' if real else 'integer'}, got {shorten(value)}")
    return float(value) if real else int(value)


def _abstractor(source: Json) -> AbstractorConfig:
    # A grid of 0 stands for the default too.
    config = _read(AbstractorConfig, source if source.get("grid_size") else {**source, "grid_size": None}, {})
    encoder_hidden_size = _value(source, "encoder_hidden_size", config.hidden_size)
    require(
        encoder_hidden_size == config.hidden_size,
        f"config.json: visual_abstractor.encoder_hidden_size {encoder_hidden_size} must equal its hidden_size "
        f"{config.hidden_size}; the official code runs no other",
    )
    require(
        not source.get("add_v2t_pos_emb"),
        "config.json: visual_abstractor.add_v2t_pos_emb must be false; the official code crashes with it",
    )
    return config


def _decoder(source: Json, generation: Json) -> DecoderConfig:
    heads = _value(source, "num_attention_heads", DecoderConfig().num_attention_heads)
    key_value_heads = _value(source, "num_key_value_heads", heads)
    require(
        key_value_heads == heads,
        f"config.json: num_key_value_heads {key_value_heads} must equal num_attention_heads {heads}; the "
        "official two-way projections run no other",
    )
    hidden_act = source.get("hidden_act", "silu")
    require(hidden_act == "silu", f"config.json: hidden_act is {shorten(hidden_act)}; only 'silu' is supported")
    width = _value(source, "hidden_size", DecoderConfig().hidden_size) // heads
    head_dim = _value(source, "head_dim", width)
    require(head_dim == width, f"config.json: head_dim {head_dim} must be hidden_size / num_attention_heads, {width}")
    types = source.get("layer_types") or ["full_attention"]
    require(
        isinstance(types, list) and set(map(str, types)) == {"full_attention"},
        f"config.json: layer_types is {shorten(types)}; all layers of this family are full_attention",
    )
    theta, scaling = rope(source)
    given = {"rope_theta": theta, "rope_scaling": scaling, "eos_token_ids": end_ids(source, generation)}
    return _read(DecoderConfig, source, given)


def _preprocess(source: Json, image_aspect_ratio: str | None) -> PreprocessConfig:
    for key in ("do_resize", "do_center_crop", "do_normalize"):
        value = source.get(key, True)
        require(value is True, f"preprocessor_config.json: {key} is {shorten(value)}; the model expects true")
    for key, expected in (("resample", 3), ("rescale_factor", 1 / 255), ("do_rescale", True)):
        value = source.get(key, expected)
        require(value == expected, f"preprocessor_config.json: {key} is {shorten(value)}, expected {expected!r}")
    require(
        image_aspect_ratio is None or isinstance(image_aspect_ratio, str),
        f"config.json: image_aspect_ratio must be a string, got {shorten(image_aspect_ratio)}",
    )
    # Anything but "pad" goes straight to the CLIP processor in the official code; a config that says nothing
    # gets the square resize of the official quick start.
    modes: dict[str | None, str] = {"pad": "pad", None: "resize"}
    return PreprocessConfig(
        mode=modes.get(image_aspect_ratio, "crop"),
        size=_edge(source, "size", "shortest_edge"),
        crop_size=_edge(source, "crop_size", "height"),
        mean=_channels(source, "image_mean", PreprocessConfig().mean),
        std=_channels(source, "image_std", PreprocessConfig().std),
    )


def _edge(source: Json, key: str, name: str) -> int:
    given = source.get(key, CLIP_SIZE)
    value, others = given, set[str]()
    if isinstance(given, Mapping):
        square = given.get("height") == given.get("width")
        require(square, f"preprocessor_config.json: {key} must be square, got {shorten(given)}")
        value, others = given.get(name), {part for part in given if given[part] is not None} - {name, "width"}
    right = isinstance(value, int) and not isinstance(value, bool) and not others
    require(right, f"preprocessor_config.json: {key} must be an integer or hold {name!r}, got {shorten(given)}")
    return int(value)


def _channels(source: Json, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = source.get(key, default)
    right = (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(channel, int | float) and not isinstance(channel, bool) for channel in value)
    )
    require(right, f"preprocessor_config.json: {key} must be three numbers, got {shorten(value)}")
    red, green, blue = (float(channel) for channel in value)
    return red, green, blue
