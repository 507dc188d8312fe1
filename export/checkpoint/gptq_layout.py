"""The layout in which AutoGPTQ, GPTQModel and Optimum keep a quantized linear layer.

A weight [N, K] is four tensors, here for b bits, G groups of columns and f = 32 / b numbers in a word:

* ``qweight`` int32 [K / f, N]: word (i, n) holds inputs f·i .. f·i + f - 1 of output n, the first in the lowest bits;
* ``qzeros`` int32 [G, N / f]: zero points, packed along the outputs in the same way;
* ``scales`` fp16 [G, N];
* ``g_idx`` int32 [K]: the group of each input; ``i // group_size`` unless inputs were quantized in another order.

The weight is ``(code - zero) * scale``. Version 1 (``checkpoint_format: gptq``, the default) stores the zero points
minus one, version 2 (``gptq_v2``) as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from owl2.export.checkpoint.gptq_format import GptqFormat
from owl2.quant.grid import QuantizedWeight
from owl2.runtime.errors import CheckpointError, QuantizationError

WORD_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class GptqTensors:
    """The tensors of one linear layer; see the head of this module."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Suffix and tensor of each that exists."""
        for field in fields(self):
            if getattr(self, field.name) is not None:
                yield field.name, getattr(self, field.name)

    @staticmethod
    def shapes(rows: int, width: int, form: GptqFormat) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Shape and possible dtypes of each tensor of a weight [rows, width]."""
        groups, packed = form.groups(width), WORD_BITS // form.bits
        return {
            "qweight": ((width // packed, rows), ("int32",)),
            "qzeros": ((groups, -(-rows // packed)), ("int32",)),
            "scales": ((groups, rows), ("float16", "bfloat16", "float32")),
            "g_idx": ((width,), ("int32",)),
        }


def unpack(tensors: GptqTensors, form: GptqFormat, name: str) -> QuantizedWeight:
    """Integers and scales exactly as they are in the file; the shapes are checked already.

    Returns:
        Groups of ``form.block`` consecutive columns; the columns are sorted by group where ``g_idx`` asks for it.
        Zero points are left out where all of them are 2^(bits-1).

    Raises:
        CheckpointError: scales that are not finite, a malformed g_idx, or zero points that contradict the settings.
    """
    codes = unpack_words(tensors.qweight.numpy(), form.bits)
    width, rows = codes.shape
    zeros = _zero_points(tensors.qzeros.numpy(), rows, form, name)
    scales = tensors.scales.float()
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"{name}: scales are NaN or infinite; the file is damaged")
    size = form.group_columns(width)
    columns, groups = _order(tensors.g_idx, width, size, name)
    codes -= np.uint8(2 ** (form.bits - 1))  # wraps to the signed number's bits
    signed = torch.from_numpy(codes.view(np.int8))
    if columns is not None:
        signed = signed[columns]

    def blocks(values: Tensor) -> Tensor:  # [G, N] by group of the file -> [N, G'] by block
        repeats = -(-size // form.block)
        return values[groups].T.repeat_interleave(repeats, dim=1)[:, : -(-width // form.block)].contiguous()

    kept = None if zeros is None else blocks(torch.from_numpy(zeros))
    return QuantizedWeight(signed.T.contiguous(), blocks(scales), form.bits, form.block, kept, columns)


def _zero_points(packed: NDArray[np.int32], rows: int, form: GptqFormat, name: str) -> NDArray[np.int8] | None:
    """Signed zero points [G, N]; None where all are 0."""
    middle, most = 2 ** (form.bits - 1), 2**form.bits - 1
    if form.version == 1:
        stored = unpack_words(packed.T, form.bits)[:rows]
        if int(stored.max()) == most and "gptqmodel" not in form.producer:
            # A zero point of 0 became -1, which other programs wrote over its neighbours.
            raise CheckpointError(
                f"{name}: a zero point does not fit version 1 of the format (checkpoint_format gptq); programs "
                "disagree on what it means. Save the checkpoint as gptq_v2, or quantize with sym true"
            )
        ones = np.uint32(sum(1 << shift for shift in range(0, WORD_BITS, form.bits)))
        packed = (packed.view(np.uint32) + ones).view(np.int32)  # GPTQModel subtracts this from the word
    unsigned = unpack_words(packed.T, form.bits)[:rows].T
    if (unsigned == middle).all():
        return None
    if form.symmetric:
        raise CheckpointError(
            f"{name}: zero points from {unsigned.min()} to {unsigned.max()} in a checkpoint that says sym, where all "
            f"are {middle}; its checkpoint_format (now version {form.version}) or its sym is wrong"
        )
    return np.ascontiguousarray((unsigned.astype(np.int16) - middle).astype(np.int8))


def _order(g_idx: Tensor | None, width: int, size: int, name: str) -> tuple[Tensor | None, Tensor]:
    """Columns and groups in the order in which a bundle stores them; None for columns that stay where they are."""
    sequential = torch.arange(width) // size
    groups = torch.arange(int(sequential[-1]) + 1)
    if g_idx is None or torch.equal(g_idx.long(), sequential):
        return None, groups
    index, expected = g_idx.long(), sequential.bincount()
    inside = bool((index >= 0).all()) and bool((index < len(groups)).all())
    counts = index.bincount(minlength=len(groups)) if inside else None
    if counts is None or not torch.equal(counts, expected):
        found = f"{int(index.min())} to {int(index.max())}" if counts is None else f"with {counts.tolist()} columns"
        raise CheckpointError(
            f"{name}: g_idx is malformed: {width} columns in groups of {size} are {len(groups)} groups with "
            f"{expected.tolist()} columns, got groups {found}"
        )
    starts = index[::size]
    if torch.equal(starts[sequential], index):  # whole groups were swapped
        return None, starts
    return index.argsort(stable=True), groups


def pack(weight: QuantizedWeight, form: GptqFormat) -> GptqTensors:
    """The four tensors of a symmetric weight; :func:`unpack` gives back the same integers and scales.

    Raises:
        QuantizationError: scales that are not positive or that fp16 does not hold, zero points, another order of
            columns, or a shape that does not fill whole words.
    """
    rows, width = weight.codes.shape
    packed = WORD_BITS // weight.bits
    if rows % packed or width % packed:
        raise QuantizationError(f"a weight of {rows}x{width} does not fill words of {packed} numbers in this layout")
    halves = weight.scales.half()
    plain = weight.zero_points is None and weight.columns is None
    if not plain or not torch.equal(halves.float(), weight.scales) or bool((halves <= 0).any()):
        raise QuantizationError(
            "this layout needs symmetric weights whose scales are positive and exact in fp16, and columns in order"
        )
    unsigned = (weight.codes.to(torch.int16) + 2 ** (weight.bits - 1)).to(torch.uint8).numpy()
    zero = 2 ** (weight.bits - 1) - (form.version == 1)
    zeros = np.full((halves.shape[1], rows), zero, dtype=np.uint8)
    return GptqTensors(
        qweight=torch.from_numpy(pack_words(np.ascontiguousarray(unsigned.T), weight.bits)),
        qzeros=torch.from_numpy(np.ascontiguousarray(pack_words(np.ascontiguousarray(zeros.T), weight.bits).T)),
        scales=halves.T.contiguous(),
        g_idx=(torch.arange(width) // weight.group_size).to(torch.int32),
    )


def pack_words(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Put runs of 32 / bits rows into words, the first in the lowest bits: [R, M] -> [R · bits / 32, M]."""
    packed = WORD_BITS // bits
    words = np.zeros((len(values) // packed, values.shape[1]), dtype=np.uint32)
    for place in range(packed):
        words |= values[place::packed].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def unpack_words(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Undo :func:`pack_words`: [R, M] -> [R · 32 / bits, M]."""
    packed, unsigned = WORD_BITS // bits, np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((len(words) * packed, words.shape[1]), dtype=np.uint8)
    for place in range(packed):
        values[place::packed] = (unsigned >> np.uint32(bits * place)) & np.uint32(2**bits - 1)
    return values
