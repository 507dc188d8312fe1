"""ONNX Runtime backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from owl2.runtime import spec
from owl2.runtime.backends.ort import session as sessions
from owl2.runtime.backends.ort.installation import check_onnxruntime, is_older, upgrade_command
from owl2.runtime.backends.ort.memory import Buffer, Feeds, memory_of
from owl2.runtime.backends.ort.onnx_decoder import OnnxDecoder, first_line, run_bound
from owl2.runtime.backends.steps import row_inputs
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.config import DecoderConfig, ModelConfig, require
from owl2.runtime.engine import PREFILL_BLOCK, EngineOptions, Floats, Ints, KvBuffers
from owl2.runtime.errors import BackendError, BackendUnavailableError
from owl2.runtime.placement import HOST, Placement
from owl2.runtime.rope import rotary_tables
from owl2.runtime.spec import DialectName, KvType

Element = type[np.float32 | np.float16 | np.int8]
KvArray = NDArray[np.float32 | np.float16 | np.int8]
ELEMENTS: dict[KvType, tuple[Element, str]] = {
    "fp32": (np.float32, "tensor(float)"),
    "fp16": (np.float16, "tensor(float16)"),
    "int8": (np.int8, "tensor(int8)"),
}
"""How arrays and graphs name the elements of activations and K/V caches."""
READ_BY_CPU = frozenset({spec.TOTAL_LENGTH})
"""Inputs that the attention of every provider reads on the CPU."""
ERRORS_ONLY = 3
THREADS_PER_CORE = 4


@dataclass(frozen=True, slots=True)
class OrtOptions:
    """How sessions are opened.

    Attributes:
        device: where graphs run.
        threads: of one operator; None lets ONNX Runtime choose the physical cores.
        kv_cache: type of the K/V cache, which the bundle must offer; None for that of the activations.
        frugal: keep weights as they are in the file instead of a faster copy in memory. Slow; for checks.
        exact: do not quantize activations where a graph leaves that to ONNX Runtime. Slow; for checks.

    Raises:
        ConfigError: a device that is not known, or a number of threads that cannot work.
    """

    device: Placement = HOST
    threads: int | None = None
    kv_cache: KvType | None = None
    frugal: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        most = THREADS_PER_CORE * (os.cpu_count() or 1)
        require(self.threads is None or self.threads > 0, f"threads must be positive, got {self.threads}")
        require(
            self.threads is None or self.threads <= most,
            f"threads {self.threads} is more than this machine can use; give at most {most}",
        )


DEFAULT_OPTIONS = OrtOptions()


def _constant(array: Ints) -> Ints:
    """The array, never to be written to again: a device gets it once."""
    array.setflags(write=False)
    return array


TEXT_ROW = _constant(np.zeros(1, dtype=np.int64))
"""The modality of a step of one text row, and the row whose logits are wanted."""
TEXT_STEP = {name: _constant(array) for name, array in row_inputs(TEXT_ROW, TEXT_ROW).items()}


@dataclass(frozen=True)
class OrtBuffers:
    """K/V buffers in the memory of the decoder's device.

    Attributes:
        buffers: key and value of each layer in turn, [1, H, capacity, padded D].
        binding: has every buffer bound as past and as present of its layer, so that steps write in place.
        feeds: the other inputs of the binding.
    """

    buffers: list[Buffer]
    binding: ort.IOBinding
    feeds: Feeds

    @property
    def arrays(self) -> list[KvArray]:
        """The contents: the buffers themselves in host memory, copies of those on a device."""
        return [buffer.numpy() for buffer in self.buffers]

    @property
    def capacity(self) -> int:
        """Positions they hold."""
        return self.buffers[0].positions

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)


class OrtDecoder:
    """The decoder's session; see :class:`owl2.runtime.engine.DecoderEngine`."""

    def __init__(self, path: Path, config: DecoderConfig, options: OrtOptions) -> None:
        """Load the graph at ``path``.

        Raises:
            BackendError: the graph cannot be loaded, or it is not for ``config`` and the type of K/V cache.
        """
        self._config = config
        self._session = open_session(path, options)
        self._dtype, _ = element_of(path, self._session, spec.EMBEDS)
        self._kv_dtype, element = element_of(path, self._session, spec.past_names(0)[0])
        if options.kv_cache is not None:
            element = ELEMENTS[options.kv_cache][1]
        shape = (None, config.num_attention_heads, None, spec.padded_head_dim(config))
        expected: dict[str, tuple[int | None, ...]] = {
            spec.EMBEDS: (None, None, config.hidden_size),
            spec.LOGITS: (None, config.vocab_size),
        }
        layers = range(config.num_hidden_layers)
        buffers = [name for i in layers for name in (*spec.past_names(i), *spec.present_names(i))]
        check_shapes(path, self._session, expected | dict.fromkeys(buffers, shape))
        check_types(path, self._session, dict.fromkeys(buffers, element))
        self._run_options = _run_options()
        self._memory = memory_of(options.device)

    def allocate(self, capacity: int, previous: KvBuffers | None) -> OrtBuffers:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``."""
        decoder, memory = self._config, self._memory
        shape = (1, decoder.num_attention_heads, capacity, spec.padded_head_dim(decoder))
        if isinstance(previous, OrtBuffers):
            buffers = [memory.grown(old, capacity) for old in previous.buffers]
        else:
            buffers = [memory.zeros(shape, self._kv_dtype) for _ in range(2 * decoder.num_hidden_layers)]
        binding = self._session.io_binding()
        for layer in range(decoder.num_hidden_layers):
            names = zip(spec.past_names(layer), spec.present_names(layer))
            for buffer, (past, present) in zip(buffers[2 * layer :], names):
                binding.bind_ortvalue_input(past, buffer.value)
                binding.bind_ortvalue_output(present, buffer.value)
        return OrtBuffers(buffers, binding, memory.feeds(binding, READ_BY_CPU))

    def prefill(self, embeds: Floats, modality: Ints, past: int, buffers: KvBuffers, logit_rows: Ints) -> Floats:
        """Run T mixed positions after ``past`` cached ones -> logits [R, V]."""
        if not isinstance(buffers, OrtBuffers):
            raise BackendError(f"these K/V buffers belong to another backend: {type(buffers).__name__}")
        tokens = len(embeds)
        total = past + tokens
        require(total <= buffers.capacity, f"{total} positions do not fit K/V buffers of {buffers.capacity}")
        cos, sin = rotary_tables(self._config, total, spec.padded_head_dim(self._config), self._dtype)
        feeds: dict[str, NDArray[Any]] = {
            spec.EMBEDS: embeds[None].astype(self._dtype, copy=False),
            **(TEXT_STEP if modality is TEXT_ROW else row_inputs(modality, logit_rows)),
            spec.LENGTHS: np.array([total - 1], dtype=np.int32),
            spec.TOTAL_LENGTH: np.array(total, dtype=np.int32),
            spec.ROTARY_COS: cos,
            spec.ROTARY_SIN: sin,
        }
        return self._step(feeds, buffers)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""
        logits: Floats = self.prefill(embeds, TEXT_ROW, past, buffers, TEXT_ROW)[0]
        return logits

    def _step(self, feeds: dict[str, NDArray[Any]], buffers: OrtBuffers) -> Floats:
        binding = buffers.binding
        for name, array in feeds.items():
            buffers.feeds.put(name, array)
        return run_bound(self._session, binding, self._run_options)


class GraphFormat(Protocol):
    """The part of a manifest that says what a decoder graph is like."""

    @property
    def dialect(self) -> DialectName:
        """Operators of the graph."""

    @property
    def model(self) -> ModelConfig:
        """The model that it computes."""


def open_decoder(path: Path, manifest: GraphFormat, options: OrtOptions) -> OrtDecoder | OnnxDecoder:
    """Load the decoder graph at ``path``, which may be a variant of the bundle's own.

    Raises:
        BackendUnavailableError, BackendError: as :class:`OrtEngine`.
    """
    decoder = manifest.model.decoder
    if manifest.dialect == "ort":
        return OrtDecoder(path, decoder, options)
    check_dialect(path, manifest.dialect, options.device)
    session = open_session(path, options)
    dtype, element = element_of(path, session, spec.EMBEDS)
    check_onnx_decoder(path, session, decoder, element)
    return OnnxDecoder(session, decoder, dtype)


def check_dialect(path: Path, dialect: DialectName, device: Placement) -> None:
    """Refuse graphs, or a bundle, whose dialect ONNX Runtime does not run there.

    Raises:
        BackendError: it does not; says which it does.
    """
    if dialect == "onnx" and not device.on_host:
        raise BackendError(
            f"{path}: ONNX Runtime runs graphs of the dialect onnx on the CPU only, where their K/V rows lie; for "
            f"device {device} export the bundle with owl2-export --dialect ort --activations fp16"
        )


def check_onnx_decoder(path: Path, session: ort.InferenceSession, config: DecoderConfig, element: str) -> None:
    """Compare a decoder graph of the dialect onnx with the model.

    Raises:
        BackendError: it is not for this model.
    """
    expected: dict[str, tuple[int | None, ...]] = {
        spec.EMBEDS: (None, None, config.hidden_size),
        spec.LOGITS: (None, config.vocab_size),
        spec.ATTENTION_MASK: (None, None),
    }
    layers = range(config.num_hidden_layers)
    rows = [name for i in layers for name in (*spec.past_names(i), *spec.present_names(i))]
    check_shapes(path, session, expected | dict.fromkeys(rows, (None, spec.kv_row_width(config))))
    check_types(path, session, dict.fromkeys((*rows, spec.ATTENTION_MASK), element))


class OrtVision:
    """The session of the vision tower and the abstractor."""

    def __init__(self, path: Path, model: ModelConfig, options: OrtOptions) -> None:
        """Load the graph at ``path``, which may be a variant of the bundle's own.

        Raises:
            BackendUnavailableError, BackendError: as :class:`OrtEngine`.
        """
        self._session = open_session(path, options)
        size = model.vision.image_size
        rows = (None, model.rows_per_image, model.decoder.hidden_size)
        check_shapes(path, self._session, {spec.PIXELS: (None, 3, size, size), spec.IMAGE_ROWS: rows})
        self._run_options = _run_options()

    def encode_images(self, pixels: Floats) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""
        try:
            rows: Floats = self._session.run([spec.IMAGE_ROWS], {spec.PIXELS: pixels}, self._run_options)[0]
        except Exception as error:
            raise BackendError(f"the vision tower failed: {first_line(error)}") from error
        return rows


def prepare(folder: Path, manifest: Manifest, options: EngineOptions) -> Callable[[Bundle], OrtEngine]:
    """Check that the device is available and can run the bundle; see :data:`owl2.runtime.backends.choose.Backend`.

    Raises:
        BackendUnavailableError: the device is not available, or ONNX Runtime is too old for the bundle.
        BackendError: the device cannot run graphs of this dialect.
        ConfigError: settings that cannot work.
    """
    check_dialect(folder, manifest.dialect, options.device)
    opening = OrtOptions(options.device, options.threads, options.kv_cache)
    sessions.prepare(options.device)
    check_onnxruntime(manifest.minimum_onnxruntime)
    kv_type = manifest.kv_type(options.kv_cache)
    if is_older(ort.__version__, manifest.kv_cache[kv_type]):
        raise BackendUnavailableError(
            f"the {kv_type} K/V cache needs onnxruntime {manifest.kv_cache[kv_type]} or newer, {ort.__version__} is "
            f"installed; upgrade it ({upgrade_command()}) or load with kv_cache {manifest.activations!r}"
        )
    return lambda bundle: OrtEngine(bundle, opening)


class OrtEngine:
    """One session for images, one for the decoder; see :class:`owl2.runtime.engine.Engine`."""

    def __init__(self, bundle: Bundle, options: OrtOptions = DEFAULT_OPTIONS) -> None:
        """Load the graphs of a verified bundle.

        Raises:
            BackendUnavailableError: the device is not available.
            BackendError: a graph cannot be loaded, or not as a whole on the device, or does not fit the manifest.
            ConfigError: the bundle does not offer the type of K/V cache.
        """
        graph = bundle.decoder_graph(options.kv_cache)
        self._vision = OrtVision(bundle.path(spec.VISION_GRAPH), bundle.manifest.model, options)
        self._decoder = open_decoder(graph, bundle.manifest, options)

    @property
    def context(self) -> None:
        """Only the model limits it."""
        return None

    @property
    def block(self) -> int:
        """New positions of a prefill step."""
        return PREFILL_BLOCK

    def close(self) -> None:
        """Give the sessions back."""
        del self._vision, self._decoder

    def encode_images(self, pixels: Floats) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""
        return self._vision.encode_images(pixels)

    def allocate(self, capacity: int, previous: KvBuffers | None) -> KvBuffers:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``."""
        return self._decoder.allocate(capacity, previous)

    def prefill(self, embeds: Floats, modality: Ints, past: int, buffers: KvBuffers, logit_rows: Ints) -> Floats:
        """Run T mixed positions after ``past`` cached ones -> logits [R, V]."""
        return self._decoder.prefill(embeds, modality, past, buffers, logit_rows)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""
        return self._decoder.decode(embeds, past, buffers)


