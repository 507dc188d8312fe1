"""All prompts of an export on their way through the decoder's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from owl2.export.job.job import ExportJob
from owl2.quant.kv import RoundedStream, watched
from owl2.quant.models.mplug_owl2 import DecoderLayer
from owl2.quant.stream import Calibration, HiddenStates, Stream
from owl2.runtime.engine import Floats, Ints
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed
from owl2.runtime.token_table import ArrayTable

Embedded = tuple[Floats, Ints]
"""Rows [T, C] before the first layer, and int64 [T] that is 1 at image rows."""


@dataclass(frozen=True)
class Streams:
    """Prompts on their way through the layers.

    Attributes:
        calibration: for GPTQ; None where it is not used.
        quantized: the measured prompts, through the stored weights.
        original: the measured prompts, through the checkpoint's weights.
        kv_int8: the probes, through the stored weights with keys and values as an int8 cache holds them.
    """

    calibration: Calibration | None
    quantized: Stream
    original: Stream
    kv_int8: RoundedStream

    def advance(self, layer: DecoderLayer, original: DecoderLayer | None) -> None:
        """Move everything but the original measured prompts past ``layer``, which has the stored weights."""
        with watched(layer) as seen:
            if self.calibration is None or original is None:
                self.quantized.advance(layer)
            else:
                self.calibration.advance(layer, original)
        if self.calibration is not None:
            self.quantized.advance(layer)
        self.kv_int8.advance(layer, seen.scales())

    def arrays(self) -> list[NDArray[Any]]:
        """All that changes from layer to layer; :meth:`restore` takes it."""
        return [sequence.rows.numpy() for sequence in self._sequences()] + self.kv_int8.arrays()

    def restore(self, arrays: list[NDArray[Any]]) -> None:
        """Bring streams before the first layer to where :meth:`arrays` was called."""
        sequences = self._sequences()
        for sequence, rows in zip(sequences, arrays):
            if rows.shape != tuple(sequence.rows.shape):
                raise ValueError(f"rows of shape {list(rows.shape)} were kept for {list(sequence.rows.shape)}")
            sequence.rows = torch.from_numpy(rows)
        self.kv_int8.restore(arrays[len(sequences) :])

    def _sequences(self) -> list[HiddenStates]:
        calibration = [] if self.calibration is None else [self.calibration.quantized, self.calibration.original]
        return [sequence for each in (*calibration, self.quantized, self.original) for sequence in each.sequences]


def begin_streams(
    job: ExportJob, table: NDArray[Any], original: Mapping[str, Floats], rows: Mapping[str, Floats]
) -> tuple[Streams, list[Embedded]]:
    """All prompts before the first layer, the probes as arrays too.

    Args:
        table: token rows [V, C].
        original: rows of each image by digest, for the measured prompts.
        rows: the same for the calibration prompts.
    """

    token_table = ArrayTable(table)

    def embedded(prompts: Sequence[Prompt], images: Mapping[str, Floats]) -> list[Embedded]:
        return [embed(prompt.keys, token_table, images) for prompt in prompts]

    def begun(prompts: list[Embedded]) -> Stream:
        sequences = [HiddenStates.of(torch.from_numpy(rows), torch.from_numpy(kinds)) for rows, kinds in prompts]
        return Stream(job.model.decoder, sequences)

    prompts = job.prompts
    measured = embedded(prompts.measured, original)
    probes = measured[: len(prompts.probes)]
    calibration = Calibration(begun(embedded(prompts.calibration, rows))) if prompts.calibration else None
    quantized = begun(measured)
    return Streams(calibration, quantized, quantized.copy(), RoundedStream(begun(probes))), probes
