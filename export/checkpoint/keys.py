"""What every key of a checkpoint's JSON files means here: obeyed, bound to a value, or of no effect.

A key in none of the three sets is told to the user by name, so that nothing in these files is ignored in silence. The
sets were compared with what transformers 4.31, 4.44 and 5.24 write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from owl2.runtime.config import require
from owl2.runtime.families.mplug_owl2.tokenizer_files import FIXED_SETTINGS, SPECIAL_ROLES
from owl2.runtime.foreign import listed, shorten

Json = Mapping[str, Any]

NESTED = ("text_config", "llm_config", "language_config", "decoder_config")
"""Objects in config.json in which newer configurations keep the decoder's keys."""
OFF = (False, None)


@dataclass(frozen=True)
class Keys:
    """The keys of a file or of an object in it.

    Attributes:
        obeyed: read by the exporter, which refuses values that cannot be.
        fixed: would change results if they had another value than these; absent stands for the first.
        defaults: of the caller of ``generate``: told unless they have one of these values, since they are not part of a
            bundle.
        idle: never change what the model computes or how text and images are prepared.
    """

    obeyed: frozenset[str]
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    defaults: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()


def check_keys(name: str, content: Json, keys: Keys) -> list[str]:
    """Check the keys of a file or of an object in it.

    Returns:
        What the user should know, a sentence each.

    Raises:
        ConfigError: a key has a value that would change results, and that nothing here can follow.
    """
    for key, allowed in keys.fixed.items():
        value = content.get(key)
        require(
            value is None or any(_same(value, other) for other in allowed),
            f"{name}: {key} is {shorten(value)}, but only {shorten(allowed[0])} can be converted; if the model works "
            "without it, remove the key",
        )
    asked = {key: content.get(key) for key in sorted(keys.defaults)}
    unlike = {key: value for key, value in asked.items() if not any(_same(value, v) for v in keys.defaults[key])}
    notes = []
    if unlike:
        values = listed(f"{key} {shorten(value)}" for key, value in unlike.items())
        notes.append(f"{name} asks for {values}; a bundle holds no such defaults, give them with each question")
    unknown = sorted(set(content) - keys.obeyed - set(keys.fixed) - set(keys.defaults) - keys.idle)
    if unknown:
        notes.append(f"{name} has keys that mean nothing here and are ignored: {listed(unknown)}")
    return notes


