"""Scales of an int8 K/V cache: one per channel of every head, for keys and for values.

They are static, taken on rows of both modalities, since ONNX Runtime's attention takes one scale per channel for all
positions. Keys have outlier channels that stay the same over the positions (KIVI, Liu et al. 2024, section 3), which
is what a scale per channel follows. A key's two channels of one rotary pair share the largest length of the pair:
rotation moves magnitude from one to the other with the position, so that the largest value of a channel holds for the
positions it was seen at alone, and later ones would be cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from owl2.export.model import DecoderLayer
from owl2.export.model.decoder import KeyValue

LARGEST_CODE = 127
# Room for magnitudes that calibration has not seen. Cut values cost much more than wider steps: on the sample model
# with calibration data of its own domain 1.5 costs a third more KL than the best factor, with the built-in data less
# than half of what 1.25 costs (scripts/compare_kv_scales.py).
HEADROOM = 1.5


@dataclass(frozen=True, eq=False)
class KvScales:
    """Steps between neighbouring codes of one layer.

    Attributes:
        keys, values: float32 [H, D], positive.
    """

    keys: Tensor
    values: Tensor

    def codes(self, keys: Tensor, values: Tensor) -> KeyValue:
        """What stands for rotated keys and values [B, H, T, D]: int8 of the same shapes."""
        return _codes(keys, self.keys), _codes(values, self.values)

    def values_of(self, codes: KeyValue) -> KeyValue:
        """What attention reads where ``codes`` are stored: float32 [B, H, T, D] twice."""
        keys, values = codes
        return keys * self.keys[:, None], values * self.values[:, None]


def _codes(x: Tensor, scales: Tensor) -> Tensor:
    return (x / scales[:, None]).round().clamp(-LARGEST_CODE - 1, LARGEST_CODE).to(torch.int8)


class KvRange:
    """The largest magnitudes of one layer's rotary pairs of keys, and of its values, so far."""

    def __init__(self) -> None:
        self._largest: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Look at rotated keys and values [B, H, T, D]."""
        lengths = torch.hypot(*keys.chunk(2, dim=-1))
        seen = [x.abs().amax((0, 2)) for x in (torch.cat([lengths, lengths], dim=-1), values)]
        self._largest = [torch.maximum(*pair) for pair in zip(self._largest, seen)] if self._largest else seen

    def scales(self) -> KvScales:
        """Scales that reach beyond everything added by the factor :data:`HEADROOM`."""
        keys, values = ((HEADROOM / LARGEST_CODE * most).clamp(min=1e-6) for most in self._largest)
        return KvScales(keys, values)


@contextmanager
def watched(layer: DecoderLayer) -> Iterator[KvRange]:
    """The range of all keys and values that ``layer`` makes while the context lasts."""
    seen = KvRange()

    def see(_module: object, _inputs: object, made: KeyValue) -> None:
        seen.add(*made)

    handle = layer.self_attn.new_kv.register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def rounding(layer: DecoderLayer, scales: KvScales) -> Iterator[list[KeyValue]]:
    """While the context lasts, ``layer`` attends to what an int8 cache holds of its keys and values.

    Yields:
        A list that gets the codes of every pass.
    """
    stored: list[KeyValue] = []

    def call(_module: object, _inputs: object, made: KeyValue) -> KeyValue:
        stored.append(scales.codes(*made))
        return scales.values_of(stored[-1])

    handle = layer.self_attn.new_kv.register_forward_hook(call)
    try:
        yield stored
    finally:
        handle.remove()
