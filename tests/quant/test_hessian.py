import pytest
import torch

from owl2.quant.hessian import HessianAccumulator
from owl2.runtime.errors import CalibrationError


def rows(count, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_batches_add_up_to_the_whole():
    data = rows(50)
    accumulator = HessianAccumulator(6, "test")
    for batch in data.split([1, 0, 20, 29]):
        accumulator.add(batch)
    assert accumulator.count == 50
    torch.testing.assert_close(accumulator.result(), 2 / 50 * data.T @ data)


def test_weight_counts_a_row_several_times():
    text, image = rows(5), rows(9, seed=1)
    weighted = HessianAccumulator(6, "weighted")
    weighted.add(text, weight=3.0)
    weighted.add(image)
    repeated = HessianAccumulator(6, "repeated")
    repeated.add(torch.cat([text, text, text, image]))
    torch.testing.assert_close(weighted.result(), repeated.result())
    assert weighted.count == 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_in_float32_whatever_the_rows_are(dtype):
    data = rows(40).to(dtype)
    accumulator = HessianAccumulator(6, "test")
    accumulator.add(data)
    assert accumulator.result().dtype == torch.float32
    torch.testing.assert_close(accumulator.result(), (2 / 40 * data.double().T @ data.double()).float())


def test_a_result_is_not_changed_by_later_rows():
    accumulator = HessianAccumulator(6, "test")
    accumulator.add(rows(3))
    before = accumulator.result()
    copy = before.clone()
    accumulator.add(rows(4))
    assert torch.equal(before, copy)


@pytest.mark.parametrize("batches", [[], [0], [0, 0]])
def test_no_rows_is_an_error_that_names_them(batches):
    accumulator = HessianAccumulator(6, "layer 3 k_proj, image rows")
    for count in batches:
        accumulator.add(rows(count))
    with pytest.raises(CalibrationError, match="layer 3 k_proj, image rows: no such rows in the calibration data"):
        accumulator.result()


@pytest.mark.parametrize(
    ("bad", "weight", "message"),
    [
        (rows(3, width=5), 1.0, r"layer 0: expected calibration rows of shape \(n, 6\), got \(3, 5\)"),
        (rows(3)[0], 1.0, r"shape \(n, 6\), got \(6,\)"),
        (rows(3), 0.0, "weight of calibration rows must be positive, got 0.0"),
        (rows(3), float("nan"), "must be positive, got nan"),
        (torch.tensor([[1.0] * 6, [float("nan")] * 6]), 1.0, "1 of 2 calibration rows hold NaN or infinite"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(bad, weight, message):
    accumulator = HessianAccumulator(6, "layer 0")
    accumulator.add(rows(4))
    before = accumulator.result()
    with pytest.raises(CalibrationError, match=message):
        accumulator.add(bad, weight=weight)
    assert accumulator.count == 4
    assert torch.equal(accumulator.result(), before)
