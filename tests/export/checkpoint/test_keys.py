"""Every key of a checkpoint's JSON files is obeyed, bound to a value, of no effect, or named to the user."""

import json
from pathlib import Path
from typing import Any

import pytest

from owl2.export.checkpoint import keys
from owl2.export.checkpoint.hf_config import config_notes
from owl2.export.checkpoint.keys import Keys, check_keys
from owl2.runtime.errors import ConfigError

Json = dict[str, Any]
EVERY = {name: value for name, value in vars(keys).items() if isinstance(value, Keys)}

# LlamaConfig().save_pretrained by transformers 5.24.
LLAMA_5: Json = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 2048, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": None, "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False, "transformers_version": "5.24.0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture
def files(golden: Path) -> list[Json]:
    """config.json, preprocessor_config.json and generation_config.json of a recorded checkpoint."""
    folder = golden / "a1_base_bin" / "model"
    names = ("config", "preprocessor_config", "generation_config")
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


@pytest.mark.parametrize("name", EVERY)
def test_a_key_has_one_meaning(name: str) -> None:
    parts = (EVERY[name].obeyed, set(EVERY[name].fixed), set(EVERY[name].defaults))
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.parametrize("case", ["a1_base_bin", "a2_fp16_safetensors"])
def test_files_of_the_original_give_no_notes(golden: Path, case: str) -> None:
    folder = golden / case / "model"
    names = ("config", "preprocessor_config", "generation_config")
    assert config_notes(*(json.loads((folder / f"{name}.json").read_text()) for name in names)) == []


def test_files_of_newer_versions_give_no_notes(files: list[Json]) -> None:
    assert check_keys("config.json", LLAMA_5, keys.CONFIG) == []
    processor = files[1] | {"image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first"}
    assert config_notes(files[0] | LLAMA_5, processor, {"eos_token_id": [2, 5], "transformers_version": "5"}) == []


def test_unknown_keys_are_named(files: list[Json]) -> None:
    config, preprocessor, generation = files
    notes = config_notes(config | {"moe": 4, "alibi": True}, preprocessor | {"\x1b[2J": 1}, generation)
    assert notes == [
        "config.json has keys that mean nothing here and are ignored: alibi, moe",
        r"preprocessor_config.json has keys that mean nothing here and are ignored: \x1b[2J",
    ]


def test_defaults_of_a_generation_are_told(files: list[Json]) -> None:
    config, preprocessor, generation = files
    told = generation | {"do_sample": True, "temperature": 0.6, "top_p": 1.0, "repetition_penalty": 1.1}
    assert config_notes(config, preprocessor, told) == [
        "generation_config.json asks for do_sample True, repetition_penalty 1.1, temperature 0.6; a bundle holds no "
        "such defaults, give them with each question"
    ]
    assert config_notes(config | {"temperature": 0.6}, preprocessor, generation) == []
    [note] = config_notes(config | {"temperature": 0.6}, preprocessor, None)
    assert "temperature 0.6" in note


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (0, {"mlp_bias": True}, "^config.json: mlp_bias is True, but only False can be converted; if the model works"),
        (0, {"sliding_window": 4096}, "sliding_window is 4096"),
        (0, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 1 can be converted"),
        (0, {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': "),
        (0, {"text_config": {"mlp_bias": True}}, "^config.json, text_config: mlp_bias is True"),
        (0, {"vision_config": {"hidden_size": 3}}, "vision_config is {'hidden_size': 3}"),
        (1, {"do_pad": True}, "^preprocessor_config.json: do_pad is True"),
        (1, {"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor'"),
        (1, {"offset": 1}, "offset is 1"),
        (2, {"forced_eos_token_id": 2}, "^generation_config.json: forced_eos_token_id is 2"),
        (2, {"bad_words_ids": [[5]]}, r"bad_words_ids is \[\[5\]\]"),
        (2, {"suppress_tokens": [7]}, "suppress_tokens"),
        (2, {"num_beams": 4}, "num_beams is 4"),
        (2, {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        (2, {"min_new_tokens": 8}, "min_new_tokens is 8"),
    ],
)
def test_values_that_would_change_results_are_refused(files: list[Json], file: int, change: Json, message: str) -> None:
    files[file] |= change
    with pytest.raises(ConfigError, match=message):
        config_notes(*files)
