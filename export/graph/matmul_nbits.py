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
        ConfigError: bits are not 4 or 8, the group size is not a power of two from 16, the codes are not an int8
            matrix or do not fit in ``bits``.
    """
    require(
        group_size >= 16 and group_size & (group_size - 1) == 0,
        f"group_size {group_size} is not supported; use a power of two from 16",
    )
    unsigned = _unsigned(codes, bits, "codes")
    rows, width = codes.shape
    blocks = -(-width // group_size)
    padding = ((0, 0), (0, blocks * group_size - width))
    packed = _packed(np.pad(unsigned, padding, constant_values=2 ** (bits - 1)), bits)
    return packed.reshape(rows, blocks, group_size * bits // 8)


def pack_zero_points(zero_points: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack signed zero points: [N, G] int8 -> [N, ceil(G * bits / 8)] uint8; raises as :func:`pack`."""
    unsigned = _unsigned(zero_points, bits, "zero points")
    return _packed(np.pad(unsigned, ((0, 0), (0, unsigned.shape[1] % 2 if bits == 4 else 0))), bits)


def _unsigned(values: NDArray[np.int8], bits: int, name: str) -> NDArray[np.uint8]:
    """Check signed numbers and move them to 0 .. 2^bits-1."""
    require(bits in (4, 8), f"bits {bits} is not supported; use 4 or 8")
    require(
        values.ndim == 2 and values.dtype == np.int8,
        f"{name} to pack must be an int8 matrix out x in, got {values.dtype} of shape {values.shape}",
    )
    offset = 2 ** (bits - 1)
    if values.size:
        low, high = int(values.min()), int(values.max())
        require(
            -offset <= low and high < offset,
            f"{name} run from {low} to {high}; {bits} bits hold {-offset} to {offset - 1}",
        )
    unsigned: NDArray[np.uint8] = (values.astype(np.int16) + offset).astype(np.uint8)
    return unsigned


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[N, M] numbers of 4 bits, M even -> [N, M / 2] bytes; 8 bits stay as they are."""
    if bits == 8:
        return values
    packed: NDArray[np.uint8] = values[:, 0::2] | np.left_shift(values[:, 1::2], 4, dtype=np.uint8)
    return packed
