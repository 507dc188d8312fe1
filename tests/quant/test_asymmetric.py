"""The corrected weight is the least-squares answer, and rounding it keeps the original output better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from owl2.quant.asymmetric import asymmetric_target
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import gptq


def problem(samples: int = 500, width: int = 48, outputs: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the original model, the same ones after quantization moved them, and a weight."""
    generator = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    original = noise(samples, width) @ noise(width, width) / width**0.5
    # Errors that depend on the input, as those of earlier layers do; independent ones could not be made up for.
    moved = original + 0.2 * original @ noise(width, width) / width**0.5
    return original, moved, noise(outputs, width)


def test_all_the_way_is_the_least_squares_answer() -> None:
    original, moved, weight = problem()
    made = asymmetric_target(weight, moved.T @ moved, (original - moved).T @ moved, 1e-12, share=1.0)
    expected = torch.linalg.lstsq(moved, original @ weight.T).solution.T
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)


def test_a_share_goes_that_part_of_the_way() -> None:
    original, moved, weight = problem()
    moments = moved.T @ moved, (original - moved).T @ moved
    whole, half, none = (asymmetric_target(weight, *moments, 0.01, share) for share in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, (whole + weight) / 2)
    assert torch.equal(none, weight)


def test_inputs_are_left_alone() -> None:
    original, moved, weight = problem()
    hessian, deviation = moved.T @ moved, (original - moved).T @ moved
    before = weight.clone(), hessian.clone(), deviation.clone()
    asymmetric_target(weight, hessian, deviation, 0.01, share=1.0)
    for value, old in zip((weight, hessian, deviation), before):
        assert torch.equal(value, old)


@pytest.mark.parametrize("dead", [[], [3, 17]])
def test_unchanged_inputs_change_nothing(dead: list[int]) -> None:
    _, moved, weight = problem()
    moved[:, dead] = 0.0
    made = asymmetric_target(weight, moved.T @ moved, torch.zeros(48, 48, dtype=torch.float64), 0.01, share=1.0)
    assert torch.equal(made, weight)


def test_rounding_the_target_keeps_the_original_output_better() -> None:
    original, moved, weight = problem()
    hessian, config = moved.T @ moved, QuantConfig(group_size=16)
    target = asymmetric_target(weight, hessian, (original - moved).T @ moved, 0.01, share=1.0)
    wanted = original @ weight.T
    errors = []
    for aimed in (weight, target):
        quantized, _ = gptq(aimed, hessian, config)
        errors.append(float((moved @ quantized.dequantize().T.double() - wanted).pow(2).mean()))
    assert errors[1] < 0.2 * errors[0]
