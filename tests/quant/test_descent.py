"""Coordinate descent on codes: never worse, and equal to the definition written out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from owl2.quant.config import QuantConfig
from owl2.quant.descent import descend
from owl2.quant.gptq import gptq, output_energy
from owl2.quant.grid import QuantizedWeight, rtn


def problem(rows: int, width: int, seed: int = 0, samples: int = 300) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs with a falling spectrum and channels of unequal strength."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.7
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    inputs = (torch.randn(samples, width, generator=generator, dtype=torch.float64) * spectrum) @ mixing
    inputs *= torch.exp(torch.randn(width, generator=generator, dtype=torch.float64))
    return weight, inputs.T @ inputs / samples


def copy(quantized: QuantizedWeight) -> QuantizedWeight:
    return replace(quantized, codes=quantized.codes.clone())


def slow_sweep(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> NDArray[np.float64]:
    """Column by column, the whole error anew for each of the codes that could stand there."""
    levels = 2 ** (quantized.bits - 1)
    codes = quantized.codes.double().numpy()
    scales = quantized.scales.double().repeat_interleave(quantized.group_size, dim=1)[:, : codes.shape[1]].numpy()
    rows, moments = weight.numpy(), hessian.numpy()
    for row, column in itertools.product(range(codes.shape[0]), range(codes.shape[1])):
        errors = []
        for code in range(-levels, levels):
            tried = codes[row].copy()
            tried[column] = code
            difference = rows[row] - tried * scales[row]
            errors.append(difference @ moments @ difference)
        codes[row, column] = np.argmin(errors) - levels
    return codes


@pytest.mark.parametrize(("width", "group_size"), [(16, 16), (40, 16), (50, 32)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_sweep_is_what_trying_every_code_finds(width: int, group_size: int, signed: bool) -> None:
    weight, hessian = problem(3, width)
    start = rtn(weight, QuantConfig(group_size=group_size, method="rtn", signed_scales=signed))
    expected = slow_sweep(weight, hessian, start)
    descend(weight, hessian, 0.0, start, sweeps=1)
    np.testing.assert_array_equal(start.codes.numpy(), expected)


def test_the_damped_error_falls_with_every_sweep_and_comes_to_rest() -> None:
    weight, hessian = problem(16, 96)
    quantized, _ = gptq(weight, hessian, QuantConfig(group_size=32, sweeps=0))
    damping = 0.01 * float(hessian.diagonal().mean())
    damped = hessian + damping * torch.eye(96, dtype=torch.float64)
    errors = [output_energy(weight - quantized.dequantize(), damped)]
    for _ in range(12):
        descend(weight, hessian, damping, quantized, sweeps=1)
        errors.append(output_energy(weight - quantized.dequantize(), damped))
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]
    resting = copy(quantized)
    descend(weight, hessian, damping, quantized, sweeps=100)
    descend(weight, hessian, damping, resting, sweeps=101)
    assert torch.equal(quantized.codes, resting.codes)


def test_sweeps_are_the_same_in_one_call_or_several() -> None:
    weight, hessian = problem(8, 64)
    once = rtn(weight, QuantConfig(group_size=16, method="rtn"))
    twice = copy(once)
    descend(weight, hessian, 0.1, once, sweeps=2)
    descend(weight, hessian, 0.1, twice, sweeps=1)
    descend(weight, hessian, 0.1, twice, sweeps=1)
    assert torch.equal(once.codes, twice.codes)


def test_no_sweep_changes_nothing_and_dead_inputs_keep_their_codes() -> None:
    weight, hessian = problem(8, 64)
    hessian[5], hessian[:, 5] = 0.0, 0.0
    start = rtn(weight, QuantConfig(group_size=32, method="rtn"))
    moved = copy(start)
    descend(weight, hessian, 0.0, moved, sweeps=0)
    assert torch.equal(moved.codes, start.codes)
    descend(weight, hessian, 0.0, moved, sweeps=1)
    assert not torch.equal(moved.codes, start.codes)
    assert torch.equal(moved.codes[:, 5], start.codes[:, 5])


def test_gptq_with_sweeps_beats_gptq_without() -> None:
    weight, hessian = problem(32, 128)
    errors = [gptq(weight, hessian, QuantConfig(group_size=32, sweeps=sweeps))[1].error for sweeps in (0, 1, 4)]
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < errors[1]


def test_float32_moves_as_float64_does() -> None:
    weight, hessian = problem(16, 128)
    start = rtn(weight, QuantConfig(group_size=32, method="rtn"))
    narrow: QuantizedWeight = copy(start)
    descend(weight, hessian, 0.05, start, sweeps=1)
    descend(weight.float(), hessian.float(), 0.05, narrow, sweeps=1)
    assert (start.codes != narrow.codes).float().mean() < 0.002
