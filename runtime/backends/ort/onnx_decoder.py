"""Decoder graphs of the dialect onnx on ONNX Runtime: the graphs that TensorRT engines are built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from owl2.runtime import spec
from owl2.runtime.backends.ort.session import OrtOptions, check_tensors, element_of, open_session, run_bound
from owl2.runtime.backends.steps import TEXT_STEP, StepInputs, cache_names, position_inputs, row_inputs
from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import Floats, Ints, KvBuffers, own

Rows = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class RowBuffers:
    """K/V rows in host memory: keys and values of each layer in turn, [capacity, W] each."""

    rows: list[Rows]

    @property
    def capacity(self) -> int:
        return len(self.rows[0])

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)


class OnnxDecoder:
    """A decoder's session; see :class:`owl2.runtime.engine.DecoderEngine`."""

    def __init__(self, path: Path, config: DecoderConfig, options: OrtOptions) -> None:
        self._config = config
        self._session = open_session(path, options)
        self._dtype, element = element_of(path, self._session, spec.EMBEDS, options.activations)
        self._width = spec.kv_row_width(config)
        self._names = cache_names(config)
        rows = ((None, self._width), element)
        expected = {
            spec.EMBEDS: ((None, None, config.hidden_size), element),
            spec.LOGITS: ((None, config.vocab_size), "tensor(float)"),
            spec.ATTENTION_MASK: ((None, None), element),
            **{name: rows for pair in self._names for name in pair},
        }
        check_tensors(path, self._session, expected)
        # Read where there are no cached rows: the mask hides numbers, but not the NaN that an undone step may leave.
        self._no_rows = np.zeros((1, self._width), self._dtype)

    def allocate(self, capacity: int, previous: KvBuffers | None) -> RowBuffers:
        made = RowBuffers([np.zeros((capacity, self._width), self._dtype) for _ in self._names])
        if previous is not None:
            for rows, old in zip(made.rows, own(previous, RowBuffers).rows):
                kept = min(capacity, len(old))
                rows[:kept] = old[:kept]
        return made

    kv_transfer = None

    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        return self._step(embeds, row_inputs(modality, logit_rows), past, buffers, cancellation)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        logits: Floats = self._step(embeds, TEXT_STEP, past, buffers, cancellation)[0]
        return logits

    def _step(
        self, embeds: Floats, rows: StepInputs, past: int, buffers: KvBuffers, cancellation: Cancellation
    ) -> Floats:
        total = past + len(embeds)
        cache = own(buffers, RowBuffers, total).rows
        inputs = {
            spec.EMBEDS: embeds[None].astype(self._dtype, copy=False),
            **rows,
            **position_inputs(self._config, past, len(embeds), max(past, 1), self._dtype),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for (read, written), tensor in zip(self._names, cache):
            before = tensor[:past] if past else self._no_rows
            binding.bind_ortvalue_input(read, ort.OrtValue.ortvalue_from_numpy(before))
            binding.bind_ortvalue_output(written, ort.OrtValue.ortvalue_from_numpy(tensor[past:total]))
        return run_bound(self._session, binding, cancellation)
