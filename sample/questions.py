"""Questions about a scene with their only accepted answer, captions, and conversations of both.

Only unambiguous questions are asked: a thing is referred to by its shape, its colour, both, or its place, and only if
that fits exactly one thing; "left of" and "above" compare columns and rows, and are not asked about two things in the
same one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world import COLOURS, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
CAPTION_PROMPTS = ("Describe the picture.", "What is in the picture?", "Describe the image.")
OPPOSITE = {"left of": "right of", "above": "below"}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; ``skill`` says what it takes to answer it."""

    skill: str
    question: str
    answer: str


def listing(things: tuple[Thing, ...]) -> str:
    """The things in words, separated by commas and "and"."""
    parts = [f"a {t.size} {t.name} {t.place}" for t in things]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene, rng: random.Random) -> Turn:
    """The whole scene, row by row."""
    return Turn("caption", rng.choice(CAPTION_PROMPTS), listing(scene.things))


def an(words: str) -> str:
    """The words with their indefinite article."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _unique(scene: Scene, value: Callable[[Thing], str]) -> list[Thing]:
    """Things whose ``value`` no other thing shares."""
    values = [value(t) for t in scene.things]
    return [t for t in scene.things if values.count(value(t)) == 1]


def _named(scene: Scene) -> list[Thing]:
    return _unique(scene, lambda t: t.name)


def colour(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask for the colour of a thing, by its shape or its place."""
    by_shape = _unique(scene, lambda t: t.shape)
    if by_shape and rng.random() < 0.5:
        thing = rng.choice(by_shape)
        return Turn("colour", f"What colour is the {thing.shape}?", thing.colour)
    thing = rng.choice(scene.things)
    return Turn("colour", f"What colour is the shape {thing.place}?", thing.colour)


