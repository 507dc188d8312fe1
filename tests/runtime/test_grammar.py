"""Answers that follow a schema, an expression or a list."""

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator as VALIDATOR
from schemas import schemas

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


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("schema", SCHEMAS, ids=[str(index) for index in range(len(SCHEMAS))])
def test_answers_follow_a_schema(owl: Owl2, schema: dict[str, Any], seed: int | None) -> None:
    options: dict[str, Any] = {} if seed is None else {"temperature": 2.0, "top_k": 0, "seed": seed}
    answer = owl.chat().ask("How good is it?", schema=schema, max_new_tokens=LONG, **options)
    assert answer.finish_reason == "stop"
    VALIDATOR(schema).validate(json.loads(answer.text))


def test_answers_follow_two_hundred_schemas(owl: Owl2) -> None:
    """Of mixed kinds; half of the answers are greedy, half as random as can be."""
    wild: dict[str, Any] = {"temperature": 2.0, "top_k": 0}
    for number, schema in enumerate(schemas(200)):
        options = wild | {"seed": number} if number % 2 else {}
        answer = owl.chat().ask("How good is it?", schema=schema, max_new_tokens=LONG, **options)
        assert answer.finish_reason == "stop", schema
        VALIDATOR(schema, format_checker=VALIDATOR.FORMAT_CHECKER).validate(json.loads(answer.text))


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


def test_spaces_in_front_are_part_of_the_answer(owl: Owl2) -> None:
    wild: dict[str, Any] = {"temperature": 3.0, "top_k": 0}
    for seed in range(8):
        assert owl.chat().ask("What?", choices=[" yes", " no"], seed=seed, **wild).text in (" yes", " no")
        assert owl.chat().ask("What?", regex=" {3}x", seed=seed, **wild).text == "   x"


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
