"""Hidden rows of several sequences on their way through the decoder, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from owl2.quant.models.mplug_owl2 import DecoderLayer, Routing, rotary_tables
from owl2.runtime.config import DecoderConfig


@dataclass(eq=False)
class HiddenStates:
    """One sequence before a layer: float32 rows [T, C] and their routing."""

    rows: Tensor
    routing: Routing

    @classmethod
    def of(cls, rows: Tensor, modality: Tensor) -> HiddenStates:
        """rows: [T, C]; modality: int64 [T], 1 at image rows."""
        return cls(rows, Routing.of(modality))


class Stream:
    """Sequences before the same layer.

    Memory: one [T, C] float32 matrix per sequence, whatever the depth of the model. They stay on their device, the
    CPU; one sequence at a time visits the device of the layer.
    """

    def __init__(self, config: DecoderConfig, sequences: Iterable[HiddenStates]) -> None:
        self.config = config
        self.sequences = list(sequences)

    def copy(self) -> Stream:
        """A second stream that starts from the same rows."""
        return Stream(self.config, map(replace, self.sequences))

    @torch.no_grad()
    def outputs(self, layer: DecoderLayer) -> Iterator[Tensor]:
        """The output rows of ``layer`` for each sequence, each [T, C] on the layer's device."""
        device = next(layer.parameters()).device
        for sequence in self.sequences:
            tokens = len(sequence.rows)
            cos, sin = rotary_tables(self.config, tokens, tokens)
            rotary = cos.to(device), sin.to(device)
            rows, _ = layer(sequence.rows.to(device), sequence.routing.to(device), (1, tokens), rotary)
            yield rows

    def advance(self, layer: DecoderLayer) -> None:
        for sequence, rows in zip(self.sequences, self.outputs(layer)):
            sequence.rows = rows.to(sequence.rows.device)


class Calibration:
    """The calibration prompts twice, on their way through the layers: quantized ones, and the checkpoint's own."""

    def __init__(self, stream: Stream) -> None:
        self.quantized = stream
        self.original = stream.copy()

    def advance(self, quantized: DecoderLayer, original: DecoderLayer) -> None:
        self.quantized.advance(quantized)
        self.original.advance(original)
