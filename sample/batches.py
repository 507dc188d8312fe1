"""Training examples: conversations as ids with the positions that count in the loss, and padded batches."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from encoder import BOS, EOS, IMAGE, Encoder
from facts import random_fact
from numpy.typing import NDArray
from quality import PROMPT, degraded, photo_crop
from questions import Turn, converse, in_words
from torch import Tensor
from world import MAX_THINGS, Scene, draw, random_scene

from owl2.runtime.config import PreprocessConfig

MEAN, STD = (np.array(values, np.float32) for values in (PreprocessConfig().mean, PreprocessConfig().std))
QUALITY_WEIGHT = 5.0


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: ``ids`` hold ``IMAGE`` once if there are ``pixels`` [84, 84, 3] uint8.

    ``weights[i]`` is how much ``ids[i]`` counts in the loss: 0 unless it belongs to an answer.
    """

    ids: list[int]
    weights: list[float]
    pixels: NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True)
class Mix:
    """Mix of training examples: shares of the sources, number of things and skills of questions by weight."""

    scenes: float
    told: float
    facts: float
    quality: float
    counts: tuple[float, ...]
    skills: dict[str, float]
    turns: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences.

    Attributes:
        ids: int64 [B, T]; 0 at image rows and padding.
        weights: float32 [B, T], of the loss of predicting ``ids[b, t]`` from row t - 1.
        starts: int64 [B], first image row, or -1 without an image.
        pixels: float32 [N, 3, 84, 84], one per row with an image, in order.
    """

    ids: Tensor
    weights: Tensor
    starts: Tensor
    pixels: Tensor


def answer_weights(length: int) -> list[float]:
    """Weights of the ids of an answer: a longer one counts more, but not in proportion to its length.

    Otherwise the many words of captions would drown out the single words of the other answers.
    """
    return [math.sqrt(2 / length)] * length


def conversation(encoder: Encoder, turns: list[Turn], first: str | None = None) -> tuple[list[int], list[float]]:
    """Ids and weights of a conversation in the official template.

    ``first`` replaces the first question's text; it may hold the placeholder "<|image|>".
    """
    ids, weights = [BOS], [0.0]
    for i, turn in enumerate(turns):
        question = turn.question if i or first is None else first
        asked = encoder.prompt(f"USER: {question} ASSISTANT:")[1:]
        answer = [*encoder.encode(turn.answer), EOS]
        ids += asked + answer
        weights += [0.0] * len(asked) + answer_weights(len(answer))
    return ids, weights


def with_image(question: str, rng: random.Random) -> str:
    """The question with the placeholder before it (mostly), before it on a line of its own, or after it."""
    form = rng.random()
    if form < 0.8:
        return f"<|image|>{question}"
    return f"<|image|>\n{question}" if form < 0.9 else f"{question}<|image|>"


def scene_example(encoder: Encoder, scene: Scene, mix: Mix, rng: random.Random) -> Example:
    """A conversation of several turns about a drawn scene."""
    turns = converse(scene, rng, turns=mix.turns, weights=mix.skills)
    ids, weights = conversation(encoder, turns, with_image(turns[0].question, rng))
    return Example(ids, weights, draw(scene, rng))


def told_example(encoder: Encoder, scene: Scene, mix: Mix, rng: random.Random) -> Example:
    """A conversation without an image: the scene is described in words, in any order."""
    turns = converse(scene, rng, turns=mix.turns, weights=mix.skills)
    ids, weights = conversation(encoder, turns, f"{in_words(scene, rng)} {turns[0].question}")
    return Example(ids, weights, None)


def fact_example(encoder: Encoder, rng: random.Random, turns: int) -> Example:
    """Text-only questions about the little world."""
    ids, weights = conversation(encoder, [random_fact(rng) for _ in range(turns)])
    return Example(ids, weights, None)


def quality_example(encoder: Encoder, rng: random.Random, *, held_out: bool) -> Example:
    """A degraded scene or photo in the Q-Align prompt."""
    if rng.random() < 0.5:
        clean = draw(random_scene(rng, rng.randint(1, MAX_THINGS), held_out=held_out), rng)
    else:
        clean = photo_crop(rng, held_out=held_out)
    pixels, word = degraded(clean, rng)
    asked, answer = encoder.prompt(PROMPT), [*encoder.encode(word), EOS]
    return Example(asked + answer, [0.0] * len(asked) + [QUALITY_WEIGHT, 1.0], pixels)


def random_example(encoder: Encoder, mix: Mix, rng: random.Random) -> Example:
    """One training example."""
    source = rng.choices(("scene", "told", "fact", "quality"), (mix.scenes, mix.told, mix.facts, mix.quality))[0]
    if source == "fact":
        return fact_example(encoder, rng, mix.turns)
    if source == "quality":
        return quality_example(encoder, rng, held_out=False)
    count = rng.choices(range(1, MAX_THINGS + 1), mix.counts)[0]
    scene = random_scene(rng, count, held_out=False)
    return (scene_example if source == "scene" else told_example)(encoder, scene, mix, rng)


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[..., 3] uint8 -> float32 as the vision tower takes it, channels still last."""
    return ((pixels.astype(np.float32) / np.float32(255)) - MEAN) / STD


def collate(examples: list[Example], rows: int) -> Batch:
    """Pad examples to one batch; each image takes ``rows`` positions."""
    length = max(len(e.ids) + (rows - 1) * (e.pixels is not None) for e in examples)
    # Few different lengths: matrix kernels are generated anew for every shape.
    length = -(-length // 16) * 16
    ids = np.zeros((len(examples), length), np.int64)
    weights = np.zeros((len(examples), length), np.float32)
    starts = np.full(len(examples), -1, np.int64)
    for b, example in enumerate(examples):
        row_ids, row_weights = example.ids, example.weights
        if example.pixels is not None:
            start = row_ids.index(IMAGE)
            starts[b] = start
            row_ids = row_ids[:start] + [0] * rows + row_ids[start + 1 :]
            row_weights = row_weights[:start] + [0.0] * rows + row_weights[start + 1 :]
        ids[b, : len(row_ids)] = row_ids
        weights[b, : len(row_weights)] = row_weights
    images = [e.pixels for e in examples if e.pixels is not None]
    pixels = normalise(np.stack(images)) if images else np.zeros((0, 84, 84, 3), np.float32)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(weights),
        torch.from_numpy(starts),
        torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
    )


def batches(encoder: Encoder, mix: Mix, rng: random.Random, size: int, rows: int, pool: int) -> list[Batch]:
    """``pool`` batches of examples sorted by length, so that little is padded; in random order."""
    examples = sorted((random_example(encoder, mix, rng) for _ in range(size * pool)), key=lambda e: len(e.ids))
    parts = [collate(examples[i : i + size], rows) for i in range(0, len(examples), size)]
    rng.shuffle(parts)
    return parts