def shape(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask for the shape of a thing, by its colour or its place."""
    by_colour = _unique(scene, lambda t: t.colour)
    if by_colour and rng.random() < 0.5:
        thing = rng.choice(by_colour)
        return Turn("shape", f"What shape is {thing.colour}?", thing.shape)
    thing = rng.choice(scene.things)
    return Turn("shape", f"What shape is {thing.place}?", thing.shape)


def count(scene: Scene, rng: random.Random) -> Turn:
    """Ask for the number of things, of a shape or of a colour; the number is drawn before its question."""
    if rng.random() < 0.3:
        return Turn("count", "How many shapes are there?", NUMBERS[len(scene.things)])
    shapes, colours = [t.shape for t in scene.things], [t.colour for t in scene.things]
    options: dict[int, list[str]] = {}
    for name in SHAPES:
        plural = "crosses" if name == "cross" else f"{name}s"
        options.setdefault(shapes.count(name), []).append(f"How many {plural} are there?")
    for name in COLOURS:
        options.setdefault(colours.count(name), []).append(f"How many {name} shapes are there?")
    number = rng.choice(sorted(options))
    return Turn("count", rng.choice(options[number]), NUMBERS[number])


def _compare(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask whether one thing is left of, right of, above or below another."""
    named = _named(scene)
    pairs = [
        (a, b, word, axis)
        for word, axis in (("left of", "column"), ("above", "row"))
        for a in named
        for b in named
        if getattr(a, axis) != getattr(b, axis)
    ]
    if not pairs:
        return None
    a, b, word, axis = rng.choice(pairs)
    holds = getattr(a, axis) < getattr(b, axis)
    if rng.random() < 0.5:
        word, holds = OPPOSITE[word], not holds
    return Turn("relation", f"Is the {a.name} {word} the {b.name}?", "yes" if holds else "no")


def _neighbour(scene: Scene, rng: random.Random) -> tuple[Turn, Thing] | None:
    """Ask for the thing left of (right of, above, below) another, where there is exactly one; with that thing."""
    found = []
    for thing in _named(scene):
        for word, axis, sign in (
            ("left of", "column", -1),
            ("right of", "column", 1),
            ("above", "row", -1),
            ("below", "row", 1),
        ):
            beyond = [t for t in scene.things if (getattr(t, axis) - getattr(thing, axis)) * sign > 0]
            if len(beyond) == 1:
                question = f"What is {word} the {thing.name}?"
                found.append((Turn("relation", question, an(beyond[0].name)), beyond[0]))
    return rng.choice(found) if found else None


def relation(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask to compare two things (yes or no), or for the only thing on a side of another."""
    if rng.random() < 0.4 and (found := _neighbour(scene, rng)):
        return found[0]
    return _compare(scene, rng)


def place(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask for the place of a thing."""
    named = _named(scene)
    if not named:
        return None
    thing = rng.choice(named)
    return Turn("place", f"Where is the {thing.name}?", thing.place)


def size(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask whether a thing is big or small."""
    named = _named(scene)
    if not named:
        return None
    thing = rng.choice(named)
    return Turn("size", f"Is the {thing.name} big or small?", thing.size)


def presence(scene: Scene, rng: random.Random) -> Turn:
    """Ask whether a thing exists; half of the answers are yes, most other questions are wrong in one word only."""
    names = {t.name for t in scene.things}
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return Turn("presence", f"Is there {an(thing.name)}?", "yes")
    while True:
        change = rng.random()
        new_colour = rng.choice(tuple(COLOURS)) if change < 0.6 else thing.colour
        new_shape = rng.choice(SHAPES) if change > 0.4 else thing.shape
        name = f"{new_colour} {new_shape}"
        if name not in names:
            return Turn("presence", f"Is there {an(name)}?", "no")


def follow_up(scene: Scene, rng: random.Random) -> tuple[Turn, Turn] | None:
    """A question and a second one that refers to it ("it", "of them")."""
    form = rng.randrange(4)
    if form == 0:
        thing = rng.choice(scene.things)
        first = Turn("shape", f"What shape is {thing.place}?", thing.shape)
        return first, _about_it(thing, rng.choice(("colour", "size")))
    if form == 1:
        unique = _unique(scene, lambda t: t.shape)
        if not unique:
            return None
        thing = rng.choice(unique)
        first = Turn("colour", f"What colour is the {thing.shape}?", thing.colour)
        return first, _about_it(thing, rng.choice(("place", "size")))
    if form == 2:
        first = Turn("count", "How many shapes are there?", NUMBERS[len(scene.things)])
        colours = [t.colour for t in scene.things]
        name = rng.choice(colours if rng.random() < 0.7 else tuple(COLOURS))
        return first, Turn("second", f"How many of them are {name}?", NUMBERS[colours.count(name)])
    found = _neighbour(scene, rng)
    return (found[0], _about_it(found[1], rng.choice(("place", "size")))) if found else None


def _about_it(thing: Thing, what: str) -> Turn:
    if what == "colour":
        return Turn("second", "What colour is it?", thing.colour)
    if what == "place":
        return Turn("second", "Where is it?", thing.place)
    return Turn("second", "Is it big or small?", thing.size)


ASK: dict[str, Callable[[Scene, random.Random], Turn | None]] = {
    "colour": colour,
    "shape": shape,
    "count": count,
    "relation": relation,
    "place": place,
    "size": size,
    "presence": presence,
}


def converse(scene: Scene, rng: random.Random, *, turns: int, weights: dict[str, float]) -> list[Turn]:
    """A conversation of about ``turns`` different questions about one scene, skills drawn by ``weights``.

    ``weights`` may name every skill of :data:`ASK`, ``caption`` and ``second``; there is at most one caption.
    """
    talk: list[Turn] = []
    known: set[str] = set()
    skills, shares = tuple(weights), tuple(weights.values())
    for _ in range(4 * turns):
        if len(talk) >= turns:
            break
        skill = rng.choices(skills, shares)[0]
        asked: tuple[Turn | None, ...]
        if skill == "second":
            asked = follow_up(scene, rng) or ()
        else:
            asked = (caption(scene, rng) if skill == "caption" else ASK[skill](scene, rng),)
        if any(turn is None or turn.question in known or turn.skill in known for turn in asked):
            continue
        talk.extend(turn for turn in asked if turn is not None)
        known.update(turn.question for turn in talk if turn.skill != "second")
        known.update({"caption"} if skill == "caption" else ())
    # A scene of one thing may have refused every question that was drawn; a caption always fits.
    return talk or [caption(scene, rng)]


def in_words(scene: Scene, rng: random.Random) -> str:
    """The scene in words: its things in any order."""
    return f"The picture shows {listing(tuple(rng.sample(scene.things, len(scene.things))))}."
