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


def test_joined_rows_count_by_their_weight():
    text, image = rows(5), rows(9, seed=1)
    one, other, repeated = (HessianAccumulator(6, name) for name in ("text", "image", "both"))
    one.add(text)
    other.add(image)
    repeated.add(torch.cat([text, image, image, image]))
    torch.testing.assert_close(one.joined(other, 3.0), repeated.result())
    assert (one.count, other.count) == (5, 9)


def test_joining_with_nothing_is_an_error_that_names_it():
    text, image = HessianAccumulator(6, "text rows"), HessianAccumulator(6, "image rows")
    text.add(rows(5))
    for pair in ((text, image), (image, text)):
        with pytest.raises(CalibrationError, match="image rows: no such rows in the calibration data"):
            pair[0].joined(pair[1], 1.0)


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
    ("bad", "message"),
    [
        (rows(3, width=5), r"layer 0: expected calibration rows of shape \(n, 6\), got \(3, 5\)"),
        (rows(3)[0], r"shape \(n, 6\), got \(6,\)"),
        (torch.tensor([[1.0] * 6, [float("nan")] * 6]), "1 of 2 calibration rows hold NaN or infinite"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(bad, message):
    accumulator = HessianAccumulator(6, "layer 0")
    accumulator.add(rows(4))
    before = accumulator.result()
    with pytest.raises(CalibrationError, match=message):
        accumulator.add(bad)
    assert accumulator.count == 4
    assert torch.equal(accumulator.result(), before)
