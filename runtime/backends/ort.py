"""ONNX Runtime backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import DecoderConfig, ModelConfig, require
from owl2.runtime.engine import Floats, Ints, KvBuffers
from owl2.runtime.errors import BackendError, BackendUnavailableError
from owl2.runtime.rope import rotary_angles

PROVIDERS = {"cpu": "CPUExecutionProvider"}
ERRORS_ONLY = 3


@dataclass(frozen=True)
class OrtBuffers:
    """K/V buffers in host memory.

    Attributes:
        arrays: key and value of each layer in turn, float32 [1, H, capacity, padded D].
        binding: has every array bound as past and as present of its layer, so that steps write in place.
    """

    arrays: list[Floats]
    binding: ort.IOBinding

    @property
    def capacity(self) -> int:
        """Positions they hold."""
        return int(self.arrays[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(array.nbytes for array in self.arrays)


class OrtEngine:
    """One session for pictures, one for the decoder; see :class:`owl2.runtime.engine.Engine`."""

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        threads: int | None = None,
        *,
        decoder_graph: str = spec.DECODER_GRAPH,
    ) -> None:
        """Load the graphs of a verified bundle.

        Args:
            bundle: what to run.
            provider: execution provider; ``cpu``.
            threads: of one operator; None lets ONNX Runtime choose the physical cores.
            decoder_graph: file of the bundle to use; the exporter checks variants with it.

        Raises:
            BackendUnavailableError: the provider is not known or not part of the installed ONNX Runtime.
            BackendError: a graph cannot be loaded.
        """
        self._config: ModelConfig = bundle.manifest.model
        self._provider = _provider(provider)
        self._options = _session_options(threads)
        self._vision = self._session(bundle, spec.VISION_GRAPH)
        self._decoder = self._session(bundle, decoder_graph)
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # failures come back as exceptions

    def _session(self, bundle: Bundle, name: str) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(str(bundle.path(name)), self._options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            raise BackendError(f"{bundle.path(name)} cannot be loaded: {_first_line(error)}") from error

    def encode_images(self, pixels: Floats) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""
        try:
            rows: Floats = self._vision.run([spec.IMAGE_ROWS], {spec.PIXELS: pixels}, self._run_options)[0]
        except Exception as error:
            raise BackendError(f"the vision tower failed: {_first_line(error)}") from error
        return rows

    def allocate(self, capacity: int, previous: KvBuffers | None) -> OrtBuffers:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``."""
        decoder = self._config.decoder
        shape = (1, decoder.num_attention_heads, capacity, spec.padded_head_dim(decoder))
        arrays = [np.zeros(shape, dtype=np.float32) for _ in range(2 * decoder.num_hidden_layers)]
        if isinstance(previous, OrtBuffers):
            kept = min(capacity, previous.capacity)
            for array, old in zip(arrays, previous.arrays):
                array[:, :, :kept] = old[:, :, :kept]
        binding = self._decoder.io_binding()
        for layer in range(decoder.num_hidden_layers):
            names = zip(spec.past_names(layer), spec.present_names(layer))
            for array, (past, present) in zip(arrays[2 * layer :], names):
                value = ort.OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
        return OrtBuffers(arrays, binding)

    def prefill(self, embeds: Floats, modality: Ints, past: int, buffers: KvBuffers, logit_rows: Ints) -> Floats:
        """Run T mixed positions after ``past`` cached ones -> logits [R, V]."""
        if not isinstance(buffers, OrtBuffers):
            raise BackendError(f"these K/V buffers belong to another backend: {type(buffers).__name__}")
        tokens = len(embeds)
        total = past + tokens
        require(total <= buffers.capacity, f"{total} positions do not fit K/V buffers of {buffers.capacity}")
        text, image = np.flatnonzero(modality == 0), np.flatnonzero(modality)
        cos, sin = rotary_tables(self._config.decoder, total)
        feeds: dict[str, NDArray[Any]] = {
            spec.EMBEDS: embeds[None],
            spec.MODALITY: modality,
            spec.TEXT_ROWS: text,
            spec.IMAGE_ROW_INDEX: image,
            spec.ROW_ORDER: np.argsort(np.concatenate([text, image]), kind="stable"),
            spec.LOGIT_ROWS: logit_rows,
            spec.LENGTHS: np.array([total - 1], dtype=np.int32),
            spec.TOTAL_LENGTH: np.array(total, dtype=np.int32),
            spec.ROTARY_COS: cos,
            spec.ROTARY_SIN: sin,
        }
        return self._step(feeds, buffers)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""
        zero = np.zeros(1, dtype=np.int64)
        logits: Floats = self.prefill(embeds, zero, past, buffers, zero)[0]
        return logits

    def _step(self, feeds: dict[str, NDArray[Any]], buffers: OrtBuffers) -> Floats:
        binding = buffers.binding
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(spec.LOGITS, "cpu")
        try:
            self._decoder.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            raise BackendError(f"the decoder failed: {_first_line(error)}") from error
        # Outputs come in the order of binding: the buffers first, the logits last.
        logits: Floats = binding.get_outputs()[-1].numpy()
        return logits


@lru_cache(maxsize=4)
def _cached_tables(config: DecoderConfig, length: int, total: int) -> tuple[Floats, Floats]:
    angles = rotary_angles(config, length, total)
    padding = (spec.padded_head_dim(config) - config.head_dim) // 2
    angles = np.pad(angles, ((0, 0), (0, padding)))
    return np.cos(angles), np.sin(angles)


def rotary_tables(config: DecoderConfig, total: int) -> tuple[Floats, Floats]:
    """Cosines and sines for a step that ends at ``total`` positions: each float32 [>= total, padded D / 2].

    The tables of the whole context are computed once, unless dynamic scaling makes them depend on ``total``.
    """
    scaling = config.rope_scaling
    if total > config.max_position_embeddings and scaling is not None and scaling.type == "dynamic":
        return _cached_tables(config, total, total)
    length = max(total, config.max_position_embeddings)
    return _cached_tables(config, length, config.max_position_embeddings)


def _provider(name: str) -> str:
    provider = PROVIDERS.get(name)
    if provider is None:
        raise BackendUnavailableError(f"provider {name!r} is not known; known: {', '.join(PROVIDERS)}")
    available = ort.get_available_providers()
    if provider not in available:
        raise BackendUnavailableError(
            f"provider {name!r} needs ONNX Runtime's {provider}; the installed one has {', '.join(available)}"
        )
    return provider


def _session_options(threads: int | None) -> ort.SessionOptions:
    require(threads is None or threads > 0, f"threads must be positive, got {threads}")
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
