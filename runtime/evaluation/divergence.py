"""How far the next-token distributions of two models lie apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.engine import Floats, Ints

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
        def joined(one: Pair, two: Pair) -> Pair:
            return one[0] + two[0], one[1] + two[1]

        return Divergence(
            joined(self.positions, other.positions),
            joined(self.kl, other.kl),
            joined(self.same, other.same),
            self.difference + other.difference,
        )

    def mean_kl(self, kind: int) -> float:
        """Nats per position of a modality: 0 text, 1 image; 0 where there is none."""
        return self.kl[kind] / max(self.positions[kind], 1.0)

    def agreement(self, kind: int) -> float:
        """Share of a modality's positions with the same most likely token; 0 where there is none."""
        return self.same[kind] / max(self.positions[kind], 1.0)

    @property
    def mean_difference(self) -> float:
        """Mean absolute difference of a logit."""
        return self.difference / max(sum(self.positions), 1.0)


def divergence(reference: Floats, made: Floats, modality: Ints) -> Divergence:
    """Compare the logits of one prompt.

    Args:
        reference: [T, V], the distribution that counts as true.
        made: [T, V].
        modality: [T], 1 at image rows.
    """
    positions, kl, same = np.zeros(2), np.zeros(2), np.zeros(2)
    difference = 0.0
    for start in range(0, len(modality), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        one, other, kinds = reference[rows], made[rows], modality[rows]
        positions += np.bincount(kinds, minlength=2)
        kl += np.bincount(kinds, row_kl(one, other), 2)
        same += np.bincount(kinds, one.argmax(-1) == other.argmax(-1), 2)
        difference += float(np.abs(one - other).mean(-1, dtype=np.float64).sum())
    return Divergence(_pair(positions), _pair(kl), _pair(same), difference)


def row_kl(reference: Floats, made: Floats) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of each row of logits, in nats: [T, V] twice -> [T]."""
    p, q = log_softmax_rows(reference), log_softmax_rows(made)
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return result


def log_softmax_rows(logits: Floats) -> NDArray[np.float64]:
    """Natural logarithm of the probabilities of each row: [T, V] -> float64 [T, V]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def token_logprobs(logits: Floats, ids: Ints) -> NDArray[np.float64]:
    """Log-probability of one token per row, in nats: logits [T, V], ids [T] -> [T]."""
    made = [np.zeros(0)]
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        made.append(np.take_along_axis(log_softmax_rows(logits[rows]), ids[rows, None], axis=1)[:, 0])
    return np.concatenate(made)


def _pair(values: NDArray[np.float64]) -> Pair:
    return float(values[0]), float(values[1])
