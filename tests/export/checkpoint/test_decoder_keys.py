"""The decoder's keys in the forms in which transformers 4.31 to 5 write them."""

import re
from typing import Any

import pytest

from owl2.export.checkpoint.decoder_keys import decoder_object, end_ids, rope
from owl2.runtime.config import RopeScaling
from owl2.runtime.errors import ConfigError

Json = dict[str, Any]
LINEAR = RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (10000.0, None)),
        ({"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, (10000.0, LINEAR)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "rope_theta": 7}}, (7.0, LINEAR)),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, (1e6, None)),
        ({"rope_parameters": {"rope_theta": 1e6}}, (1e6, None)),
        ({"rope_parameters": {"rope_type": "default", "factor": 1.0}}, (10000.0, None)),
        (
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "type": "linear", "factor": 2.0}},
            (500.0, LINEAR),
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 9, "rope_type": "dynamic", "factor": 4}}},
            (9.0, RopeScaling("dynamic", 4.0)),
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_theta": 500,
                "rope_scaling": {"type": "dynamic", "factor": 4, "original_max_position_embeddings": 4096},
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 4.0,
                    "rope_theta": 500.0,
                    "partial_rotary_factor": 1.0,
                    "attention_factor": None,
                },
            },
            (500.0, RopeScaling("dynamic", 4.0)),
        ),
    ],
)
def test_rotary_positions(keys: Json, expected: tuple[float, RopeScaling | None]) -> None:
    assert rope(keys) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            "rope_theta and rope_parameters.rope_theta give different rope_theta",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters give different rotary positions",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "type": "dynamic", "factor": 2}},
            "rope_parameters has type 'dynamic' and rope_type 'linear'; keep the one",
        ),
        ({"rope_parameters": {"rope_type": "default", "factor": 2}}, "has type default and factor 2"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "has type 'llama3'; default, linear and dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "has type 'longrope'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"has type \['yarn'\]"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1.0}}, "rope_scaling factor 1.0 must be greater than 1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": True}}, "needs a factor, a number, got True"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters has 'partial_rotary_factor' 0.5, which cannot be converted",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 1024}},
            "has 'original_max_position_embeddings' 1024, which",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2, "attention_factor": 0.9}}, "has 'attention_factor' 0.9"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}}, "has 'beta_fast' 32, which cannot"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1}, "sliding_attention": {"rope_theta": 2}}},
            "is given for full_attention, sliding_attention; all layers of this family are full_attention",
        ),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_parameters.rope_theta must be a positive number"),
        ({"rope_parameters": [1]}, r"rope_parameters must be {\"rope_type\": …, …}, got \[1\]"),
    ],
)
def test_rotary_positions_that_cannot_be_are_refused(keys: Json, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope(keys)


def test_the_decoder_may_be_nested() -> None:
    nested = {"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 9.0}, "dtype": "float16"}
    keys = decoder_object({"model_type": "mplug_owl2", "dtype": "float32", "hidden_size": 64, "text_config": nested})
    assert (keys["hidden_size"], keys["model_type"], rope(keys)) == (64, "mplug_owl2", (9.0, None))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_theta": 1.0, "llm_config": {"rope_theta": 2.0}},
            "rope_theta is 1.0 at the top and 2.0 in llm_config; make them agree",
        ),
        ({"text_config": {"vocab_size": 5}, "decoder_config": {"vocab_size": 6}}, "vocab_size is 5 at the top and 6"),
        ({"text_config": "big"}, "text_config must be an object, got 'big'"),
    ],
)
def test_a_nested_decoder_must_not_contradict(config: Json, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        decoder_object(config)


@pytest.mark.parametrize("other", [[[2]], {"id": 2}, ["2"], []])
def test_end_tokens_of_both_files_are_ids(other: object) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: eos_token_id must be an id or a list of ids, got"):
        end_ids({"eos_token_id": other}, {"eos_token_id": 2, "_from_model_config": True})
