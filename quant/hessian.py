"""The second moments of a linear layer's inputs, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from owl2.runtime.errors import CalibrationError


class HessianAccumulator:
    """Sums ``x x^T`` over the input rows x of one layer (GPTQ, Frantar et al. 2022, section 3).

    In addition the sum of ``d x^T``, where d is the row as the original model has it, minus x: the change made by
    quantizing the layers before. Both are plain sums, since any positive multiple serves as well.

    Memory: two [K, K] float32 matrices, whose rounding stays far below the damping that GPTQ adds.

    Args:
        width: K, the layer's input features.
        name: of the rows, for messages: ``layer 3 k_proj, image rows``.
        device: of the matrices and of the rows to add.
    """

    def __init__(self, width: int, name: str, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.name = name
        self.count = 0
        self._moment = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._deviation: Tensor | None = torch.zeros(width, width, dtype=torch.float32, device=device)

    def add(self, rows: Tensor, original: Tensor) -> None:
        """Add rows [n, K] float and the same rows in the original model, [n, K]; n may be 0.

        Raises:
            CalibrationError: the wrong shape, or values that are not finite.
        """
        for given in (rows, original):
            if given.ndim != 2 or given.shape[1] != self.width:
                raise CalibrationError(
                    f"{self.name}: expected calibration rows of shape (n, {self.width}), got {tuple(given.shape)}"
                )
            bad = int((~torch.isfinite(given)).any(dim=1).sum())
            if bad:
                raise CalibrationError(
                    f"{self.name}: {bad} of {given.shape[0]} calibration rows hold NaN or infinite values; run "
                    "the calibration in float32 or look for a damaged checkpoint"
                )
        rows = rows.float()
        self._moment.addmm_(rows.T, rows)
        self.deviation.addmm_((original.float() - rows).T, rows)
        self.count += rows.shape[0]

    @property
    def hessian(self) -> Tensor:
        """Sum of ``x x^T``: [K, K] float32.

        Raises:
            CalibrationError: no row was added. Quantizing without data would be plain rounding in disguise.
        """
        if self.count == 0:
            raise CalibrationError(
                f"{self.name}: the calibration data has no such rows, so the weight would be rounded blindly; "
                "add samples that reach it (image rows need samples with images, text rows need text)"
            )
        return self._moment

    @property
    def deviation(self) -> Tensor:
        """Sum of ``d x^T``: [K, K] float32; not available after :meth:`release_deviation`."""
        if self._deviation is None:
            raise RuntimeError(f"{self.name}: the deviation was released")
        return self._deviation

    def joined(self, other: HessianAccumulator, weight: float) -> HessianAccumulator:
        """A new accumulator that has seen the rows of both, each of ``other`` counting ``weight`` times."""
        both = HessianAccumulator(self.width, f"{self.name} and {other.name}", self._moment.device)
        both.count = self.count + other.count
        torch.add(self.hessian, other.hessian, alpha=weight, out=both._moment)
        torch.add(self.deviation, other.deviation, alpha=weight, out=both.deviation)
        return both

    def release_deviation(self) -> None:
        """Free the memory of :attr:`deviation`, which is not available any more."""
        self._deviation = None
