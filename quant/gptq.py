"""GPTQ: round a weight column by column, and let later columns make up for the error of earlier ones.

Frantar et al. 2022, section 3, in the form of an LDL decomposition, which gives the same codes (Chee et al.
2023, QuIP). With ``H = U D U^T``, U unit upper triangular, column k is rounded as

    q_k = round(w_k + sum_{i<k} (w_i - q_i) U_ik)

which needs one Cholesky decomposition and no inverse, and the error of the layer's output is then
``sum_k D_k (rounding error of column k)^2``.

Activation order goes by groups: groups with strong inputs first, strong columns first inside each. A group
then stays a run of columns in the file, and the run time needs no index from column to group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from owl2.quant.config import QuantConfig
from owl2.quant.descent import descend
from owl2.quant.grid import QuantizedWeight, check_weight, compute_scales, round_to_grid, rtn
from owl2.runtime.errors import QuantizationError

MAX_SAMPLED_ROWS = 1024


@dataclass(frozen=True, slots=True)
class GptqReport:
    """Error of quantizing one weight.

    Attributes:
        error: squared error of the layer's output over its energy, as :func:`relative_error` of sampled rows.
        rtn_error: the same for rounding to nearest with the same scale search.
        damping: fraction of the mean of H's diagonal that was added; above the configured one after retries.
        dead_columns: inputs that were always zero during calibration; these are rounded to nearest.
    """

    error: float
    rtn_error: float
    damping: float
    dead_columns: int


def gptq(weight: Tensor, hessian: Tensor, config: QuantConfig) -> tuple[QuantizedWeight, GptqReport]:
    """Quantize a weight for inputs with the given second moment.

    Computes in the Hessian's dtype. float32 is meant for real layers: the damping (1 % of the mean) is far
    above its rounding even at K = 11008, and it halves time and memory (three [K, K] matrices in addition to
    the Hessian).

    Args:
        weight: [N, K] float of any width.
        hessian: [K, K] float32 or float64, symmetric; any positive multiple gives the same codes.

    Returns:
        Codes and scales in the original order of columns, and their error.

    Raises:
        QuantizationError: NaN or infinite values, shapes that do not fit, a Hessian that is zero, has a
            negative diagonal, or stays indefinite with damping up to 1.
    """
    check_weight(weight)
    _check_hessian(weight, hessian)
    weight = weight.to(hessian.dtype)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    groups = _processing_order(diagonal, config)
    columns = torch.cat([group for _, group in groups])
    feedback, pivots, damping = _factorize(hessian, dead, columns, config.damping)

    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], len(groups), dtype=torch.float32, device=weight.device)
    error = torch.zeros_like(weight.T, memory_format=torch.contiguous_format)
    start = 0
    for number, group in groups:
        stop = start + len(group)
        original = weight[:, group].T.contiguous()
        carried = feedback[:start, start:stop].T @ error[:start]
        within = feedback[start:stop, start:stop]
        scale = _group_scales(original, carried, within, pivots[start:stop], config)
        group_codes, error[start:stop] = _round_group(original, carried, within, scale, config.bits)
        codes[:, group] = group_codes.T
        scales[:, number] = scale.float()
        start = stop

    quantized = QuantizedWeight(codes, scales, config.bits, config.group_size)
    mean = diagonal[~dead].mean()
    descend(weight, hessian, float(damping * mean), quantized, config.sweeps)
    sampled = sampled_rows(weight)
    baseline = rtn(weight[sampled], config, torch.where(dead, mean, diagonal))
    report = GptqReport(
        error=relative_error(weight[sampled], quantized.dequantize()[sampled], hessian),
        rtn_error=relative_error(weight[sampled], baseline.dequantize(), hessian),
        damping=damping,
        dead_columns=int(dead.sum()),
    )
    return quantized, report


def sampled_rows(weight: Tensor) -> slice:
    """Output rows that represent all of them in a report: evenly spread, at most 1024, since an energy costs N·K²."""
    return slice(None, None, -(-len(weight) // MAX_SAMPLED_ROWS))


def relative_error(weight: Tensor, stored: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's output over its energy, tr(dW H dW^T) / tr(W H W^T); 0 for a weight of zeros."""
    return output_energy(weight - stored, hessian) / (output_energy(weight, hessian) or 1.0)


def output_energy(weight: Tensor, hessian: Tensor) -> float:
    """Twice the mean squared output, summed over rows: tr(W H W^T), for W [N, K] in the dtype of H."""
    return float(((weight @ hessian) * weight).sum(dtype=torch.float64))


