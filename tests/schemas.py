"""JSON schemas of mixed kinds, drawn at random; every answer that follows one of them has an end."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
NAMES = ("sharp", "count", "colour", "größe", "a b", "x/y", 'q"', "Score", "tags", "next")
WORDS = ("good", "bad", "ja", "ß", "", "two words", "\\", "日本", "a\nb")
PATTERNS = ("^[a-c]{3}$", r"^\d{4}-\d{2}$", "^(yes|no|maybe)$", "^[A-Z][a-z]{0,5}!?$", r"^#[0-9a-f]{6}$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4")


def schemas(count: int, seed: int = 0) -> list[Schema]:
    """So many of them, each kind in turn at the top, others drawn below."""
    dice = random.Random(seed)
    return [KINDS[number % len(KINDS)](dice, 2) for number in range(count)]


def _any(dice: random.Random, depth: int) -> Schema:
    kinds = INNER if depth > 0 else SIMPLE
    return dice.choice(kinds)(dice, depth - 1)


def _boolean(_dice: random.Random, _depth: int) -> Schema:
    return {"type": "boolean"}


def _nothing(_dice: random.Random, _depth: int) -> Schema:
    return {"type": "null"}


def _integer(dice: random.Random, _depth: int) -> Schema:
    least = dice.randrange(-200, 200)
    return {"type": "integer", "minimum": least, "maximum": least + dice.randrange(300)}


def _number(dice: random.Random, _depth: int) -> Schema:
    least = dice.randrange(-5, 5)
    return {
        "type": "number",
        dice.choice(["minimum", "exclusiveMinimum"]): least,
        "maximum": least + 1.5,
        "multipleOf": 0.25,
    }


def _text(dice: random.Random, _depth: int) -> Schema:
    least = dice.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + dice.randrange(6)}


def _pattern(dice: random.Random, _depth: int) -> Schema:
    return {"type": "string", "pattern": dice.choice(PATTERNS)}


def _format(dice: random.Random, _depth: int) -> Schema:
    return {"type": "string", "format": dice.choice(FORMATS)}


def _enum(dice: random.Random, _depth: int) -> Schema:
    return {"enum": dice.sample([*WORDS, 1, 2.5, True, None, [1], {"a": 1}], dice.randrange(1, 6))}


def _const(dice: random.Random, _depth: int) -> Schema:
    return {"const": dice.choice(WORDS)}


def _list(dice: random.Random, depth: int) -> Schema:
    least = dice.randrange(3)
    return {"type": "array", "items": _any(dice, depth), "minItems": least, "maxItems": least + dice.randrange(3)}


def _tuple(dice: random.Random, depth: int) -> Schema:
    parts = [_any(dice, depth) for _ in range(dice.randrange(1, 4))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _object(dice: random.Random, depth: int) -> Schema:
    names = dice.sample(NAMES, dice.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(dice, depth) for name in names},
        "required": dice.sample(names, dice.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


def _either(dice: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(dice, depth) for _ in range(dice.randrange(2, 4))]}


def _named(dice: random.Random, depth: int) -> Schema:
    return {
        "$defs": {"part": _object(dice, min(depth, 0))},
        "type": "object",
        "properties": {"one": {"$ref": "#/$defs/part"}, "two": {"$ref": "#/$defs/part"}},
        "required": ["one"],
        "additionalProperties": False,
    }


SIMPLE: tuple[Callable[[random.Random, int], Schema], ...] = (
    _boolean, _nothing, _integer, _number, _text, _pattern, _format, _enum, _const,
)  # fmt: skip
INNER = (*SIMPLE, _list, _tuple, _object, _either)
KINDS = (*INNER, _named)
