"""Writing the sample model as an official checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from encoder import Encoder
from safetensors.torch import save_file

from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.config import ModelConfig


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json with the keys that have a meaning."""
    decoder, vision, abstractor = config.decoder, config.vision, config.abstractor
    return {
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "model_type": "mplug_owl2",
        "attention_bias": decoder.attention_bias,
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": decoder.eos_token_ids[0],
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_position_embeddings,
        "num_attention_heads": decoder.num_attention_heads,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_key_value_heads": decoder.num_attention_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "torch_dtype": "float16",
        "use_cache": True,
        "visual_config": {
            "visual_abstractor": {
                "add_v2t_pos_emb": False,
                "encoder_hidden_size": vision.hidden_size,
                "grid_size": abstractor.grid_size,
                "hidden_size": abstractor.hidden_size,
                "intermediate_size": abstractor.intermediate_size,
                "layer_norm_eps": abstractor.layer_norm_eps,
                "model_type": "mplug_owl_visual_abstract",
                "num_attention_heads": abstractor.num_attention_heads,
                "num_hidden_layers": abstractor.num_hidden_layers,
                "num_learnable_queries": abstractor.num_learnable_queries,
                "use_cls_token": abstractor.use_cls_token,
            },
            "visual_model": {
                "hidden_act": vision.hidden_act,
                "hidden_size": vision.hidden_size,
                "image_size": vision.image_size,
                "intermediate_size": vision.intermediate_size,
                "layer_norm_eps": vision.layer_norm_eps,
                "model_type": "mplug_owl_vision_model",
                "num_attention_heads": vision.num_attention_heads,
                "num_hidden_layers": vision.num_hidden_layers,
                "patch_size": vision.patch_size,
                "use_cls_token": vision.use_cls_token,
                "use_post_layernorm": vision.use_post_layernorm,
            },
        },
        "vocab_size": decoder.vocab_size,
    }


def preprocessor_json(config: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json."""
    preprocess = config.preprocess
    return {
        "crop_size": preprocess.crop_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "do_convert_rgb": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "resample": 3,
        "size": preprocess.size,
    }


def _token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def special_tokens_json() -> dict[str, Any]:
    """special_tokens_map.json."""
    return {
        "bos_token": _token("<s>"),
        "eos_token": _token("</s>"),
        "pad_token": "<unk>",
        "unk_token": _token("<unk>"),
    }


def tokenizer_json(config: ModelConfig) -> dict[str, Any]:
    """tokenizer_config.json."""
    added = {name: {"__type": "AddedToken"} | _token(text) for name, text in SPECIAL.items()}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": config.decoder.max_position_embeddings,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    } | added


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def save_checkpoint(model: Owl2Model, encoder: Encoder, folder: Path) -> None:
    """Write ``model`` to ``folder``, its weights as float16 safetensors; every file is replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    files = {
        "config.json": config_json(config),
        "preprocessor_config.json": preprocessor_json(config),
        "special_tokens_map.json": special_tokens_json(),
        "tokenizer_config.json": tokenizer_json(config),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    }
    for name, content in files.items():
        (folder / f"{name}.new").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / f"{name}.new").replace(folder / name)
    (folder / "tokenizer.model.new").write_bytes(encoder.pieces.serialized_model_proto())
    (folder / "tokenizer.model.new").replace(folder / "tokenizer.model")
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.named_parameters()}
    save_file(weights, folder / "model.safetensors.new", metadata={"format": "pt"})
    (folder / "model.safetensors.new").replace(folder / "model.safetensors")
