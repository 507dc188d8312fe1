"""The second moment of a linear layer's inputs, gathered batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from owl2.runtime.errors import CalibrationError


class HessianAccumulator:
    """Sums ``weight * x x^T`` over the input rows x of one layer (GPTQ, Frantar et al. 2022, section 3).

    Memory: one [K, K] float32 matrix, whose rounding stays far below the damping that GPTQ adds.

    Args:
        width: K, the layer's input features.
        name: what the rows are, for messages: ``layer 3 k_proj, image rows``.
        device: where the matrix lives and where rows are expected.
    """

    def __init__(self, width: int, name: str, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.name = name
        self.count = 0
        self._total_weight = 0.0
        self._moment = torch.zeros(width, width, dtype=torch.float32, device=device)

    def add(self, rows: Tensor, weight: float = 1.0) -> None:
        """Add rows: [n, K] float; n may be 0. ``weight`` counts each of them as so many.

        Raises:
            CalibrationError: the wrong shape, values that are not finite, or a weight that is not positive.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise CalibrationError(
                f"{self.name}: expected calibration rows of shape (n, {self.width}), got {tuple(rows.shape)}"
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise CalibrationError(f"{self.name}: the weight of calibration rows must be positive, got {weight}")
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        if bad:
            raise CalibrationError(
                f"{self.name}: {bad} of {rows.shape[0]} calibration rows hold NaN or infinite values; run "
                "the calibration in float32 or look for a damaged checkpoint"
            )
        rows = rows.float()
        self._moment.addmm_(rows.T, rows, alpha=weight)
        self.count += rows.shape[0]
        self._total_weight += weight * rows.shape[0]

    def joined(self, other: HessianAccumulator) -> HessianAccumulator:
        """A new accumulator that has seen the rows of both."""
        both = HessianAccumulator(self.width, f"{self.name} and {other.name}", self._moment.device)
        both.count = self.count + other.count
        both._total_weight = self._total_weight + other._total_weight
        both._moment = self._moment + other._moment
        return both

    def result(self) -> Tensor:
        """The Hessian of the squared output error: [K, K] float32, ``2 / sum(weight) * sum(weight * x x^T)``.

        Raises:
            CalibrationError: no row was added. Quantizing without data would be plain rounding in disguise.
        """
        if self.count == 0:
            raise CalibrationError(
                f"{self.name}: no such rows in the calibration data, so the weight would be rounded blindly; "
                "add samples that reach it (image rows need samples with pictures, text rows need text)"
            )
        return self._moment * (2.0 / self._total_weight)
