"""Decoding steps on the GPU, replayed as a CUDA graph where the addresses and S are those of the step before."""

from __future__ import annotations

import contextlib
import logging

import numpy as np

from owl2.runtime import spec
from owl2.runtime.backends.steps import TEXT_STEP, cache_names, position_inputs
from owl2.runtime.backends.tensorrt.context import Context, Resources
from owl2.runtime.backends.tensorrt.cuda import Strided
from owl2.runtime.backends.tensorrt.rows import DeviceRows
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import Floats
from owl2.runtime.errors import BackendError

CACHED_ROWS_STEP = 256
"""S is a multiple of it while decoding: a CUDA graph serves as many steps."""

log = logging.getLogger(__name__)


class Decoding:
    """Steps of one position: inputs at fixed addresses with room for the longest step, one CUDA graph at a time.

    A graph is undefined once its context has been given other shapes or addresses, so there is one for the present
    buffers and S. The first step with new ones runs by itself, which TensorRT wants before it is captured.

    Attributes:
        captures: whether steps are captured here, and not by TensorRT itself or not at all.
    """

    def __init__(
        self,
        config: DecoderConfig,
        context: Context,
        resources: Resources,
        *,
        positions: int,
        dtype: type[np.float32 | np.float16],
        captures: bool,
    ) -> None:
        """Bind everything that stays the same.

        Args:
            config: of the model.
            context: of the decoding profile.
            resources: of the engine.
            positions: that a conversation may take.
            dtype: of the activations.
            captures: whether to capture steps as CUDA graphs.

        Raises:
            BackendError: the GPU's memory is too small.
        """
        self.captures = captures
        self._config, self._context, self._resources = config, context, resources
        self._positions, self._dtype = positions, dtype
        self._names = cache_names(config)
        self._bound: tuple[int, int, int] | None = None
        item, half = np.dtype(dtype).itemsize, config.head_dim // 2
        self._row = spec.kv_row_width(config) * item
        fixed = resources.fixed
        for name, array in TEXT_STEP.items():
            context.bind(name, fixed.upload(name, array, resources.stream), array.shape)
        # So that no step has to allocate: a graph goes on reading the addresses at which it was captured.
        lengths = {
            spec.EMBEDS: config.hidden_size,
            spec.ATTENTION_MASK: positions + 1,
            spec.ROTARY_COS: half,
            spec.ROTARY_SIN: half,
        }
        self._inputs = {name: fixed.reserve(name, length * item) for name, length in lengths.items()}
        self._new_rows = fixed.reserve("new rows", len(self._names) * self._row)
        for index, (_, written) in enumerate(self._names):
            context.bind(written, self._new_rows + index * self._row)
        self._logits = fixed.reserve(spec.LOGITS, config.vocab_size * np.dtype(np.float32).itemsize)
        context.bind(spec.LOGITS, self._logits)
        resources.gpu.synchronize(resources.stream)

    def run(self, embeds: Floats, past: int, rows: DeviceRows) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V].

        Raises:
            BackendError: the step failed.
        """
        gpu, stream = self._resources.gpu, self._resources.stream
        cached = cached_rows(past, rows.capacity, self._positions)
        rows.begin(past, past + 1, stream)
        inputs = {
            spec.EMBEDS: embeds[None].astype(self._dtype),
            **position_inputs(self._config, past, 1, cached, self._dtype),
        }
        for name, array in inputs.items():
            gpu.upload(self._inputs[name], array, stream)
        if self._bound == (rows.address, rows.pitch, cached):
            self._repeat()
        else:
            self._bound = None
            self._resources.drop_graph()
            for name, array in inputs.items():
                self._context.bind(name, self._inputs[name], array.shape)
            for index, (read, _) in enumerate(self._names):
                self._context.bind(read, rows.at(index, 0), (cached, spec.kv_row_width(self._config)))
            self._context.enqueue("the decoder")
            self._bound = rows.address, rows.pitch, cached
        target = Strided(rows.at(0, past), rows.pitch)
        gpu.copy(target, Strided(self._new_rows, self._row), self._row, rows.count, stream)
        logits = np.empty(self._config.vocab_size, np.float32)
        gpu.download(logits, self._logits, stream)
        gpu.synchronize(stream)
        return logits

    def _repeat(self) -> None:
        """Run the step before with the new contents of its inputs."""
        resources = self._resources
        if self.captures and not resources.graph:
            try:
                resources.graph = self._capture()
            except BackendError as error:
                # Graphs only save time between kernels: the conversation goes on without.
                self.captures = False
                log.warning("decoding goes on without CUDA graphs: %s", error)
        if resources.graph:
            resources.gpu.launch(resources.graph, resources.stream)
        else:
            self._context.enqueue("the decoder")

    def _capture(self) -> int:
        gpu, stream = self._resources.gpu, self._resources.stream
        gpu.begin_capture(stream)
        try:
            self._context.enqueue("capturing the decoder")
        except BaseException:
            with contextlib.suppress(BackendError):
                gpu.destroy_graph(gpu.end_capture(stream))
            raise
        return gpu.end_capture(stream)


def cached_rows(past: int, capacity: int, positions: int) -> int:
    """S of a decoding step: a multiple of 256 and more than ``past``, up to what buffers and engine hold."""
    return min((past // CACHED_ROWS_STEP + 1) * CACHED_ROWS_STEP, capacity, positions)
