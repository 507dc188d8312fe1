"""Held-out questions: the same ones for the same seed, asked of the torch model and of an exported bundle."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from batches import Example, collate
from encoder import EOS, Encoder
from facts import FACTS
from network import predictions
from numpy.typing import NDArray
from quality import PROMPT, degraded, photo_crop
from questions import ASK, Turn, caption, follow_up, in_words
from world import MAX_THINGS, Scene, draw, random_scene

from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.families.mplug_owl2.template import Message, render, with_images

MAIN_SKILLS = ("colour", "shape", "count", "relation")
SKILLS = (*ASK, "caption", "second", "told", "fact", "quality")


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt up to where the model answers, its image [84, 84, 3] uint8, and the right answer."""

    prompt: str
    pixels: NDArray[np.uint8] | None
    answer: str


def template(turns: list[Turn], image: bool) -> str:
    """The official prompt: earlier turns with their answers, the last one open."""
    messages = [m for turn in turns for m in (Message("USER", turn.question), Message("ASSISTANT", turn.answer))]
    messages[0] = Message("USER", with_images(turns[0].question, int(image)))
    messages[-1] = Message("ASSISTANT")
    return render(messages)


def _ask(skill: str, scene: Scene, rng: random.Random) -> list[Turn] | None:
    """A question of ``skill`` about ``scene`` after those it refers to, or None if it cannot be asked."""
    if skill == "caption":
        return [caption(scene, rng)]
    if skill == "second":
        talk = follow_up(scene, rng)
        return None if talk is None else list(talk)
    asked = ASK[rng.choice(tuple(ASK)) if skill == "told" else skill](scene, rng)
    return None if asked is None else [asked]


def probe(skill: str, rng: random.Random) -> Probe:
    """One held-out question of ``skill``."""
    if skill == "fact":
        fact = rng.choice(FACTS)
        return Probe(template([fact], False), None, fact.answer)
    if skill == "quality":
        scene = random_scene(rng, rng.randint(1, MAX_THINGS), held_out=True)
        clean = draw(scene, rng) if rng.random() < 0.5 else photo_crop(rng, held_out=True)
        pixels, word = degraded(clean, rng)
        return Probe(PROMPT, pixels, word)
    while True:
        scene = random_scene(rng, rng.randint(1, MAX_THINGS), held_out=True)
        turns = _ask(skill, scene, rng)
        if turns is None:
            continue
        if skill == "told":
            told = Turn(skill, f"{in_words(scene, rng)} {turns[0].question}", turns[0].answer)
            return Probe(template([told], False), None, told.answer)
        return Probe(template(turns, True), draw(scene, rng), turns[-1].answer)


def probes(skill: str, count: int, seed: int) -> list[Probe]:
    """``count`` held-out questions of one skill."""
    rng = random.Random(f"{skill} {seed}")
    return [probe(skill, rng) for _ in range(count)]


def as_example(encoder: Encoder, item: Probe, *, with_answer: bool = True) -> Example:
    """The prompt as ids, followed by the answer as the only part that counts in a loss."""
    first, *later = (encoder.prompt(part) for part in item.prompt.split("</s>"))
    ids = list(first)
    for part in later:
        ids += [EOS, *part[1:]]
    answer = [*encoder.encode(item.answer), EOS] if with_answer else []
    return Example(ids + answer, [0.0] * len(ids) + [1.0] * len(answer), item.pixels)


@torch.no_grad()
def exact_share(model: Owl2Model, encoder: Encoder, items: list[Probe], rows: int) -> float:
    """Share of probes whose greedy answer is the right one, word by word.

    Greedy decoding gives the right answer exactly if each of its ids is the most likely one after those before it, so
    one pass over the right answers is enough.
    """
    right = 0
    for first in range(0, len(items), 64):
        part = items[first : first + 64]
        predicted = predictions(model, collate([as_example(encoder, p) for p in part], rows))
        wrong = predicted.owners[predicted.logits.argmax(-1) != predicted.targets]
        right += len(part) - len(set(wrong.tolist()))
    return right / len(items)
