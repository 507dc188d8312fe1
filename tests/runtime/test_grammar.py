"""Answers that follow a schema, an expression or a list."""

import json
import re
from typing import Any

import pytest

from owl2 import ConfigError, Owl2
from owl2.runtime.cancellation import Cancellation

LONG = 400

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"sharp": {"type": "boolean"}}, "required": ["sharp"],
     "additionalProperties": False},
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"],
     "additionalProperties": False},
    {"enum": ["bad", "poor", "fair", "good", "excellent"]},
    {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3},
    {"type": "string", "maxLength": 5},
    {"type": "string", "pattern": "^[a-c]{3}$"},
    {"anyOf": [{"const": None}, {"type": "boolean"}]},
]  # fmt: skip


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value follows one of the schemas above."""
    match schema:
        case {"properties": properties}:
            return set(value) == set(properties) and all(valid(value[name], properties[name]) for name in properties)
        case {"enum": values}:
            return value in values
        case {"const": one}:
            return bool(value == one)
        case {"anyOf": kinds}:
            return any(valid(value, kind) for kind in kinds)
        case {"type": "boolean"}:
            return isinstance(value, bool)
        case {"type": "integer", "minimum": least, "maximum": most}:
            return isinstance(value, int) and least <= value <= most
        case {"type": "array", "items": items, "minItems": fewest, "maxItems": most}:
            return fewest <= len(value) <= most and all(valid(item, items) for item in value)
        case {"type": "string", "pattern": pattern}:
            return re.fullmatch(pattern, value) is not None
        case {"type": "string", "maxLength": most}:
            return isinstance(value, str) and len(value) <= most
    raise AssertionError(schema)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("schema", SCHEMAS, ids=[str(index) for index in range(len(SCHEMAS))])
def test_answers_follow_a_schema(owl: Owl2, schema: dict[str, Any], seed: int | None) -> None:
    options: dict[str, Any] = {} if seed is None else {"temperature": 2.0, "top_k": 0, "seed": seed}
    answer = owl.chat().ask("How good is it?", schema=schema, max_new_tokens=LONG, **options)
    assert answer.finish_reason == "stop"
    assert valid(json.loads(answer.text), schema)


@pytest.mark.parametrize("regex", [r"[a-z]{4}", r"\d{2}/\d{2}", r"(yes|no), \S{1,5}", r"Ä+b|ß"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_match_an_expression(owl: Owl2, regex: str, seed: int) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "seed": seed}
    answer = owl.chat().ask("What is it?", regex=regex, max_new_tokens=LONG, **settings)
    if answer.finish_reason == "stop":
        assert re.fullmatch(regex, answer.text)
    else:
        assert "+" in regex


def test_one_of_several_answers(owl: Owl2) -> None:
    choices = ['say "a/b"', "a cat", "a car", "日本", "\\"]
    seen = {
        owl.chat().ask("What is it?", choices=choices, temperature=3.0, top_k=0, seed=seed).text for seed in range(30)
    }
    assert seen <= set(choices)
    assert len(seen) > 1
    assert owl.chat().ask("What is it?", choices=["only this"]).text == "only this"


def test_prompt_lookup_changes_nothing(owl: Owl2) -> None:
    question, schema = "[1, 2, 1] [1, 2, 1] [1, 2, 1]", SCHEMAS[3]
    texts = {owl.chat().ask(question, schema=schema, lookup=lookup).text for lookup in (True, False)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "(("}, "regex cannot be followed"),
        ({"schema": {"type": "unicorn"}}, "schema cannot be followed"),
        ({"schema": 3}, "no object"),
        ({"regex": "a", "choices": ["b"]}, "exclude each other"),
        ({"choices": [""]}, "non-empty"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_once(owl: Owl2, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        owl.chat().stream("What is it?", **options)


def test_a_cancelled_answer_leaves_no_trace(owl: Owl2) -> None:
    assert not Cancellation()
    chat = owl.chat()
    stream = chat.stream("How good is it?", schema=SCHEMAS[3])
    next(stream)
    stream.cancel()
    stream.read()
    assert json.loads(chat.ask("How good is it?", schema=SCHEMAS[3]).text)
