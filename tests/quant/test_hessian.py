"""Second moments of inputs: sums over batches, joined modalities, and rows that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from owl2.quant.hessian import HessianAccumulator
from owl2.runtime.errors import CalibrationError


def rows(count: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def filled(data: Tensor, original: Tensor | None = None) -> HessianAccumulator:
    accumulator = HessianAccumulator(6, "test")
    accumulator.add(data, data if original is None else original)
    return accumulator


def test_batches_add_up_to_the_whole() -> None:
    data, original = rows(50), rows(50, seed=1)
    accumulator = HessianAccumulator(6, "test")
    sizes = [1, 0, 20, 29]
    for batch, exact in zip(torch.split(data, sizes), torch.split(original, sizes)):
        accumulator.add(batch, exact)
    assert accumulator.count == 50
    torch.testing.assert_close(accumulator.hessian, data.T @ data)
    torch.testing.assert_close(accumulator.deviation, (original - data).T @ data)


def test_joined_rows_count_by_their_weight() -> None:
    text, image, exact = rows(5), rows(9, seed=1), rows(9, seed=2)
    text_moments, image_moments = filled(text), filled(image, exact)
    repeated = filled(torch.cat([text, image, image, image]), torch.cat([text, exact, exact, exact]))
    joined = text_moments.joined(image_moments, 3.0)
    torch.testing.assert_close(joined.hessian, repeated.hessian)
    torch.testing.assert_close(joined.deviation, repeated.deviation)
    assert (text_moments.count, image_moments.count, joined.count) == (5, 9, 14)


def test_joining_with_nothing_is_an_error_that_names_it() -> None:
    text, image = HessianAccumulator(6, "text rows"), HessianAccumulator(6, "image rows")
    text.add(rows(5), rows(5))
    for pair in ((text, image), (image, text)):
        with pytest.raises(CalibrationError, match="image rows: the calibration data has no such rows"):
            pair[0].joined(pair[1], 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_in_float32_whatever_the_rows_are(dtype: torch.dtype) -> None:
    data, original = rows(40).to(dtype), rows(40, seed=1).to(dtype)
    accumulator = filled(data, original)
    wide = data.double()
    assert accumulator.hessian.dtype == accumulator.deviation.dtype == torch.float32
    torch.testing.assert_close(accumulator.hessian, (wide.T @ wide).float())
    torch.testing.assert_close(accumulator.deviation, ((original.double() - wide).T @ wide).float())


@pytest.mark.parametrize("batches", [[], [0], [0, 0]])
def test_no_rows_is_an_error_that_names_them(batches: list[int]) -> None:
    accumulator = HessianAccumulator(6, "layer 3 k_proj, image rows")
    for count in batches:
        accumulator.add(rows(count), rows(count))
    with pytest.raises(CalibrationError, match="layer 3 k_proj, image rows: the calibration data has no such rows"):
        _ = accumulator.hessian


def test_a_released_deviation_is_not_taken_for_one() -> None:
    accumulator = filled(rows(4))
    accumulator.release_deviation()
    assert accumulator.hessian.shape == (6, 6)
    with pytest.raises(RuntimeError, match="released"):
        _ = accumulator.deviation


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (rows(3, width=5), r"layer 0: expected calibration rows of shape \(n, 6\), got \(3, 5\)"),
        (rows(3)[0], r"shape \(n, 6\), got \(6,\)"),
        (torch.tensor([[1.0] * 6, [float("nan")] * 6, [1.0] * 6]), "1 of 3 calibration rows hold NaN or infinite"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_bad_rows_are_refused_and_change_nothing(bad: Tensor, message: str, place: int) -> None:
    accumulator = filled(rows(4))
    accumulator.name = "layer 0"
    before = accumulator.hessian.clone()
    pair = [rows(3), rows(3)]
    pair[place] = bad
    with pytest.raises(CalibrationError, match=message):
        accumulator.add(*pair)
    assert accumulator.count == 4
    assert torch.equal(accumulator.hessian, before)
