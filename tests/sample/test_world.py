"""Scenes: the split, the drawing, the answers against a slow reading of the scene."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from questions import ASK, NUMBERS, Turn, caption, converse, follow_up
from world import CELL, COLOURS, GRID, PLACES, SHAPES, SIDE, Scene, Thing, draw, random_scene

SIZE_WORDS = ("big", "small")


def scenes(count: int, *, held_out: bool = False, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, rng.randint(1, 4), held_out=held_out) for _ in range(count)]


def test_sides_of_the_split_never_share_a_scene() -> None:
    train, held = ({s.key for s in scenes(3000, held_out=side)} for side in (False, True))
    assert not train & held
    assert len(train) > 2000 < len(held) + 500


def test_side_depends_on_the_scene_and_not_on_the_order_of_its_things() -> None:
    for scene in scenes(50):
        assert Scene(scene.things[::-1]).held_out == scene.held_out


def test_about_one_scene_in_eight_is_held_out() -> None:
    rng = random.Random(5)

    def any_scene() -> Scene:
        cells = sorted(rng.sample(range(9), 3))
        return Scene(
            tuple(Thing(c, rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(SIZE_WORDS)) for c in cells)
        )

    share = sum(any_scene().held_out for _ in range(4000)) / 4000
    assert 0.10 < share < 0.15


def test_scenes_and_images_are_the_same_for_the_same_seed() -> None:
    first, second = scenes(20, seed=3), scenes(20, seed=3)
    assert first == second
    images = [draw(first[0], random.Random(9)) for _ in range(2)]
    np.testing.assert_array_equal(images[0], images[1])


@pytest.mark.parametrize("scale", [1, 4])
def test_every_thing_shows_its_colour_in_its_cell_and_nothing_elsewhere(scale: int) -> None:
    for scene in scenes(20, seed=1):
        pixels = draw(scene, random.Random(2), scale=scale).astype(int)
        assert pixels.shape == (SIDE * scale, SIDE * scale, 3)
        things = {t.cell: t for t in scene.things}
        for cell in range(GRID * GRID):
            row, column = divmod(cell, GRID)
            centre = pixels[int((row + 0.5) * CELL * scale), int((column + 0.5) * CELL * scale)]
            expected = np.array(COLOURS[things[cell].colour]) if cell in things else None
            if expected is None:
                assert centre.min() > 200
            else:
                assert np.abs(centre - expected).max() <= 13


def matching(scene: Scene, phrase: str) -> list[Thing]:
    """Things that fit the colour, shape and place words of a noun phrase."""
    place = max((p for p in PLACES if phrase.endswith(p)), key=len, default=None)
    words = phrase.removesuffix(place or "").split()
    return [
        t
        for t in scene.things
        if (place is None or t.place == place)
        and all(w in (t.colour, t.shape, t.size) for w in words if w not in ("the", "a", "an", "shape"))
    ]


def only(things: Sequence[Thing]) -> Thing:
    assert len(things) == 1
    return things[0]


def is_related(a: Thing, b: Thing, word: str) -> bool:
    """Whether a is ``word`` b."""
    return {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[word]


def read_answer(scene: Scene, turn: Turn) -> str:
    """The answer by brute force from the words of the question."""
    text = turn.question.rstrip("?.")
    for word in ("left of", "right of", "above", "below"):
        if f" {word} the " in text:
            head, anchor = text.split(f" {word} the ")
            b = only(matching(scene, anchor))
            if head == "What is":
                a = only([t for t in scene.things if is_related(t, b, word)])
                return ("an " if a.colour[0] in "aeiou" else "a ") + a.name
            a = only(matching(scene, head.removeprefix("Is the ")))
            assert is_related(a, b, word) or is_related(b, a, word)
            return "yes" if is_related(a, b, word) else "no"
    if text.startswith("How many "):
        what = text.removeprefix("How many ").removesuffix(" are there").removesuffix(" shapes")
        what = "cross" if what == "crosses" else what.removesuffix("s")
        return NUMBERS[len(matching(scene, what))]
    if text.startswith("What colour is "):
        return only(matching(scene, text.removeprefix("What colour is "))).colour
    if text.startswith("What shape is "):
        return only(matching(scene, text.removeprefix("What shape is "))).shape
    if text.startswith("Where is "):
        return only(matching(scene, text.removeprefix("Where is "))).place
    if text.endswith(" big or small"):
        return only(matching(scene, text.removeprefix("Is ").removesuffix(" big or small"))).size
    assert text.startswith("Is there ")
    return "yes" if matching(scene, text.removeprefix("Is there ")) else "no"


@pytest.mark.parametrize("skill", list(ASK))
def test_answers_are_those_of_a_slow_reading_of_the_scene(skill: str) -> None:
    rng = random.Random(skill)
    asked = [(s, ASK[skill](s, rng)) for s in scenes(400, seed=7)]
    turns = [(scene, turn) for scene, turn in asked if turn is not None]
    assert len(turns) > 200
    for scene, turn in turns:
        assert turn.skill == skill
        assert turn.answer == read_answer(scene, turn), (scene.key, turn)


@pytest.mark.parametrize(("skill", "limit"), [("colour", 0.25), ("shape", 0.3), ("relation", 0.4), ("count", 0.45)])
def test_answers_cannot_be_guessed(skill: str, limit: float) -> None:
    rng = random.Random(1)
    answers = [t.answer for s in scenes(1500, seed=2) if (t := ASK[skill](s, rng)) is not None]
    commonest = max(answers.count(a) for a in set(answers))
    assert commonest / len(answers) < limit


def test_caption_names_every_thing_row_by_row() -> None:
    rng = random.Random(0)
    for scene in scenes(100):
        words = caption(scene, rng).answer
        spots = [words.index(f"{t.size} {t.name} {t.place}") for t in scene.things]
        assert spots == sorted(spots)
        assert words.count(" at ") + words.count(" on ") + words.count(" in ") == len(scene.things)


def test_second_question_is_about_the_thing_of_the_first() -> None:
    rng = random.Random(4)
    pairs = [(s, p) for s in scenes(600, seed=8) if (p := follow_up(s, rng)) is not None]
    for scene, (first, second) in pairs:
        assert first.answer == read_answer(scene, first)
        if second.question.startswith("How many of them"):
            colour = second.question.removeprefix("How many of them are ").rstrip("?")
            assert second.answer == NUMBERS[len(matching(scene, colour))]
            continue
        if first.skill == "relation":
            meant = only(matching(scene, first.answer)) if scene_has_one(scene, first.answer) else None
        else:
            meant = only(matching(scene, phrase_of(first)))
        if meant is not None:
            assert second.answer in (meant.colour, meant.place, meant.size)


def scene_has_one(scene: Scene, words: str) -> bool:
    return len(matching(scene, words)) == 1


def phrase_of(turn: Turn) -> str:
    return turn.question.removeprefix("What shape is ").removeprefix("What colour is ").rstrip("?")


def test_conversations_have_every_skill_and_no_question_twice() -> None:
    rng = random.Random(6)
    weights = dict.fromkeys((*ASK, "caption", "second"), 1.0)
    seen: set[str] = set()
    for scene in scenes(200, seed=9):
        talk = converse(scene, rng, turns=5, weights=weights)
        plain = [turn.question for turn in talk if turn.skill not in ("second", "caption")]
        assert len(plain) == len(set(plain))
        assert all(isinstance(turn, Turn) for turn in talk)
        seen |= {turn.skill for turn in talk}
    assert seen == set(weights)


def test_a_conversation_is_never_empty() -> None:
    """No relation can be asked of a single thing."""
    rng = random.Random(0)
    scene = random_scene(rng, 1, held_out=False)
    (turn,) = converse(scene, rng, turns=4, weights={"relation": 1.0})
    assert turn.skill == "caption"
