"""The integer grid: scales, rounding to nearest, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from owl2.quant.config import QuantConfig
from owl2.quant.grid import QuantizedWeight, compute_scales, rtn
from owl2.runtime.errors import QuantizationError


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def squared_error(weight: Tensor, config: QuantConfig) -> float:
    return float((weight - rtn(weight, config).dequantize()).square().sum())


def test_small_case_by_hand() -> None:
    weight = torch.tensor([[0.7, -0.34, 0.1, 0.04] + [0.0] * 12])
    quantized = rtn(weight, QuantConfig(group_size=16, clip_search=False))
    assert quantized.scales.tolist() == [[pytest.approx(0.1)]]
    assert quantized.codes.tolist() == [[7, -3, 1, 0] + [0] * 12]


def test_signed_scale_puts_the_largest_weight_on_the_extra_code() -> None:
    weight = torch.tensor([[0.8, -0.3] + [0.0] * 14, [-0.8, 0.3] + [0.0] * 14])
    quantized = rtn(weight, QuantConfig(group_size=16, clip_search=False, signed_scales=True))
    assert quantized.codes[:, :2].tolist() == [[-8, 3], [-8, 3]]
    torch.testing.assert_close(quantized.scales, torch.tensor([[-0.1], [0.1]]))
    torch.testing.assert_close(quantized.dequantize(), weight)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_equal_the_reference(bits: int, clip_search: bool, signed: bool) -> None:
    group = normal(5, 32).double()
    importance = normal(1, 32, seed=1).double().square()[0]
    config = QuantConfig(bits=bits, group_size=32, clip_search=clip_search, signed_scales=signed)
    expected = [reference.search_scale(row, importance.numpy(), bits, clip_search, signed) for row in group.numpy()]
    assert compute_scales(group, config, importance).tolist() == expected


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("width", [40, 64, 96, 176, 512])
def test_any_width_in_any_group_size(width: int, group_size: int) -> None:
    quantized = rtn(normal(3, width), QuantConfig(group_size=group_size))
    assert quantized.codes.shape == (3, width)
    assert quantized.scales.shape == (3, -(-width // group_size))
    assert quantized.dequantize().dtype == torch.float32


def test_a_short_last_group_is_rounded_as_if_alone() -> None:
    weight, config = normal(4, 176), QuantConfig(group_size=128)
    tail = rtn(weight[:, 128:], config)
    whole = rtn(weight, config)
    assert torch.equal(whole.codes[:, 128:], tail.codes)
    assert torch.equal(whole.scales[:, 1:], tail.scales)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 8]),
    magnitude=st.floats(-30, 30),
    width=st.integers(1, 70),
)
def test_without_clipping_the_error_is_at_most_half_a_step(seed: int, bits: int, magnitude: float, width: int) -> None:
    weight = normal(3, width, seed) * 10**magnitude
    quantized = rtn(weight, QuantConfig(bits=bits, group_size=32, clip_search=False))
    step = quantized.scales.repeat_interleave(32, dim=1)[:, :width]
    assert bool(((weight - quantized.dequantize()).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("group_size", [32, 128])
def test_clip_search_and_signed_scales_each_lower_the_error(group_size: int) -> None:
    weight = normal(64, 512)
    plain, clipped, both = (
        squared_error(weight, QuantConfig(group_size=group_size, clip_search=clip, signed_scales=signed))
        for clip, signed in [(False, False), (True, False), (True, True)]
    )
    assert clipped < 0.85 * plain
    assert both < 0.95 * clipped


def test_importance_draws_the_error_away_from_heavy_columns() -> None:
    weight, config = normal(32, 128), QuantConfig()
    importance = torch.ones(128)
    importance[:8] = 100.0
    plain, weighted = rtn(weight, config), rtn(weight, config, importance)
    errors = [((weight - q.dequantize()).square() @ importance).sum() for q in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


def test_zero_and_vanishing_groups() -> None:
    weight = torch.zeros(3, 64)
    weight[1, 40] = 1e-42
    weight[2, :32] = normal(1, 32)
    quantized = rtn(weight, QuantConfig(group_size=32))
    assert quantized.scales[:2].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert not quantized.codes[:2].any()
    assert bool(torch.isfinite(quantized.dequantize()).all())


def test_weights_too_large_to_square() -> None:
    quantized = rtn(torch.tensor([[3e38, -1e38] * 8]), QuantConfig(group_size=16))
    assert quantized.codes[0, :2].tolist() == [7, -2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_narrow_and_wide_floats_are_exact_in_float32(dtype: torch.dtype) -> None:
    weight = normal(4, 64).to(torch.bfloat16).to(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    wide, same = rtn(weight.float(), QuantConfig()), rtn(weight.to(dtype), QuantConfig())
    assert torch.equal(wide.codes, same.codes)
    torch.testing.assert_close(wide.scales, same.scales)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]]),
            "2 of the weight's 4 values are NaN or inf",
        ),
        (torch.zeros(3), r"must be a matrix out x in, got shape \(3,\)"),
        (torch.zeros(0, 4), r"must be a matrix out x in, got shape \(0, 4\)"),
    ],
)
def test_bad_weights_are_refused(bad: Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        rtn(bad, QuantConfig())


def test_parts_that_do_not_fit_are_refused() -> None:
    codes = torch.zeros(2, 40, dtype=torch.int8)
    with pytest.raises(QuantizationError, match=r"need scales of shape \(2, 3\), got \(2, 2\)"):
        QuantizedWeight(codes, torch.ones(2, 2), 4, 16)
    with pytest.raises(QuantizationError, match="codes must be int8 and scales float32"):
        QuantizedWeight(codes, torch.ones(2, 3, dtype=torch.float64), 4, 16)


def test_dequantize_multiplies_each_group_by_its_scale() -> None:
    codes = torch.arange(-3, 3, dtype=torch.int8).repeat(1, 3)
    weight = QuantizedWeight(codes, torch.tensor([[0.5, -2.0]]), 4, 16).dequantize()
    expected = codes.numpy()[0] * np.where(np.arange(18) < 16, 0.5, -2.0)
    np.testing.assert_array_equal(weight.numpy()[0], expected)
