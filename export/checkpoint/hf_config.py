"""Translation of a checkpoint's foreign JSON files to :class:`owl2.runtime.config.ModelConfig`.

The files hold many keys that mean nothing here (generation defaults of transformers, for instance): each
function lists the keys it reads and ignores the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from owl2.runtime.config import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    PreprocessConfig,
    RopeScaling,
    VisionConfig,
    require,
)

Json = Mapping[str, Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def model_config(config: Json, preprocessor: Json, generation: Json) -> ModelConfig:
    """Read config.json, preprocessor_config.json and generation_config.json (may be empty).

    Raises:
        ConfigError: a key has a value that the official code cannot run or that is not supported here.
    """
    model_type = config.get("model_type")
    require(
        model_type == "mplug_owl2",
        f"config.json: model_type is {model_type!r}; only 'mplug_owl2' (mPLUG-Owl2, Q-Align, OneAlign, DeQA) "
        "can be exported",
    )
    visual = _section(config, "visual_config")
    return ModelConfig(
        vision=_vision(_section(visual, "visual_model")),
        abstractor=_abstractor(_section(visual, "visual_abstractor")),
        decoder=_decoder(config, generation),
        preprocess=_preprocess(preprocessor, config.get("image_aspect_ratio")),
    )


def _section(parent: Json, key: str) -> Json:
    value = parent.get(key) or {}
    require(isinstance(value, Mapping), f"config.json: {key} must be an object, got {value!r}")
    return value


def _integer(source: Json, key: str, default: int) -> int:
    value = source.get(key)
    if value is None:
        return default
    right = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(right, f"config.json: {key} must be a positive integer, got {value!r}")
    return int(value)


def _number(source: Json, key: str, default: float) -> float:
    value = source.get(key)
    if value is None:
        return default
    right = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    require(right, f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def _flag(source: Json, key: str, default: bool) -> bool:
    value = source.get(key)
    if value is None:
        return default
    require(isinstance(value, bool), f"config.json: {key} must be true or false, got {value!r}")
    return bool(value)


def _vision(source: Json) -> VisionConfig:
    return VisionConfig(
        hidden_size=_integer(source, "hidden_size", 1024),
        intermediate_size=_integer(source, "intermediate_size", 4096),
        num_hidden_layers=_integer(source, "num_hidden_layers", 24),
        num_attention_heads=_integer(source, "num_attention_heads", 16),
        image_size=_integer(source, "image_size", 448),
        patch_size=_integer(source, "patch_size", 14),
        hidden_act=str(source.get("hidden_act", "quick_gelu")),
        layer_norm_eps=_number(source, "layer_norm_eps", 1e-6),
        use_cls_token=_flag(source, "use_cls_token", True),
        use_post_layernorm=_flag(source, "use_post_layernorm", True),
    )


def _abstractor(source: Json) -> AbstractorConfig:
    hidden_size = _integer(source, "hidden_size", 1024)
    encoder_hidden_size = _integer(source, "encoder_hidden_size", hidden_size)
    require(
        encoder_hidden_size == hidden_size,
        f"config.json: visual_abstractor.encoder_hidden_size {encoder_hidden_size} must equal its hidden_size "
        f"{hidden_size}; the official code runs no other",
    )
    require(
        not source.get("add_v2t_pos_emb"),
        "config.json: visual_abstractor.add_v2t_pos_emb must be false; the official code crashes with it",
    )
    return AbstractorConfig(
        hidden_size=hidden_size,
        num_hidden_layers=_integer(source, "num_hidden_layers", 6),
        num_attention_heads=_integer(source, "num_attention_heads", 16),
        intermediate_size=_integer(source, "intermediate_size", 2816),
        num_learnable_queries=_integer(source, "num_learnable_queries", 64),
        grid_size=_integer(source, "grid_size", 32) if source.get("grid_size") else 32,
        layer_norm_eps=_number(source, "layer_norm_eps", 1e-6),
        use_cls_token=_flag(source, "use_cls_token", True),
    )


def _decoder(source: Json, generation: Json) -> DecoderConfig:
    heads = _integer(source, "num_attention_heads", 32)
    key_value_heads = _integer(source, "num_key_value_heads", heads)
    require(
        key_value_heads == heads,
        f"config.json: num_key_value_heads {key_value_heads} must equal num_attention_heads {heads}; the "
        "official two-way projections run no other",
    )
    hidden_act = source.get("hidden_act", "silu")
    require(hidden_act == "silu", f"config.json: hidden_act is {hidden_act!r}; only 'silu' is supported")
    eos = generation.get("eos_token_id", source.get("eos_token_id", 2))
    right = isinstance(eos, int) and not isinstance(eos, bool) and eos >= 0
    require(right, f"generation_config.json: eos_token_id must be one integer, got {eos!r}")
    return DecoderConfig(
        vocab_size=_integer(source, "vocab_size", 32000),
        hidden_size=_integer(source, "hidden_size", 4096),
        intermediate_size=_integer(source, "intermediate_size", 11008),
        num_hidden_layers=_integer(source, "num_hidden_layers", 32),
        num_attention_heads=heads,
        max_position_embeddings=_integer(source, "max_position_embeddings", 2048),
        rms_norm_eps=_number(source, "rms_norm_eps", 1e-6),
        rope_theta=_number(source, "rope_theta", 10000.0),
        rope_scaling=_rope_scaling(source.get("rope_scaling")),
        attention_bias=_flag(source, "attention_bias", False),
        tie_word_embeddings=_flag(source, "tie_word_embeddings", False),
        bos_token_id=_integer(source, "bos_token_id", 1),
        eos_token_id=eos,
    )


def _rope_scaling(value: Any) -> RopeScaling | None:  # noqa: ANN401 - any JSON value
    if value is None:
        return None
    right = isinstance(value, Mapping) and isinstance(value.get("factor"), int | float)
    require(right, f'config.json: rope_scaling must be {{"type": …, "factor": …}}, got {value!r}')
    return RopeScaling(type=value.get("type", value.get("rope_type")), factor=float(value["factor"]))


def _preprocess(source: Json, image_aspect_ratio: str | None) -> PreprocessConfig:
    for key, default in (("do_resize", True), ("do_center_crop", True), ("do_normalize", True)):
        require(
            source.get(key, default) is True,
            f"preprocessor_config.json: {key} is {source.get(key)!r}; the model expects true",
        )
    for key, expected in (("resample", 3), ("rescale_factor", 1 / 255), ("do_rescale", True)):
        value = source.get(key, expected)
        require(value == expected, f"preprocessor_config.json: {key} is {value!r}, expected {expected!r}")
    require(
        image_aspect_ratio is None or isinstance(image_aspect_ratio, str),
        f"config.json: image_aspect_ratio must be a string, got {image_aspect_ratio!r}",
    )
    # Anything but "pad" goes straight to the CLIP processor in the official code; a config that says nothing
    # gets the square resize of the official quick start.
    modes: dict[str | None, str] = {"pad": "pad", None: "resize"}
    return PreprocessConfig(
        mode=modes.get(image_aspect_ratio, "crop"),
        size=_edge(source, "size", "shortest_edge"),
        crop_size=_edge(source, "crop_size", "height"),
        mean=_channels(source, "image_mean", CLIP_MEAN),
        std=_channels(source, "image_std", CLIP_STD),
    )


def _edge(source: Json, key: str, name: str) -> int:
    value = source.get(key, 224)
    if isinstance(value, Mapping):
        square = value.get("height") == value.get("width")
        require(square, f"preprocessor_config.json: {key} must be square, got {value!r}")
        value = value.get(name)
    right = isinstance(value, int) and not isinstance(value, bool)
    require(right, f"preprocessor_config.json: {key} must be an integer or hold {name!r}, got {source.get(key)!r}")
    return int(value)


def _channels(source: Json, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = source.get(key, default)
    right = (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(channel, int | float) and not isinstance(channel, bool) for channel in value)
    )
    require(right, f"preprocessor_config.json: {key} must be three numbers, got {value!r}")
    red, green, blue = (float(channel) for channel in value)
    return red, green, blue
