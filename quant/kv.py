"""Scales of an int8 K/V cache: one per channel of every head, for keys and for values.

They are static, taken on rows of both modalities, since ONNX Runtime's attention takes one scale per channel for all
positions. Keys have outlier channels that stay the same over the positions (KIVI, Liu et al. 2024, section 3), which
a scale per channel follows. A key's two channels of one rotary pair share the largest length of the pair: rotation
moves magnitude from one to the other with the position, so the largest value of a channel holds only for the positions
where it was seen, and later ones would be cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from owl2.quant.models.mplug_owl2 import DecoderLayer
from owl2.quant.models.mplug_owl2.decoder import KeyValue
from owl2.quant.stream import Stream

MAX_CODE = 127
# Room for magnitudes that calibration has not seen, since cut values cost more than wider steps: docs/quantization.md.
HEADROOM = 1.5


@dataclass(frozen=True, eq=False)
class KvScales:
    """Steps between neighbouring codes of one layer's keys and values: float32 [H, D], positive."""

    keys: Tensor
    values: Tensor

    def codes(self, keys: Tensor, values: Tensor) -> KeyValue:
        """Codes of rotated keys and values [B, H, T, D]: int8 of the same shapes."""
        return _codes(keys, self.keys), _codes(values, self.values)

    def values_of(self, codes: KeyValue) -> KeyValue:
        """Keys and values that ``codes`` stand for: float32 [B, H, T, D] each."""
        keys, values = codes
        return keys * self.keys[:, None], values * self.values[:, None]


def _codes(x: Tensor, scales: Tensor) -> Tensor:
    return (x / scales[:, None]).round().clamp(-MAX_CODE - 1, MAX_CODE).to(torch.int8)


class KvRange:
    """The largest magnitudes so far of one layer's rotary pairs of keys, and of its values."""

    def __init__(self) -> None:
        self._largest: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Include rotated keys and values [B, H, T, D]."""
        lengths = torch.hypot(*keys.chunk(2, dim=-1))
        seen = [x.abs().amax((0, 2)) for x in (torch.cat([lengths, lengths], dim=-1), values)]
        self._largest = [torch.maximum(*pair) for pair in zip(self._largest, seen)] if self._largest else seen

    def scales(self) -> KvScales:
        """Scales that reach beyond everything added by the factor :data:`HEADROOM`."""
        keys, values = ((HEADROOM / MAX_CODE * largest).clamp(min=1e-6) for largest in self._largest)
        return KvScales(keys, values)


@contextmanager
def watched(layer: DecoderLayer) -> Iterator[KvRange]:
    """The range of all keys and values that ``layer`` computes while the context lasts."""
    seen = KvRange()

    def see(_module: object, _inputs: object, computed: KeyValue) -> None:
        seen.add(*computed)

    with layer.self_attn.new_kv.register_forward_hook(see):
        yield seen


class RoundedStream:
    """A stream whose layers attend to keys and values as an int8 cache holds them.

    Attributes:
        scales: of every layer it has passed.
        codes: keys and values of each sequence in the first layer's cache.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.scales: list[KvScales] = []
        self.codes: list[KeyValue] = []

    def advance(self, layer: DecoderLayer, scales: KvScales) -> None:
        first = not self.scales
        self.scales.append(KvScales(scales.keys.cpu(), scales.values.cpu()))

        def replace(_module: object, _inputs: object, computed: KeyValue) -> KeyValue:
            codes = scales.codes(*computed)
            if first:
                self.codes.append((codes[0].cpu(), codes[1].cpu()))
            return scales.values_of(codes)

        with layer.self_attn.new_kv.register_forward_hook(replace):
            self.stream.advance(layer)

    def arrays(self) -> list[NDArray[Any]]:
        """All that changes from layer to layer; :meth:`restore` takes it."""
        rows = [sequence.rows for sequence in self.stream.sequences]
        codes = [part for pair in self.codes for part in pair]
        scales = [part for layer in self.scales for part in (layer.keys, layer.values)]
        return [part.numpy() for part in (*rows, *codes, *scales)]

    def restore(self, arrays: list[NDArray[Any]]) -> None:
        """Move a stream before the first layer to where :meth:`arrays` was called, after one layer or more."""
        parts, count = [torch.from_numpy(array) for array in arrays], len(self.stream.sequences)
        for sequence, rows in zip(self.stream.sequences, parts):
            sequence.rows = rows
        codes, scales = parts[count : 3 * count], parts[3 * count :]
        self.codes = list(zip(codes[::2], codes[1::2]))
        self.scales = [KvScales(*pair) for pair in zip(scales[::2], scales[1::2])]