def _check_hessian(weight: Tensor, hessian: Tensor) -> None:
    width = weight.shape[1]
    if hessian.shape != (width, width) or hessian.dtype not in (torch.float32, torch.float64):
        raise QuantizationError(
            f"a weight of shape {tuple(weight.shape)} needs a float32 or float64 Hessian of shape "
            f"({width}, {width}), got {tuple(hessian.shape)} {hessian.dtype}"
        )
    bad = int((~torch.isfinite(hessian)).sum())
    if bad:
        raise QuantizationError(f"{bad} values of the Hessian are NaN or infinite; check the calibration inputs")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise QuantizationError("the Hessian has negative values on its diagonal; it is not a sum of x x^T")
    if not bool(diagonal.any()):
        raise QuantizationError(
            "the Hessian is zero: every calibration input of this layer was zero, so it would be rounded "
            "blindly; use other calibration data, or method rtn on purpose"
        )


def _processing_order(diagonal: Tensor, config: QuantConfig) -> list[tuple[int, Tensor]]:
    """Number and column indices of each group, in the order of quantizing."""
    columns = torch.arange(len(diagonal), device=diagonal.device)
    groups = list(enumerate(torch.split(columns, config.group_size)))
    if not config.act_order:
        return groups
    strengths = [float(diagonal[group].mean()) for _, group in groups]
    return [
        (number, group[diagonal[group].argsort(descending=True, stable=True)])
        for number, group in sorted(groups, key=lambda item: -strengths[item[0]])
    ]


def _factorize(hessian: Tensor, dead: Tensor, columns: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """Decompose the damped Hessian, rows and columns taken in the order of ``columns``.

    An upper factor is the lower factor of the matrix read backwards.

    Returns:
        U [K, K] and the diagonal of D [K] (see the head of this module), and the damping that was needed.
    """
    backwards = columns.flip(0)
    matrix = hessian[backwards][:, backwards]
    diagonal = matrix.diagonal()
    undamped = torch.where(dead[backwards], diagonal[~dead[backwards]].mean(), diagonal)
    lower, damping = damped_cholesky(matrix, undamped, damping)
    del matrix, diagonal  # half a GB at a width of 11008
    upper = lower.flip(0, 1)
    del lower
    root = upper.diagonal().clone()
    return upper.div_(root), root.square(), damping


def damped_cholesky(matrix: Tensor, diagonal: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor [K, K] of a matrix with a damped diagonal, and the damping that was needed.

    Args:
        matrix: [K, K], overwritten.
        diagonal: [K], its diagonal before damping.
        damping: fraction of the mean of the positive part of ``diagonal``; raised tenfold until it suffices.

    Raises:
        QuantizationError: 1 does not suffice.
    """
    undamped, mean = diagonal.clone(), diagonal[diagonal > 0].mean()
    while damping <= 1.0:
        matrix.diagonal().copy_(undamped + damping * mean)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return lower, damping
        damping *= 10.0
    raise QuantizationError(
        "the Hessian is not positive definite even with damping 1; it is not a sum of x x^T, or its rows were "
        "summed with too little precision"
    )


def _group_scales(original: Tensor, carried: Tensor, within: Tensor, pivots: Tensor, config: QuantConfig) -> Tensor:
    """Scales [N] of one group, from its weights as the groups before it would have them.

    Args:
        original: [g, N], the group's weights.
        carried: [g, N], the sum over earlier columns.
        within: [g, g], the group's own part of the feedback.
        pivots: [g], the exact weight of each column's squared rounding error.
    """
    # Column k gets the sum over earlier columns on top of the corrections from its own group; the inverse
    # takes those into account before they are known, as if nothing in the group were rounded.
    ideal = original + torch.linalg.solve_triangular(within.T, carried, upper=False, unitriangular=True)
    return compute_scales(ideal.T.contiguous(), config, pivots)


def _round_group(original: Tensor, carried: Tensor, within: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round the columns of one group in turn: codes [g, N] int8, and weight minus rounded weight [g, N]."""
    codes = torch.empty(original.shape, dtype=torch.int8, device=original.device)
    error = torch.empty_like(original)
    for column in range(len(original)):
        target = original[column] + carried[column] + within[:column, column] @ error[:column]
        rounded = round_to_grid(target, scale, bits)
        codes[column] = rounded.to(torch.int8)
        error[column] = original[column] - rounded * scale
    return codes, error
