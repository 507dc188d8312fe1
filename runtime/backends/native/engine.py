"""The native backend: the decoder in the core, the vision side in ONNX Runtime when the first image comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from owl2.runtime import _native, spec
from owl2.runtime.backends.native.support import BLOCK, default_kv_type, native_kernels, obstacle
from owl2.runtime.backends.native.weights import OpenWeights, open_weights
from owl2.runtime.backends.ort.installation import check_onnxruntime, needs_onnxruntime
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.cancellation import NEVER, Cancellation, StoppedError
from owl2.runtime.engine import (
    CLOSED,
    EngineOptions,
    Floats,
    Ints,
    KvBuffers,
    KvContent,
    KvTransfer,
    SequenceRows,
    check_threads,
    own,
)
from owl2.runtime.errors import BackendError, BackendUnavailableError
from owl2.runtime.rope import rotary_tables

if TYPE_CHECKING:
    from owl2.runtime.backends.ort.engine import OrtVision


def prepare(folder: Path, manifest: Manifest, options: EngineOptions) -> Callable[[Bundle], NativeEngine]:
    """See :data:`owl2.runtime.backends.choose.Backend`."""
    problem = obstacle(manifest)
    if problem is not None:
        raise BackendUnavailableError(f"{folder}: {problem}; load it with backend='onnxruntime'")
    native_kernels()
    check_threads(options.threads)
    return lambda bundle: NativeEngine(bundle, options)


KV_PARTS = ("keys", "values", "key_scales", "value_scales")


@dataclass(frozen=True, eq=False)
class NativeBuffers:
    """Keys and values of one conversation."""

    cache: _native.KvCache

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes


class NativeEngine:
    """Both graphs of a bundle; see :class:`owl2.runtime.engine.Engine`."""

    rows_are_independent = True

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        """Map the decoder's weights of a verified bundle.

        Raises:
            BundleCorruptError: its tensors are not those of the model.
        """
        self._bundle, self._options = bundle, options
        self._config = bundle.manifest.model.decoder
        self._kv_type = options.kv_cache or default_kv_type(bundle.manifest)
        self._check_graphs()
        self._data = bundle.open_file(f"{spec.DECODER_GRAPH}.data")
        # ONNX Runtime may go on using what it has mapped of it.
        self._vision_data = bundle.open_file(f"{spec.VISION_GRAPH}.data")
        threads = options.threads or _native.usable_processors()
        self._weights: OpenWeights | None = open_weights(
            bundle.tensors(spec.DECODER_GRAPH), self._data, bundle.manifest, threads
        )
        self._vision: OrtVision | None = None
        self._opening = threading.Lock()
        if options.warm:
            self._open_vision()

    @property
    def context(self) -> None:
        return None

    @property
    def block(self) -> int:
        return BLOCK

    def close(self) -> None:
        """Give the weights back, at once or when a step that is running has ended."""
        self._weights = self._vision = None
        self._data.close()
        self._vision_data.close()

    def encode_images(self, pixels: Floats, cancellation: Cancellation = NEVER) -> Floats:
        vision = self._open_vision()
        self._vision_data.check()
        return vision.encode_images(pixels, cancellation)

    def allocate(self, capacity: int, previous: KvBuffers | None) -> NativeBuffers:
        if previous is not None:
            return NativeBuffers(own(previous, NativeBuffers).cache.resized(capacity))
        self._open()
        layers, heads = self._config.num_hidden_layers, self._config.num_attention_heads
        return NativeBuffers(_native.KvCache(layers, heads, self._config.head_dim, self._kv_type, capacity))

    @property
    def stepping(self) -> NativeEngine:
        return self

    @property
    def kv_transfer(self) -> KvTransfer:
        return KvTransfer(self._kv_type, self._read_kv, self._write_kv)

    def _read_kv(self, buffers: KvBuffers, positions: int) -> KvContent:
        parts = own(buffers, NativeBuffers, positions).cache.read(positions)
        return KvContent(self._kv_type, positions, dict(zip(KV_PARTS, parts)))

    def _write_kv(self, content: KvContent, capacity: int) -> NativeBuffers:
        buffers = self.allocate(capacity, None)
        buffers.cache.write(content.positions, [content.parts[name] for name in KV_PARTS if name in content.parts])
        return buffers

    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        return self.step([SequenceRows(embeds, modality, past, buffers)], logit_rows, cancellation)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        rows = SequenceRows(embeds, np.zeros(len(embeds), np.int64), past, buffers)
        logits: Floats = self.step([rows], np.zeros(1, np.int64), cancellation)[0]
        return logits

    def step(self, sequences: Sequence[SequenceRows], logit_rows: Ints, cancellation: Cancellation = NEVER) -> Floats:
        """See :class:`owl2.runtime.engine.SteppingEngine`."""
        weights = self._open()
        self._data.check()
        angles = [self._angles(rows.past, len(rows.embeds)) for rows in sequences]
        stop = _native.Stop()
        with cancellation.stopping(stop.set):
            logits = weights.decoder.step(
                _joined([np.ascontiguousarray(rows.embeds, np.float32) for rows in sequences]),
                _joined([rows.modality.astype(np.uint8) for rows in sequences]),
                _joined([cosines for cosines, _ in angles]),
                _joined([sines for _, sines in angles]),
                [self._place(rows) for rows in sequences],
                logit_rows.tolist(),
                stop,
            )
        if logits is None:
            cancellation.check()
            raise StoppedError
        if weights.mapped.damaged:
            raise self._data.changed()
        self._data.check()
        return logits

    def _place(self, rows: SequenceRows) -> tuple[_native.KvCache, int, int]:
        count = len(rows.embeds)
        return own(rows.buffers, NativeBuffers, rows.past + count).cache, rows.past, count

    def _angles(self, past: int, count: int) -> tuple[Floats, Floats]:
        """Cosines and sines of new positions: each float32 [T, D / 2]."""
        cos, sin = rotary_tables(self._config, past + count, self._config.head_dim, np.float32)
        return cos[past : past + count], sin[past : past + count]

    def _open(self) -> OpenWeights:
        weights = self._weights
        if weights is None:
            raise BackendError(CLOSED)
        return weights

    def _check_graphs(self) -> None:
        """Compare what only the graphs tell with the manifest; raises BackendError."""
        model, heads = self._bundle.manifest.model, self._config.num_attention_heads
        shape = (None, heads, None, spec.padded_head_dim(self._config))
        caches = {name: shape for index in range(self._config.num_hidden_layers) for name in spec.past_names(index)}
        self._bundle.check_shapes(spec.DECODER_GRAPH, caches)
        rows = (None, model.rows_per_image, self._config.hidden_size)
        self._bundle.check_shapes(spec.VISION_GRAPH, {spec.IMAGE_ROWS: rows})

    def _open_vision(self) -> OrtVision:
        self._open()
        with self._opening:
            if self._vision is None:
                with needs_onnxruntime():
                    from owl2.runtime.backends.ort.engine import OrtVision
                    from owl2.runtime.backends.ort.session import OrtOptions
                check_onnxruntime(self._bundle.manifest.minimum_onnxruntime)
                options = OrtOptions(self._options.device, self._options.threads)
                path = self._bundle.path(spec.VISION_GRAPH)
                self._vision = OrtVision(path, self._bundle.manifest.model, options)
            return self._vision


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
