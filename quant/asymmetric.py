"""Asymmetric calibration: aim at what the layer computed before anything was quantized.

Quantizing the layers before has moved a layer's inputs from x to x'. GPTQ preserves ``W x'``; the original model
computes ``W x``. The weight that gets closest to it in the least-squares sense is ``W + W D H^-1`` with
``D = sum (x - x') x'^T`` and ``H = sum x' x'^T``; rounding this weight for the inputs x' minimizes ``|W x - Q x'|^2``
(the objective of Li et al. 2025, GPTAQ, section 3, here solved before rounding instead of inside it). The whole
correction follows the noise of the calibration data; a part of it is better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl2.quant.gptq import damped_cholesky


def asymmetric_target(weight: Tensor, hessian: Tensor, deviation: Tensor, damping: float, share: float) -> Tensor:
    """Move a weight by ``share`` (0 to 1) of the way to the one that makes up for changed inputs: -> [N, K].

    Args:
        weight: [N, K] in the dtype of ``hessian``.
        hessian: [K, K], the module's H.
        deviation: [K, K], its D; both with the same weights of rows.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
    """
    if share == 0.0:
        return weight
    lower, _ = damped_cholesky(hessian.clone(), hessian.diagonal(), damping)
    correction = torch.cholesky_solve((weight @ deviation).T, lower).T
    return weight + share * correction
