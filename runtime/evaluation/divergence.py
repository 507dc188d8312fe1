"""Divergence of the next-token distributions of two models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.engine import Floats, Ints
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.likelihood import log_softmax_rows

TEXT, IMAGE = 0, 1
"""Modalities of a position."""

# Rows of logits worked on at a time, which bounds the memory at full-size vocabularies.
ROWS_AT_ONCE = 64

Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sums over compared positions; pairs hold text and image positions. Add two to join them.

    Attributes:
        positions: how many.
        kl: Kullback-Leibler divergence, nats.
        same: positions with the same most likely token.
        difference: mean absolute difference of a position's logits.
    """

    positions: Pair = (0.0, 0.0)
    kl: Pair = (0.0, 0.0)
    same: Pair = (0.0, 0.0)
    difference: float = 0.0

    def __add__(self, other: Divergence) -> Divergence:
        def add(first: Pair, second: Pair) -> Pair:
            return first[TEXT] + second[TEXT], first[IMAGE] + second[IMAGE]

        return Divergence(
            add(self.positions, other.positions),
            add(self.kl, other.kl),
            add(self.same, other.same),
            self.difference + other.difference,
        )

    def mean_kl(self, modality: int) -> float:
        """Nats per position of a modality; 0 where it has none."""
        return self.kl[modality] / max(self.positions[modality], 1.0)

    def agreement(self, modality: int) -> float:
        """Share of a modality's positions with the same most likely token; 0 where it has none."""
        return self.same[modality] / max(self.positions[modality], 1.0)

    @property
    def mean_difference(self) -> float:
        """Mean absolute difference of a logit."""
        return self.difference / max(sum(self.positions), 1.0)


def divergence(reference: Floats, actual: Floats, modality: Ints) -> Divergence:
    """Compare the logits of one prompt: [T, V] twice, those of ``reference`` count as true; [T], 1 at image rows."""
    sums, difference = np.zeros((3, 2)), 0.0
    for start in range(0, len(modality), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        expected, found, modalities = reference[rows], actual[rows], modality[rows]
        weights = np.ones(len(modalities)), row_kl(expected, found), expected.argmax(-1) == found.argmax(-1)
        sums += [np.bincount(modalities, weight, 2) for weight in weights]
        difference += float(np.abs(expected - found).mean(-1, dtype=np.float64).sum())
    positions, kl, same = ((float(pair[TEXT]), float(pair[IMAGE])) for pair in sums)
    return Divergence(positions, kl, same, difference)


def modality_of(prompt: Prompt) -> Ints:
    """Modality of each position of a prompt: int64 [T], 1 at image rows."""
    return np.array([isinstance(key, tuple) for key in prompt.keys], dtype=np.int64)


def row_kl(reference: Floats, actual: Floats) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of each row of logits, in nats: [T, V] twice -> [T]."""
    p, q = log_softmax_rows(reference), log_softmax_rows(actual)
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return result
