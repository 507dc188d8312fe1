"""Text-only questions: knowledge about the shapes, colours and numbers of the little world."""

from __future__ import annotations

import random

from questions import NUMBERS, Turn
from world import COLOURS, SHAPES

SIDES = {"triangle": "three", "square": "four"}
MIXES = {("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple"}
OPPOSITES = {"left": "right", "above": "below", "big": "small", "top": "bottom", "yes": "no"}


def all_facts() -> list[Turn]:
    """Every question of the skill ``fact`` with its answer; the same list in training and in tests."""
    pairs: list[tuple[str, str]] = []
    for shape, sides in SIDES.items():
        pairs += [
            (f"How many sides does a {shape} have?", sides),
            (f"How many corners does a {shape} have?", sides),
        ]
    pairs.append(("Does a circle have corners?", "no"))
    pairs += [(f"Does a {shape} have corners?", "yes") for shape in SHAPES if shape != "circle"]
    pairs.append(("Which shape is round?", "circle"))
    for (first, second), mixed in MIXES.items():
        pairs += [(f"What colour do {a} and {b} make?", mixed) for a, b in ((first, second), (second, first))]
    for word, opposite in OPPOSITES.items():
        pairs += [(f"What is the opposite of {a}?", b) for a, b in ((word, opposite), (opposite, word))]
    pairs += [(f"Is {colour} a colour or a shape?", "a colour") for colour in COLOURS]
    pairs += [(f"Is a {shape} a colour or a shape?", "a shape") for shape in SHAPES]
    for i, number in enumerate(NUMBERS):
        if i + 1 < len(NUMBERS):
            pairs += [
                (f"Which number comes after {number}?", NUMBERS[i + 1]),
                (f"Which number comes before {NUMBERS[i + 1]}?", number),
            ]
        pairs += [(f"What is {number} plus {NUMBERS[j]}?", NUMBERS[i + j]) for j in range(len(NUMBERS) - i)]
    pairs += [
        ("What colour is grass?", "green"),
        ("What colour is the sky?", "blue"),
        ("What colour is the sun?", "yellow"),
        ("What colour is a tomato?", "red"),
        ("Hello!", "hello"),
        ("Who are you?", "a small owl"),
    ]
    return [Turn("fact", question, answer) for question, answer in pairs]


FACTS = tuple(all_facts())


def random_fact(rng: random.Random) -> Turn:
    """One of :data:`FACTS`."""
    return rng.choice(FACTS)
