"""Coordinate descent on the codes, after GPTQ's single pass.

GPTQ rounds each column once, when later columns are not yet on the grid. Afterwards every code can be chosen
again with all others fixed: the squared error of the layer's output is a convex parabola in it, so its best
value is the clamped nearest code to the parabola's minimum, and no step makes the error larger (Behdin et al.
2023, QuantEase, section 3, started from GPTQ's codes instead of rounded ones).
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl2.quant.grid import QuantizedWeight, round_to_grid


def descend(weight: Tensor, hessian: Tensor, damping: float, quantized: QuantizedWeight, sweeps: int) -> None:
    """Choose every code again, column by column, ``sweeps`` times; the scales stay.

    One sweep takes N·K² multiply-adds, the same as GPTQ itself.

    Args:
        weight: [N, K] in the dtype of ``hessian``.
        hessian: [K, K].
        damping: added to the Hessian's diagonal, absolute. Without it codes would follow the noise of few samples.
        quantized: symmetric; its codes are changed in place.
        sweeps: 0 leaves them as they are.
    """
    size, bits = quantized.group_size, quantized.bits
    scales = quantized.scales.to(weight.dtype)
    error = (weight - quantized.dequantize()).T.contiguous()
    for _ in range(sweeps):
        for number, start in enumerate(range(0, weight.shape[1], size)):
            columns = slice(start, start + size)
            # Computed anew for each group, so that float32 errors do not add up over a sweep.
            slope = hessian[columns] @ error + damping * error[columns]
            block = hessian[columns, columns].clone()
            block.diagonal().add_(damping)
            codes = quantized.codes[:, columns].T.to(weight.dtype).contiguous()
            _descend_group(codes, error[columns], slope, block, scales[:, number], bits)
            quantized.codes[:, columns] = codes.T.to(torch.int8)


def _descend_group(codes: Tensor, error: Tensor, slope: Tensor, block: Tensor, scale: Tensor, bits: int) -> None:
    """One sweep over the g columns of a group, in place.

    Args:
        codes: [g, N].
        error: [g, N], weight minus rounded weight.
        slope: [g, N], half the derivative of the squared error: Hessian times error.
        block: [g, g], the group's own part of the damped Hessian.
        scale: [N].
    """
    for column, curvature in enumerate(block.diagonal().cpu().tolist()):
        if curvature == 0.0:
            continue  # an input that was always zero: any code is as good
        best = round_to_grid(codes[column] * scale + slope[column] / curvature, scale, bits)
        step = (codes[column] - best) * scale
        codes[column] = best
        error[column] += step
        slope.addr_(block[:, column], step)
