"""Graphs of the dialect onnx on ONNX Runtime: what TensorRT is given, where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from owl2.runtime import spec
from owl2.runtime.backends.steps import onnx_inputs
from owl2.runtime.config import DecoderConfig, require
from owl2.runtime.engine import Floats, Ints, KvBuffers
from owl2.runtime.errors import BackendError

Rows = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class RowBuffers:
    """K/V rows in host memory.

    Attributes:
        rows: keys and values of each layer in turn, [capacity, W] each.
    """

    rows: list[Rows]

    @property
    def capacity(self) -> int:
        """Positions they hold."""
        return len(self.rows[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(rows.nbytes for rows in self.rows)


class OnnxDecoder:
    """A decoder's session; see :class:`owl2.runtime.engine.DecoderEngine`."""

    def __init__(self, session: ort.InferenceSession, config: DecoderConfig, dtype: DTypeLike) -> None:
        """Wrap an open session whose activations are of ``dtype``."""
        self._session, self._config, self._dtype = session, config, dtype
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # failures come back as exceptions
        # Read where there are no cached rows: the mask hides numbers, not the NaN that an undone step may have left.
        self._no_rows = np.zeros((1, spec.kv_row_width(config)), dtype)

    def allocate(self, capacity: int, previous: KvBuffers | None) -> RowBuffers:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``."""
        shape = (capacity, spec.kv_row_width(self._config))
        made = RowBuffers([np.zeros(shape, self._dtype) for _ in range(2 * self._config.num_hidden_layers)])
        if isinstance(previous, RowBuffers):
            kept = min(capacity, previous.capacity)
            for rows, old in zip(made.rows, previous.rows):
                rows[:kept] = old[:kept]
        return made

    def prefill(self, embeds: Floats, modality: Ints, past: int, buffers: KvBuffers, logit_rows: Ints) -> Floats:
        """Run T mixed positions after ``past`` cached ones -> logits [R, V]."""
        if not isinstance(buffers, RowBuffers):
            raise BackendError(f"these K/V buffers belong to another backend: {type(buffers).__name__}")
        total, cached = past + len(embeds), max(past, 1)
        require(total <= buffers.capacity, f"{total} positions do not fit K/V buffers of {buffers.capacity}")
        inputs = onnx_inputs(self._config, modality, past, cached, logit_rows, self._dtype)
        binding = self._session.io_binding()
        binding.bind_cpu_input(spec.EMBEDS, embeds[None].astype(self._dtype, copy=False))
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for layer in range(self._config.num_hidden_layers):
            pairs = zip(spec.past_names(layer), spec.present_names(layer), buffers.rows[2 * layer :])
            for read, written, rows in pairs:
                before = rows[:past] if past else self._no_rows
                binding.bind_ortvalue_input(read, ort.OrtValue.ortvalue_from_numpy(before))
                binding.bind_ortvalue_output(written, ort.OrtValue.ortvalue_from_numpy(rows[past:total]))
        return run_bound(self._session, binding, self._run_options)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""
        zero = np.zeros(1, dtype=np.int64)
        logits: Floats = self.prefill(embeds, zero, past, buffers, zero)[0]
        return logits


def run_bound(session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions) -> Floats:
    """Run a decoder whose inputs and K/V outputs are bound -> logits [R, V].

    Raises:
        BackendError: the step failed.
    """
    binding.bind_output(spec.LOGITS, "cpu")
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        raise BackendError(f"the decoder failed: {first_line(error)}") from error
    # Outputs come in the order of binding: keys and values first, the logits last.
    logits: Floats = binding.get_outputs()[-1].numpy()
    return logits


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