def _same(value: object, other: object) -> bool:
    """Equal, and not only as 1 equals True."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Searches and processors that choose other tokens, and that the runtime does not have.
_SEARCH: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(
        _words(
            "bad_words_ids begin_suppress_tokens constraints dola_layers encoder_no_repeat_ngram_size "
            "exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids "
            "forced_eos_token_id no_repeat_ngram_size penalty_alpha sequence_bias suppress_tokens token_healing "
            "watermarking_config min_length min_new_tokens diversity_penalty"
        ),
        (None, False, 0, 0.0, [], {}),
    ),
    **dict.fromkeys(_words("num_beams num_beam_groups encoder_repetition_penalty guidance_scale"), (None, 1)),
}
# Arguments of a generation, which the runtime has too.
_DEFAULTS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(_words("do_sample stop_strings max_new_tokens"), (None, False, [])),
    **dict.fromkeys(_words("temperature top_p typical_p repetition_penalty"), (None, 1)),
    **dict.fromkeys(_words("min_p epsilon_cutoff eta_cutoff top_h"), (None, 0)),
    "top_k": (None, 50),
    "max_length": (None, 20),
}
# Bookkeeping of a generation: what it returns, how it caches, how it is speeded up.
_GENERATION_IDLE = _words(
    "_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
    "assistant_lookbehind bos_token_id cache_config cache_implementation compile_config continuous_batching_config "
    "decoder_start_token_id disable_compile early_stopping generation_kwargs is_assistant length_penalty low_memory "
    "max_cache_len max_matching_ngram_size max_time num_assistant_tokens num_assistant_tokens_schedule "
    "num_return_sequences output_attentions output_hidden_states output_logits output_scores pad_token_id "
    "prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate "
    "return_legacy_cache speculation_type target_lookbehind transformers_version use_cache use_model_defaults use_mtp"
)
GENERATION = Keys(_words("eos_token_id"), _SEARCH, _DEFAULTS, _GENERATION_IDLE)

# What transformers gives every configuration, nested ones too; dropout acts in training only.
_BOOKKEEPING = _words(
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout "
    "attention_probs_dropout_prob auto_map chunk_size_feed_forward cross_attention_hidden_size dropout dtype "
    "experts_implementation finetuning_task hidden_dropout_prob id2label initializer_factor initializer_range "
    "is_decoder is_encoder_decoder label2id model_type output_attentions output_hidden_states pad_token_id prefix "
    "problem_type projection_dim return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder "
    "tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache use_flash_attn"
)
_PLAIN: dict[str, tuple[object, ...]] = {"add_cross_attention": OFF, "pruned_heads": (None, {})}
GENERATION_KEYS = GENERATION.obeyed | set(_SEARCH) | set(_DEFAULTS) | _GENERATION_IDLE

CONFIG = Keys(
    obeyed=_words(
        "model_type visual_config vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps rope_theta rope_scaling "
        "rope_parameters attention_bias layer_types tie_word_embeddings bos_token_id eos_token_id image_aspect_ratio "
        "quantization_config"
    )
    | set(NESTED),
    fixed={
        **_PLAIN,
        "mlp_bias": OFF,
        "qkv_bias": OFF,
        "use_qk_norm": OFF,
        "sliding_window": OFF,
        "use_sliding_window": OFF,
        "partial_rotary_factor": (1,),
        "attention_multiplier": (1,),
        "embedding_multiplier": (1,),
        "residual_multiplier": (1,),
        "logits_scaling": (1,),
        "final_logit_softcapping": OFF,
        "attn_logit_softcapping": OFF,
        "scale_embedding": OFF,
        "vision_config": (None, {}),
        "multiway": (True,),
    },
    # With pretraining_tp the same products are computed in parts. The others serve training and the web demo.
    idle=_BOOKKEEPING
    | GENERATION_KEYS
    | _words(
        "pretraining_tp image_grid_pinpoints tune_visual_abstractor freeze_vision_model max_sequence_length "
        "visual_abstractor_lr tokenizer_model_max_length tokenizer_padding_side use_mm_proj"
    ),
)
VISUAL = Keys(_words("visual_model visual_abstractor"), idle=_BOOKKEEPING)
VISION = Keys(
    _words(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act "
        "layer_norm_eps use_cls_token use_post_layernorm"
    ),
    {**_PLAIN, "num_channels": (3,), "qkv_bias": (True,)},
    idle=_BOOKKEEPING | GENERATION_KEYS | _words("tie_word_embeddings"),
)
ABSTRACTOR = Keys(
    _words(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_learnable_queries grid_size "
        "layer_norm_eps use_cls_token encoder_hidden_size add_v2t_pos_emb"
    ),
    _PLAIN,
    idle=_BOOKKEEPING | GENERATION_KEYS | _words("tie_word_embeddings"),
)

# Every caller of the original converts images to RGB, and so does the runtime.
PREPROCESSOR = Keys(
    _words(
        "size crop_size image_mean image_std do_resize do_center_crop do_normalize resample rescale_factor do_rescale"
    ),
    {
        "do_pad": OFF,
        "pad_size": (None,),
        "offset": OFF,
        "rescale_offset": OFF,
        "use_square_size": OFF,
        "default_to_square": OFF,
        "do_flip_channel_order": OFF,
        "do_grayscale": OFF,
        "image_processor_type": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
        "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
    },
    idle=_words(
        "do_convert_rgb processor_class data_format input_data_format device return_tensors disable_grouping "
        "image_seq_length transformers_version _valid_processor_keys _processor_class"
    ),
)

TOKENIZER = Keys(
    frozenset(SPECIAL_ROLES) | _words("legacy added_tokens_decoder additional_special_tokens extra_special_tokens"),
    {
        **FIXED_SETTINGS,
        "add_prefix_space": (True,),
        "clean_up_tokenization_spaces": OFF,
        "split_special_tokens": OFF,
        "do_lower_case": OFF,
        "sp_model_kwargs": ({}, {"enable_sampling": False}),
        "auto_map": (None, {}),
        "tokenizer_class": ("LlamaTokenizer", "LlamaTokenizerFast"),
    },
    # Settings of the fast tokenizer, of truncating and of filling up, which the original never does with one prompt.
    # The conversation template is the family's own. The slow tokenizer puts spaces between added tokens in any case.
    idle=_words(
        "backend chat_template from_slow is_local local_files_only max_length model_input_names model_max_length "
        "name_or_path pad_to_multiple_of pad_token_type_id padding padding_side processor_class return_token_type_ids "
        "spaces_between_special_tokens special_tokens_map_file stride tokenizer_file trust_remote_code truncation "
        "truncation_side truncation_strategy transformers_version use_default_system_prompt use_fast"
    ),
)
SPECIAL_MAP = Keys(frozenset(SPECIAL_ROLES) | _words("additional_special_tokens"), FIXED_SETTINGS)
