"""The packed weights of MatMulNBits, against a slow reference and ONNX Runtime itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import reference
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from owl2.export.graph.matmul_nbits import pack, pack_zero_points
from owl2.runtime.errors import ConfigError

GROUP_SIZES = [16, 32, 64, 128, 256]


def random_codes(rows: int, width: int, bits: int, seed: int = 0) -> NDArray[np.int8]:
    levels = 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(-levels, levels, (rows, width)).astype(np.int8)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 100),
)
def test_unpacking_gives_the_codes_back(rows: int, width: int, bits: int, group_size: int, seed: int) -> None:
    codes = random_codes(rows, width, bits, seed)
    packed = pack(codes, bits, group_size)
    blocks = -(-width // group_size)
    assert packed.shape == (rows, blocks, group_size * bits // 8)
    padded = np.pad(codes, ((0, 0), (0, blocks * group_size - width)))
    np.testing.assert_array_equal(reference.unpack_nbits(packed, bits, blocks * group_size), padded)


def test_bytes_of_one_small_matrix() -> None:
    codes = np.array([[*range(-8, 8), 7, -8, 1], [0] * 19], dtype=np.int8)
    assert pack(codes, 4, 16).tobytes().hex(" ", 8) == (
        "1032547698badcfe 0f89888888888888 8888888888888888 8888888888888888"
    )
    assert pack(codes, 8, 16).tobytes().hex(" ", 16) == (
        "78797a7b7c7d7e7f8081828384858687 87788180808080808080808080808080 "
        "80808080808080808080808080808080 80808080808080808080808080808080"
    )


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 5), groups=st.integers(1, 9), bits=st.sampled_from([4, 8]), seed=st.integers(0, 100))
def test_zero_points_come_back(rows: int, groups: int, bits: int, seed: int) -> None:
    zeros = random_codes(rows, groups, bits, seed)
    packed = pack_zero_points(zeros, bits)
    assert packed.shape == (rows, -(-groups * bits // 8))
    np.testing.assert_array_equal(reference.unpack_nbits(packed, bits, groups), zeros)


def test_bytes_of_a_few_zero_points() -> None:
    zeros = np.array([[-8, 7, 0], [1, -1, -8]], dtype=np.int8)
    assert pack_zero_points(zeros, 4).tobytes().hex() == "f008" + "7900"
    assert pack_zero_points(zeros, 8).tobytes().hex() == "788780" + "817f78"


def matmul_session(
    bits: int, group_size: int, width: int, tensors: dict[str, NDArray[np.generic]]
) -> ort.InferenceSession:
    """A graph of one MatMulNBits with float activations; ``tensors`` are its inputs after x."""
    rows = len(tensors["codes"])
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=rows,
        bits=bits,
        block_size=group_size,
        accuracy_level=0,
    )
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", rows])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("width", [40, 96, 176, 512])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_onnx_runtime_reads_the_same_weight(bits: int, group_size: int, width: int, symmetric: bool) -> None:
    rng, codes = np.random.default_rng(width), random_codes(24, width, bits)
    groups = -(-width // group_size)
    # Scales of both signs, as QuantConfig.signed_scales makes them.
    scales = rng.normal(size=(24, groups)).astype(np.float32)
    zeros = np.zeros((24, groups), np.int8) if symmetric else random_codes(24, groups, bits, 1)
    tensors: dict[str, NDArray[np.generic]] = {"codes": pack(codes, bits, group_size), "scales": scales}
    if not symmetric:
        tensors["zeros"] = pack_zero_points(zeros, bits).reshape(-1)
    centred = codes.astype(np.float32) - reference.by_column(zeros, group_size, width)
    weight = centred * reference.by_column(scales, group_size, width)
    session = matmul_session(bits, group_size, width, tensors)
    for rows in (0, 1, 7):
        x = rng.standard_normal((rows, width)).astype(np.float32)
        (y,) = session.run(None, {"x": x})
        expected = x.astype(np.float64) @ weight.T
        assert y.shape == (rows, 24)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4 * np.abs(expected).max(initial=1e-30))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(np.zeros((2, 4), np.int8), 3, 16), "bits 3 is not supported"),
        (lambda: pack(np.zeros((2, 4), np.int8), 4, 24), "group_size 24 is not supported"),
        (lambda: pack(np.zeros((2, 4), np.int8), 4, 8), "group_size 8 is not supported"),
        (lambda: pack(np.full((2, 4), 8, np.int8), 4, 16), "codes run from 8 to 8; 4 bits hold -8 to 7"),
        (lambda: pack_zero_points(np.full((2, 4), -9, np.int8), 4), "zero points run from -9 to -9"),
        (lambda: pack_zero_points(np.zeros((2, 4), np.int8), 3), "bits 3 is not supported"),
        (lambda: pack(np.zeros((2, 4), np.int32), 4, 16), "must be an int8 matrix out x in, got int32"),
    ],
)
def test_values_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
