"""GPTQ against its definition column by column, and on inputs that are hard for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from torch import Tensor

from owl2.quant.config import QuantConfig
from owl2.quant.gptq import gptq, output_energy
from owl2.quant.grid import rtn
from owl2.runtime.errors import QuantizationError


def problem(rows: int, width: int, samples: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs with a falling spectrum and channels of unequal strength, their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.7
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    inputs = (torch.randn(samples, width, generator=generator, dtype=torch.float64) * spectrum) @ mixing
    inputs *= torch.exp(torch.randn(width, generator=generator, dtype=torch.float64))
    return weight, inputs, 2 / samples * inputs.T @ inputs


def groups_in_order(
    hessian: NDArray[np.float64], group_size: int, act_order: bool
) -> tuple[list[int], list[list[int]]]:
    """Group numbers, and the columns of each group, in the order of rounding."""
    diagonal = np.diag(hessian)
    groups = [
        list(range(start, min(start + group_size, len(diagonal)))) for start in range(0, len(diagonal), group_size)
    ]
    numbers = list(range(len(groups)))
    if act_order:
        numbers.sort(key=lambda number: -np.mean(diagonal[groups[number]]))
        groups = [sorted(group, key=lambda column: -diagonal[column]) for group in groups]
    return numbers, [groups[number] for number in numbers]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "group_size", "options"),
    [
        (3, 16, 16, {}),
        (5, 64, 16, {}),
        (4, 72, 32, {}),
        (4, 100, 128, {}),
        (3, 90, 64, {"bits": 8}),
        (4, 80, 32, {"signed_scales": True}),
        (4, 80, 32, {"clip_search": False}),
        (4, 70, 16, {"damping": 0.1}),
        (1, 1, 16, {}),
    ],
)
def test_by_groups_equals_column_by_column(
    rows: int, width: int, group_size: int, options: dict[str, Any], act_order: bool
) -> None:
    weight, _, hessian = problem(rows, width)
    config = replace(QuantConfig(group_size=group_size, act_order=act_order, sweeps=0), **options)
    numbers, groups = groups_in_order(hessian.numpy(), group_size, act_order)
    codes, scales = reference.gptq_by_columns(
        weight.numpy(),
        hessian.numpy(),
        groups,
        config.bits,
        damping=config.damping,
        clip_search=config.clip_search,
        signed=config.signed_scales,
    )
    quantized, _ = gptq(weight, hessian, config)
    np.testing.assert_array_equal(quantized.codes.numpy(), codes)
    np.testing.assert_allclose(quantized.scales.numpy()[:, numbers], scales, rtol=1e-6)


def test_small_case_by_hand() -> None:
    # Inputs that are always equal: 0.3 is rounded to 0, and the second column takes over what is missing,
    # 0.3 + 0.3 * 1 / (1 + damping) = 0.597, which rounds to 1. The scale is 1 for both.
    weight = torch.tensor([[0.3, 0.3, 7.0]], dtype=torch.float64)
    hessian = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    config = QuantConfig(group_size=16, act_order=False, clip_search=False)
    quantized, report = gptq(weight, hessian, config)
    assert quantized.codes.tolist() == [[0, 1, 7]]
    assert quantized.scales.tolist() == [[1.0]]
    assert report.error == pytest.approx((0.6 - 1) ** 2 / (0.6**2 + 49))
    assert report.rtn_error == pytest.approx(0.6**2 / (0.6**2 + 49))
    assert report.damping == 0.01
    assert report.dead_columns == 0


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("width", [176, 256])
def test_beats_rounding_on_correlated_inputs(width: int, group_size: int) -> None:
    weight, inputs, hessian = problem(64, width)
    quantized, report = gptq(weight, hessian, QuantConfig(group_size=group_size))
    measured = reference.output_error(weight.numpy(), quantized.dequantize().numpy(), inputs.numpy())
    assert report.error == pytest.approx(measured, rel=1e-9)
    assert report.error < 0.6 * report.rtn_error


def test_activation_order_helps_where_inputs_differ_in_strength() -> None:
    weight, _, hessian = problem(64, 256)
    by_order, natural = (
        gptq(weight, hessian, QuantConfig(group_size=32, act_order=order))[1].error for order in (True, False)
    )
    assert by_order < 0.95 * natural


@pytest.mark.parametrize("act_order", [False, True])
def test_independent_equal_inputs_give_plain_rounding(act_order: bool) -> None:
    weight, _, _ = problem(8, 100)
    config = QuantConfig(group_size=32, act_order=act_order)
    quantized, report = gptq(weight, torch.eye(100, dtype=torch.float64), config)
    expected = rtn(weight, config)
    assert torch.equal(quantized.codes, expected.codes)
    assert torch.equal(quantized.scales, expected.scales)
    assert report.error == report.rtn_error


@pytest.mark.parametrize("factor", [2.0**-20, 3.7, 1e6])
def test_the_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, _, hessian = problem(8, 96)
    once, report = gptq(weight, hessian, QuantConfig(group_size=32))
    scaled, scaled_report = gptq(weight, hessian * factor, QuantConfig(group_size=32))
    assert torch.equal(once.codes, scaled.codes)
    assert torch.equal(once.scales, scaled.scales)
    assert report.error == pytest.approx(scaled_report.error)


def test_float32_is_as_good_as_float64() -> None:
    weight, _, hessian = problem(32, 256)
    narrow, narrow_report = gptq(weight.float(), hessian.float(), QuantConfig(group_size=32))
    _, report = gptq(weight, hessian, QuantConfig(group_size=32))
    assert narrow_report.error == pytest.approx(report.error, rel=0.02)
    exact = output_energy(weight - narrow.dequantize(), hessian) / output_energy(weight, hessian)
    assert exact == pytest.approx(narrow_report.error, rel=1e-4)


def test_fewer_samples_than_columns() -> None:
    weight, _, hessian = problem(8, 128, samples=20)
    _, report = gptq(weight.float(), hessian.float(), QuantConfig(group_size=32))
    assert report.damping == 0.01
    assert report.error < 0.5 * report.rtn_error


def test_dead_columns_are_rounded_and_counted() -> None:
    weight, _, hessian = problem(8, 96)
    dead = [0, 5, 40, 95]
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    quantized, report = gptq(weight, hessian, QuantConfig(group_size=32))
    assert report.dead_columns == 4
    assert report.error < report.rtn_error
    scales = quantized.scales.repeat_interleave(32, dim=1)[:, dead]
    nearest = (weight[:, dead] / scales).round().clamp(-8, 7)
    assert torch.equal(quantized.codes[:, dead].double(), nearest)


def test_damping_is_raised_until_the_hessian_is_definite() -> None:
    weight = torch.tensor([[0.3, 0.5]])
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    assert gptq(weight, hessian, QuantConfig())[1].damping == pytest.approx(0.1)


def test_inputs_are_left_alone() -> None:
    weight, _, hessian = problem(4, 40)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, QuantConfig(group_size=16))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_a_weight_of_zeros() -> None:
    quantized, report = gptq(torch.zeros(2, 20), torch.eye(20), QuantConfig(group_size=16))
    assert not quantized.codes.any()
    assert report.error == 0.0


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.tensor([[1.0, 3.0], [3.0, 1.0]]), "not positive definite even with damping 1"),
        (torch.zeros(2, 2), "the Hessian is zero"),
        (torch.eye(3), r"needs a float32 or float64 Hessian of shape \(2, 2\), got \(3, 3\)"),
        (torch.eye(2, dtype=torch.float16), r"got \(2, 2\) torch.float16"),
        (torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]), "1 values of the Hessian are NaN"),
        (torch.diag(torch.tensor([1.0, -1.0])), "negative values on its diagonal"),
    ],
)
def test_bad_hessians_are_refused(hessian: Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        gptq(torch.ones(3, 2), hessian, QuantConfig())


def test_a_weight_with_nan_is_refused() -> None:
    with pytest.raises(QuantizationError, match="1 of the weight's 6 values are NaN"):
        gptq(torch.tensor([[1.0, float("nan")]] + [[1.0, 1.0]] * 2), torch.eye(2), QuantConfig())
