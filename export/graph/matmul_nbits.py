"""The packed weights of ONNX Runtime's ``com.microsoft.MatMulNBits``, 4 and 8 bits.

A weight is [N, K], output by input features. Its codes are signed, -2^(bits-1) .. 2^(bits-1)-1, and stand for
``code * scale``. Packed:

* every row is cut into G = ceil(K / group_size) blocks; the last one is filled with zeros;
* a code is stored as the unsigned number ``code + 2^(bits-1)``; 8 or 128 is the operator's default zero
  point, so none is stored;
* with 4 bits, two neighbours share a byte, **the first in the low half**;
* zero points other than that default are stored in the same way, one per block, each row filled to whole bytes:
  uint8 [N, ceil(G * bits / 8)]; the code then stands for ``(code - zero point) * scale``;
* the result is uint8 [N, G, group_size * bits / 8]; the scales are float32 [N, G].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.config import require


def pack(codes: NDArray[np.int8], bits: int, group_size: int) -> NDArray[np.uint8]:
    """Pack signed codes: [N, K] int8 -> [N, G, group_size * bits / 8] uint8.

    Raises:
        ConfigError: bits are not 4 or 8, the group size is no power of two from 16, the codes are no int8
            matrix or do not fit in ``bits``.
    """
    _check_layout(bits, group_size)
    _check_codes(codes, bits, "codes")
    offset = 2 ** (bits - 1)
    rows, width = codes.shape
    blocks = -(-width // group_size)
    padded: NDArray[np.uint8] = np.full((rows, blocks * group_size), offset, dtype=np.uint8)
    padded[:, :width] = codes.astype(np.int16) + offset
    stored = padded.reshape(rows, blocks, group_size)
    if bits == 8:
        return stored
    packed: NDArray[np.uint8] = stored[:, :, 0::2] | np.left_shift(stored[:, :, 1::2], 4, dtype=np.uint8)
    return packed


def pack_zero_points(zero_points: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack signed zero points: [N, G] int8 -> [N, ceil(G * bits / 8)] uint8.

    Raises:
        ConfigError: bits are not 4 or 8, the zero points are no int8 matrix or do not fit in ``bits``.
    """
    _check_bits(bits)
    _check_codes(zero_points, bits, "zero points")
    stored = (zero_points.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        return np.asarray(stored, dtype=np.uint8)
    even = np.pad(stored, ((0, 0), (0, stored.shape[1] % 2)))
    packed: NDArray[np.uint8] = even[:, 0::2] | np.left_shift(even[:, 1::2], 4, dtype=np.uint8)
    return packed


def unpack_zero_points(packed: NDArray[np.uint8], bits: int, groups: int) -> NDArray[np.int8]:
    """Undo :func:`pack_zero_points`: [N, ceil(G * bits / 8)] uint8 -> [N, groups] int8.

    Raises:
        ConfigError: bits are not supported, or the packed shape is not for ``groups``.
    """
    _check_bits(bits)
    expected = -(-groups * bits // 8)
    require(
        packed.ndim == 2 and packed.shape[1] == expected and packed.dtype == np.uint8,
        f"{groups} zero points of {bits} bits are packed as uint8 (N, {expected}), got {packed.dtype} of shape "
        f"{packed.shape}",
    )
    halves = np.stack([packed & 0xF, packed >> 4], axis=-1)
    stored = packed if bits == 8 else halves.reshape(len(packed), 2 * expected)
    zero_points: NDArray[np.int8] = (stored[:, :groups].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return zero_points


def unpack(packed: NDArray[np.uint8], bits: int, group_size: int, width: int) -> NDArray[np.int8]:
    """Undo :func:`pack`: [N, G, group_size * bits / 8] uint8 -> [N, width] int8.

    Raises:
        ConfigError: bits or group size are not supported, or the packed shape is not for ``width`` columns.
    """
    _check_layout(bits, group_size)
    expected = (-(-width // group_size), group_size * bits // 8)
    require(
        packed.ndim == 3 and packed.shape[1:] == expected and packed.dtype == np.uint8,
        f"{width} columns of {bits} bits in groups of {group_size} are packed as uint8 (N, {expected[0]}, "
        f"{expected[1]}), got {packed.dtype} of shape {packed.shape}",
    )
    stored = packed if bits == 8 else np.stack([packed & 0xF, packed >> 4], axis=-1)
    padded = stored.reshape(packed.shape[0], packed.shape[1] * group_size)
    codes: NDArray[np.int8] = (padded[:, :width].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return codes


def dequantize(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    bits: int,
    group_size: int,
    width: int,
    zero_points: NDArray[np.uint8] | None = None,
) -> NDArray[np.float32]:
    """The weight that packed codes, scales [N, G] and packed zero points stand for: [N, width] float32.

    Raises:
        ConfigError: as :func:`unpack`, or the scales do not fit the packed codes.
    """
    codes = unpack(packed, bits, group_size, width)
    require(
        scales.shape == packed.shape[:2] and scales.dtype == np.float32,
        f"packed codes of shape {packed.shape} need float32 scales of shape {packed.shape[:2]}, got "
        f"{scales.dtype} of shape {scales.shape}",
    )
    by_column = np.repeat(scales, group_size, axis=1)[:, :width]
    if zero_points is None:
        return codes * by_column
    zeros = np.repeat(unpack_zero_points(zero_points, bits, scales.shape[1]), group_size, axis=1)[:, :width]
    weight: NDArray[np.float32] = (codes.astype(np.float32) - zeros) * by_column
    return weight


def _check_codes(codes: NDArray[np.int8], bits: int, name: str) -> None:
    require(
        codes.ndim == 2 and codes.dtype == np.int8,
        f"{name} to pack must be an int8 matrix out x in, got {codes.dtype} of shape {codes.shape}",
    )
    offset = 2 ** (bits - 1)
    if codes.size:
        least, most = int(codes.min()), int(codes.max())
        require(
            -offset <= least and most < offset,
            f"{name} run from {least} to {most}; {bits} bits hold {-offset} to {offset - 1}",
        )


def _check_bits(bits: int) -> None:
    require(bits in (4, 8), f"bits {bits} is not supported; use 4 or 8")


def _check_layout(bits: int, group_size: int) -> None:
    _check_bits(bits)
    require(
        group_size >= 16 and group_size & (group_size - 1) == 0,
        f"group_size {group_size} is not supported; use a power of two from 16",
    )
