"""The second moment of a linear layer's inputs, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from owl2.runtime.errors import CalibrationError


class HessianAccumulator:
    """Sums ``x x^T`` over the input rows x of one layer (GPTQ, Frantar et al. 2022, section 3).

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
        self._moment = torch.zeros(width, width, dtype=torch.float32, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows: [n, K] float; n may be 0.

        Raises:
            CalibrationError: the wrong shape, or values that are not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise CalibrationError(
                f"{self.name}: expected calibration rows of shape (n, {self.width}), got {tuple(rows.shape)}"
            )
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        if bad:
            raise CalibrationError(
                f"{self.name}: {bad} of {rows.shape[0]} calibration rows hold NaN or infinite values; run "
                "the calibration in float32 or look for a damaged checkpoint"
            )
        rows = rows.float()
        self._moment.addmm_(rows.T, rows)
        self.count += rows.shape[0]

    def result(self) -> Tensor:
        """The Hessian of the squared output error: [K, K] float32, ``2 / n * sum(x x^T)``.

        Raises:
            CalibrationError: no row was added. Quantizing without data would be plain rounding in disguise.
        """
        self._require_rows()
        return self._moment * (2.0 / self.count)

    def joined(self, other: HessianAccumulator, weight: float) -> Tensor:
        """The Hessian of the rows of both, each of ``other`` counting ``weight`` times: [K, K] float32.

        Raises:
            CalibrationError: one of the two has seen no row.
        """
        self._require_rows()
        other._require_rows()
        both = torch.add(self._moment, other._moment, alpha=weight)
        return both.mul_(2.0 / (self.count + weight * other.count))

    def _require_rows(self) -> None:
        if self.count == 0:
            raise CalibrationError(
                f"{self.name}: no such rows in the calibration data, so the weight would be rounded blindly; "
                "add samples that reach it (image rows need samples with pictures, text rows need text)"
            )
