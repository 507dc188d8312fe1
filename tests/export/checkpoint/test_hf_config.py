"""A checkpoint's JSON files become one configuration; what cannot be is refused with the key and its value."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from owl2.export.checkpoint.hf_config import model_config
from owl2.runtime.config import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    PreprocessConfig,
    RopeScaling,
    VisionConfig,
)
from owl2.runtime.errors import ConfigError

VISION = "visual_config.visual_model"
ABSTRACTOR = "visual_config.visual_abstractor"
Json = dict[str, Any]
AT_448: Json = {"size": 448, "crop_size": 448}


@pytest.fixture
def files(golden: Path) -> list[Json]:
    """config.json, preprocessor_config.json and generation_config.json of a recorded checkpoint."""
    folder = golden / "a1_base_bin" / "model"
    names = ("config", "preprocessor_config", "generation_config")
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def changed(config: Json, path: str, value: object) -> Json:
    """``config`` with the key at a dotted path replaced."""
    key, _, rest = path.partition(".")
    return config | {key: changed(config[key], rest, value) if rest else value}


def test_every_key_that_is_read() -> None:
    config = {
        "model_type": "mplug_owl2",
        "visual_config": {
            "visual_model": {
                "hidden_size": 24,
                "intermediate_size": 50,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "image_size": 36,
                "patch_size": 12,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-3,
                "use_cls_token": False,
                "use_post_layernorm": False,
            },
            "visual_abstractor": {
                "hidden_size": 24,
                "encoder_hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 33,
                "num_learnable_queries": 7,
                "grid_size": 3,
                "layer_norm_eps": 1e-4,
                "use_cls_token": False,
                "add_v2t_pos_emb": False,
            },
        },
        "vocab_size": 99,
        "hidden_size": 40,
        "intermediate_size": 70,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 77,
        "rms_norm_eps": 1e-2,
        "rope_theta": 500,
        "rope_scaling": {"type": "dynamic", "factor": 3},
        "attention_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 5,
        "eos_token_id": 6,
        "image_aspect_ratio": "pad",
    }
    preprocessor = {"size": 40, "crop_size": 36, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    assert model_config(config, preprocessor, {"eos_token_id": 8}) == ModelConfig(
        vision=VisionConfig(
            hidden_size=24,
            intermediate_size=50,
            num_hidden_layers=3,
            num_attention_heads=6,
            image_size=36,
            patch_size=12,
            hidden_act="gelu",
            layer_norm_eps=1e-3,
            use_cls_token=False,
            use_post_layernorm=False,
        ),
        abstractor=AbstractorConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=33,
            num_learnable_queries=7,
            grid_size=3,
            layer_norm_eps=1e-4,
            use_cls_token=False,
        ),
        decoder=DecoderConfig(
            vocab_size=99,
            hidden_size=40,
            intermediate_size=70,
            num_hidden_layers=5,
            num_attention_heads=2,
            max_position_embeddings=77,
            rms_norm_eps=1e-2,
            rope_theta=500.0,
            rope_scaling=RopeScaling("dynamic", 3.0),
            attention_bias=True,
            tie_word_embeddings=True,
            bos_token_id=5,
            eos_token_ids=(8,),
        ),
        preprocess=PreprocessConfig("pad", 40, 36, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
    )


@pytest.mark.parametrize("visual", [{}, {"visual_config": None}, {"visual_config": {"visual_model": {}}}])
def test_absent_keys_take_the_official_codes_defaults(visual: Json) -> None:
    config = model_config({"model_type": "mplug_owl2"} | visual, AT_448, {})
    vision, abstractor, decoder = config.vision, config.abstractor, config.decoder
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 448, 14)
    assert (vision.hidden_act, vision.layer_norm_eps) == ("quick_gelu", 1e-6)
    assert vision.use_cls_token
    assert vision.use_post_layernorm
    assert (abstractor.hidden_size, abstractor.num_hidden_layers, abstractor.num_attention_heads) == (1024, 6, 16)
    assert (abstractor.intermediate_size, abstractor.num_learnable_queries) == (2816, 64)
    assert (abstractor.grid_size, abstractor.layer_norm_eps, abstractor.use_cls_token) == (32, 1e-6, True)
    assert (decoder.vocab_size, decoder.hidden_size, decoder.intermediate_size) == (32000, 4096, 11008)
    assert (decoder.num_hidden_layers, decoder.num_attention_heads) == (32, 32)
    assert (decoder.max_position_embeddings, decoder.rms_norm_eps, decoder.rope_theta) == (2048, 1e-6, 10000.0)
    assert decoder.rope_scaling is None
    assert not decoder.attention_bias
    assert not decoder.tie_word_embeddings
    assert (decoder.bos_token_id, decoder.eos_token_ids) == (1, (2,))
    assert config.preprocess == PreprocessConfig(
        "resize", 448, 448, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )


def test_foreign_keys_are_ignored(files: list[Json]) -> None:
    config, preprocessor, generation = files
    known = {"visual_model", "visual_abstractor"}
    assert {"top_k", "is_decoder", "id2label"} < set(config["visual_config"]["visual_model"])
    expected = model_config(*files)
    config = config | {"top_k": "many", "quantization_config": 4, "freeze_vision_model": None, "max_sequence_length": 9}
    for part in known:
        config = changed(config, f"visual_config.{part}.is_decoder", "perhaps")
        config = changed(config, f"visual_config.{part}.tie_word_embeddings", 3)
    assert model_config(config, preprocessor | {"new": [1]}, generation | {"temperature": "hot"}) == expected


def test_integers_are_accepted_for_numbers(files: list[Json]) -> None:
    config, preprocessor, generation = files
    config |= {"rope_theta": 1000000, "rope_scaling": {"rope_type": "linear", "factor": 2}}
    decoder = model_config(config, preprocessor, generation).decoder
    assert (decoder.rope_theta, decoder.rope_scaling) == (1e6, RopeScaling("linear", 2.0))
    assert decoder.rope_scaling is not None
    assert type(decoder.rope_theta) is type(decoder.rope_scaling.factor) is float


@pytest.mark.parametrize("grid_size", [None, 0])
def test_a_grid_size_of_nothing_means_32(files: list[Json], grid_size: int | None) -> None:
    config, _, generation = files
    config = changed(changed(config, f"{ABSTRACTOR}.grid_size", grid_size), f"{VISION}.image_size", 448)
    assert model_config(config, AT_448, generation).abstractor.grid_size == 32


def test_eos_comes_from_the_generation_config_first(files: list[Json]) -> None:
    config, preprocessor, _ = files
    config |= {"eos_token_id": 6}
    assert model_config(config, preprocessor, {"eos_token_id": 0}).decoder.eos_token_ids == (0,)
    assert model_config(config, preprocessor, {}).decoder.eos_token_ids == (6,)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "resize"),
        ({"image_aspect_ratio": None}, "resize"),
        ({"image_aspect_ratio": "pad"}, "pad"),
        ({"image_aspect_ratio": "square"}, "crop"),
        ({"image_aspect_ratio": "anyres"}, "crop"),
        ({"image_aspect_ratio": ""}, "crop"),
    ],
)
def test_image_aspect_ratio_chooses_the_mode(files: list[Json], changes: Json, mode: str) -> None:
    config, preprocessor, generation = files
    assert model_config(config | changes, preprocessor, generation).preprocess.mode == mode


@pytest.mark.parametrize("size", [64, {"shortest_edge": 64}])
@pytest.mark.parametrize("crop_size", [56, {"height": 56, "width": 56}])
def test_sizes_are_numbers_or_objects(files: list[Json], size: object, crop_size: object) -> None:
    config, preprocessor, generation = files
    preprocess = model_config(config, preprocessor | {"size": size, "crop_size": crop_size}, generation).preprocess
    assert (preprocess.size, preprocess.crop_size) == (64, 56)


def test_the_recorded_checkpoints_differ_where_they_should(files: list[Json], golden: Path) -> None:
    folder = golden / "a2_fp16_safetensors" / "model"
    names = ("config", "preprocessor_config", "generation_config")
    other = model_config(*(json.loads((folder / f"{name}.json").read_text()) for name in names))
    config = model_config(*files)
    assert (config.preprocess.mode, other.preprocess.mode) == ("resize", "pad")
    assert (config.decoder.rms_norm_eps, other.decoder.rms_norm_eps) == (1e-5, 1e-6)
    assert (config.rows_per_image, other.rows_per_image) == (7, 5)
    assert (config.vision.grid, other.vision.grid) == (4, 5)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "mplug_owl2_1", r"^config.json: model_type is 'mplug_owl2_1'; only 'mplug_owl2' \(.*\) can be"),
        ("model_type", None, "model_type is None; only 'mplug_owl2'"),
        ("num_key_value_heads", 2, "num_key_value_heads 2 must equal num_attention_heads 4; the official two-way"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'; only 'silu' is supported"),
        ("hidden_size", 66, "^hidden_size 66 is not a multiple of num_attention_heads 4$"),
        ("hidden_size", 20, r"^head_dim 5 must be even \(rotary positions\)$"),
        (f"{ABSTRACTOR}.add_v2t_pos_emb", True, "visual_abstractor.add_v2t_pos_emb must be false"),
        (f"{ABSTRACTOR}.encoder_hidden_size", 64, "encoder_hidden_size 64 must equal its hidden_size 48; the official"),
        (f"{ABSTRACTOR}.num_attention_heads", 5, "^abstractor hidden_size 48 is not a multiple of its 5 heads$"),
        (f"{ABSTRACTOR}.grid_size", 5, "abstractor grid_size 5 must equal the vision tower's 4"),
        (f"{ABSTRACTOR}.use_cls_token", False, "use_cls_token must agree between visual_model and visual_abstractor"),
        (f"{VISION}.num_attention_heads", 5, "^vision hidden_size 48 is not a multiple of its 5 heads$"),
        (f"{VISION}.hidden_size", 64, "abstractor hidden_size 48 must equal vision hidden_size 64"),
        (f"{VISION}.image_size", 57, "vision image_size 57 is not a multiple of patch_size 14"),
        (f"{VISION}.image_size", 70, "abstractor grid_size 4 must equal the vision tower's 5"),
        (f"{VISION}.hidden_act", "relu", "vision hidden_act 'relu' is not supported; known: quick_gelu, gelu"),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 2.0},
            "rope_scaling has type 'yarn'; default, linear and dynamic can be",
        ),
        ("rope_scaling", {"factor": 2.0}, "rope_scaling has type None; default, linear and dynamic can be"),
        ("rope_scaling", {"type": "linear", "factor": 1.0}, "rope_scaling factor 1.0 must be greater than 1"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling of type linear needs a factor, a number, got None"),
        ("rope_scaling", "linear", "rope_scaling must be .*, got 'linear'"),
    ],
)
def test_models_that_cannot_be_are_refused(files: list[Json], path: str, value: object, message: str) -> None:
    config, preprocessor, generation = files
    with pytest.raises(ConfigError, match=message):
        model_config(changed(config, path, value), preprocessor, generation)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hidden_size", "64", "hidden_size must be a positive integer, got '64'"),
        ("vocab_size", 800.0, "vocab_size must be a positive integer, got 800.0"),
        ("num_hidden_layers", 0, "num_hidden_layers must be a positive integer, got 0"),
        ("max_position_embeddings", True, "max_position_embeddings must be a positive integer, got True"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps must be a positive number, got '1e-5'"),
        ("rope_theta", -1, "rope_theta must be a positive number, got -1"),
        ("attention_bias", 1, "attention_bias must be true or false, got 1"),
        ("image_aspect_ratio", ["pad"], r"image_aspect_ratio must be a string, got \['pad'\]"),
        ("image_aspect_ratio", True, "image_aspect_ratio must be a string, got True"),
        ("visual_config", "big", "visual_config must be an object, got 'big'"),
        (VISION, [1], r"visual_model must be an object, got \[1\]"),
        (f"{VISION}.patch_size", [14, 14], r"patch_size must be a positive integer, got \[14, 14\]"),
        (f"{VISION}.layer_norm_eps", False, "layer_norm_eps must be a positive number, got False"),
        (f"{VISION}.use_post_layernorm", "yes", "use_post_layernorm must be true or false, got 'yes'"),
        (f"{ABSTRACTOR}.grid_size", 4.0, "grid_size must be a positive integer, got 4.0"),
    ],
)
def test_values_of_a_wrong_type_are_refused(files: list[Json], path: str, value: object, message: str) -> None:
    config, preprocessor, generation = files
    with pytest.raises(ConfigError, match=f"^config.json: {message}$"):
        model_config(changed(config, path, value), preprocessor, generation)


def test_every_listed_id_ends_an_answer(files: list[Json]) -> None:
    config, preprocessor, _ = files
    assert model_config(config, preprocessor, {"eos_token_id": [2, 7, 2, 5]}).decoder.eos_token_ids == (2, 7, 5)
    assert model_config(config | {"eos_token_id": [3, 4]}, preprocessor, {}).decoder.eos_token_ids == (3, 4)


@pytest.mark.parametrize("eos", [None, "2", [], [2, "3"], True, -1, {"id": 2}])
def test_eos_must_be_ids(files: list[Json], eos: object) -> None:
    config, preprocessor, _ = files
    message = f"^generation_config.json: eos_token_id must be an id or a list of ids, got {re.escape(repr(eos))}$"
    with pytest.raises(ConfigError, match=message):
        model_config(config, preprocessor, {"eos_token_id": eos})


def test_eos_of_a_generation_config_made_from_the_models(files: list[Json]) -> None:
    """transformers 4.31 reads config.json again then, later versions do not."""
    config, preprocessor, generation = files
    assert generation["_from_model_config"]
    with pytest.raises(ConfigError, match=r"eos_token_id is \[2, 5\], but 2 in config.json, from which the file was"):
        model_config(config, preprocessor, generation | {"eos_token_id": [2, 5]})
    decoder = model_config(
        config | {"eos_token_id": [5, 2]}, preprocessor, generation | {"eos_token_id": [2, 5]}
    ).decoder
    assert decoder.eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "^preprocessor_config.json: do_resize is False; the model expects true$"),
        ({"do_center_crop": False}, "do_center_crop is False; the model expects true"),
        ({"do_normalize": None}, "do_normalize is None; the model expects true"),
        ({"do_rescale": False}, "do_rescale is False, expected True"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078.*, expected 0.0039"),
        ({"resample": 2}, "resample is 2, expected 3"),
        ({"size": "56"}, "size must be an integer or hold 'shortest_edge', got '56'"),
        ({"size": {"height": 56, "width": 56}}, "size must be an integer or hold 'shortest_edge', got {'height'"),
        ({"size": True}, "size must be an integer or hold 'shortest_edge', got True"),
        ({"size": 0}, "preprocess size must be positive, got 0"),
        ({"crop_size": {"height": 56, "width": 70}}, "crop_size must be square, got {'height': 56, 'width': 70}"),
        ({"crop_size": {"shortest_edge": 56}}, "crop_size must be an integer or hold 'height', got {'shortest_edge'"),
        ({"crop_size": 70}, "preprocessor crop_size 70 must equal vision image_size 56"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean must be three numbers, got \[0.5, 0.5\]"),
        ({"image_std": 0.5}, "image_std must be three numbers, got 0.5"),
        ({"image_std": ["a", "b", "c"]}, r"image_std must be three numbers, got \['a', 'b', 'c'\]"),
        ({"image_mean": [None, 1, 1]}, r"image_mean must be three numbers, got \[None, 1, 1\]"),
    ],
)
def test_other_preprocessing_is_refused(files: list[Json], changes: Json, message: str) -> None:
    config, preprocessor, generation = files
    with pytest.raises(ConfigError, match=message):
        model_config(config, preprocessor | changes, generation)


def test_a_missing_size_is_clips_own(files: list[Json]) -> None:
    config, _, generation = files
    with pytest.raises(ConfigError, match="preprocessor crop_size 224 must equal vision image_size 56"):
        model_config(config, {}, generation)
