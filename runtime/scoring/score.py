"""A score, and how it is made of logits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from owl2.runtime.engine import Floats
from owl2.runtime.scoring.scale import Scale


@dataclass(frozen=True, slots=True)
class Score:
    """A score of one image, or of several that were asked about together.

    Attributes:
        value: mean weight of the levels under their probabilities: 1 to 5 with the usual weights, as in OneAlign's
            ``score()`` and pyiqa.
        normalized: the same on a scale from 0 (the least weight) to 1 (the greatest), as in Q-Align's scorers.
        std: standard deviation of the weight under the probabilities, as in DeQA-Score.
        probabilities: of the levels among each other, by their first word.
        logits: of the levels.
        task: that was scored.
        image: path of the image, if it was given as one.
        bundle: fingerprint of the bundle.
    """

    value: float
    normalized: float
    std: float
    probabilities: Mapping[str, float]
    logits: Mapping[str, float]
    task: str
    image: str | None
    bundle: str

    def __float__(self) -> float:
        return self.value

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return asdict(self)


def score_of(logits: Floats, ids: Sequence[Sequence[int]], scale: Scale, image: object, bundle: str) -> Score:
    """Make a score of the logits [V] at the last position of a prompt.

    Softmax over the levels alone (Q-Align, section 3.2, equations 3 and 4), in float64.

    Args:
        logits: of all tokens.
        ids: of each level's words.
        scale: what was asked.
        image: as it was given.
        bundle: fingerprint.
    """
    level = np.array([logits[words].mean(dtype=np.float64) for words in map(list, ids)])
    odds = np.exp((level - level.max()) / scale.temperature)
    probabilities = odds / odds.sum()
    weights = np.array([one.weight for one in scale.levels])
    value = float(probabilities @ weights)
    names = [one.name for one in scale.levels]
    return Score(
        value=value,
        normalized=float((value - weights.min()) / (weights.max() - weights.min())),
        std=float(np.sqrt(probabilities @ (weights - value) ** 2)),
        probabilities=dict(zip(names, probabilities.tolist())),
        logits=dict(zip(names, level.tolist())),
        task=scale.task,
        image=os.fspath(image) if isinstance(image, str | os.PathLike) and str(image)[:5] != "data:" else None,
        bundle=bundle,
    )