def open_session(path: Path, options: OrtOptions) -> ort.InferenceSession:
    """Load a graph.

    Raises:
        BackendUnavailableError: the device cannot be had.
        BackendError: ONNX Runtime refuses the graph, or would run a part of it elsewhere.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    skipped = []
    if options.frugal:
        settings.add_session_config_entry("session.disable_prepacking", "1")
        skipped = ["ConstantFolding"]
    if options.exact:
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return sessions.open_session(path, options.device, settings, skipped)


def check_shapes(path: Path, session: ort.InferenceSession, expected: Mapping[str, tuple[int | None, ...]]) -> None:
    """Compare a graph's inputs and outputs with what the manifest says of the model.

    Raises:
        BackendError: one is missing or has another shape; None in ``expected`` stands for any size.
    """
    found = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    for name, shape in expected.items():
        have = found.get(name)
        if have is None or len(have) != len(shape) or any(w not in (None, h) for w, h in zip(shape, have)):
            raise BackendError(
                f"{path} does not fit the manifest: {name} has shape {have}, the model needs {list(shape)}; "
                "export the bundle again"
            )


def element_of(path: Path, session: ort.InferenceSession, name: str) -> tuple[Element, str]:
    """The element type of an input as numpy and as ONNX Runtime name it.

    Raises:
        BackendError: there is no such input, or its type is none of :data:`ELEMENTS`.
    """
    found = next((value.type for value in session.get_inputs() if value.name == name), None)
    for dtype, element in ELEMENTS.values():
        if element == found:
            return dtype, element
    raise BackendError(f"{path} is no graph of this version: {name} is {found}; export the bundle again")


def check_types(path: Path, session: ort.InferenceSession, expected: Mapping[str, str]) -> None:
    """Compare the element types of a graph's inputs and outputs, which it must have, with what is ``expected``.

    Raises:
        BackendError: one differs.
    """
    found = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    for name, element in expected.items():
        if found[name] != element:
            raise BackendError(
                f"{path} does not fit the manifest: {name} is a {found[name]}, a {element} is needed; "
                "export the bundle again"
            )


def _run_options() -> ort.RunOptions:
    options = ort.RunOptions()
    options.log_severity_level = 4  # failures come back as exceptions
    return options
