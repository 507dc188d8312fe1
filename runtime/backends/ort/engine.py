"""ONNX Runtime backend: graphs of the dialect ort on every device that it has a provider for, onnx on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort

from owl2.runtime import spec
from owl2.runtime.backends.ort.installation import check_onnxruntime, is_older, upgrade_command
from owl2.runtime.backends.ort.memory import Array, Buffer, Memory, StepFeeds
from owl2.runtime.backends.ort.onnx_decoder import OnnxDecoder
from owl2.runtime.backends.ort.session import (
    DEFAULT_OPTIONS,
    OrtOptions,
    check_tensors,
    element_of,
    open_session,
    prepare_device,
    run_bound,
)
from owl2.runtime.backends.ort.stoppable import run_stoppable
from owl2.runtime.backends.steps import TEXT_STEP, StepInputs, cache_names, row_inputs
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.config import DecoderConfig, ModelConfig
from owl2.runtime.engine import (
    CLOSED,
    PREFILL_BLOCK,
    DecoderEngine,
    EngineOptions,
    Floats,
    Ints,
    KvBuffers,
    KvContent,
    KvTransfer,
    own,
)
from owl2.runtime.errors import BackendError, BackendUnavailableError
from owl2.runtime.placement import Placement
from owl2.runtime.rope import rotary_tables
from owl2.runtime.spec import DialectName


def prepare(folder: Path, manifest: Manifest, options: EngineOptions) -> Callable[[Bundle], OrtEngine]:
    """See :data:`owl2.runtime.backends.choose.Backend`."""
    check_dialect(folder, manifest.dialect, options.device)
    ort_options = OrtOptions(options.device, options.threads, options.kv_cache)
    prepare_device(options.device)
    check_onnxruntime(manifest.minimum_onnxruntime)
    kv_type = manifest.kv_type(options.kv_cache)
    if is_older(ort.__version__, manifest.kv_cache[kv_type]):
        raise BackendUnavailableError(
            f"the {kv_type} K/V cache needs onnxruntime {manifest.kv_cache[kv_type]} or newer, {ort.__version__} is "
            f"installed; upgrade it ({upgrade_command()}) or load with kv_cache {manifest.activations!r}"
        )
    return lambda bundle: OrtEngine(bundle, ort_options)


def check_dialect(path: Path, dialect: DialectName, device: Placement) -> None:
    """Refuse a graph or a bundle whose dialect ONNX Runtime does not run on the device."""
    if dialect == "onnx" and not device.on_host:
        raise BackendError(
            f"{path}: ONNX Runtime runs graphs of the dialect onnx on the CPU only, where their K/V rows are; for "
            f"device {device} export the bundle with owl2-export --dialect ort --activations fp16"
        )


class OrtEngine:
    """One session for images, one for the decoder; see :class:`owl2.runtime.engine.Engine`."""

    rows_are_independent = False

    def __init__(self, bundle: Bundle, options: OrtOptions = DEFAULT_OPTIONS) -> None:
        """Load the graphs of a verified bundle.

        Raises:
            BackendUnavailableError: the device is not available.
            BackendError: a graph cannot be loaded, or not as a whole on the device, or does not fit the manifest.
            ConfigError: the bundle does not offer the type of K/V cache.
        """
        graph, manifest = bundle.decoder_graph(options.kv_cache), bundle.manifest
        kv_cache = manifest.kv_type(options.kv_cache)
        options = replace(options, kv_cache=kv_cache, activations=manifest.activations)
        # On the CPU, ONNX Runtime may go on using what it has mapped of the external data.
        names = (spec.VISION_GRAPH, spec.DECODER_GRAPH) if options.device.on_host else ()
        self._data = {name: bundle.open_file(f"{name}.data") for name in names}
        vision = OrtVision(bundle.path(spec.VISION_GRAPH), manifest.model, options)
        self._graphs: tuple[OrtVision, DecoderEngine] | None = vision, open_decoder(graph, manifest, options)

    def _open(self, graph: str) -> tuple[OrtVision, DecoderEngine]:
        if self._graphs is None:
            raise BackendError(CLOSED)
        if graph in self._data:
            self._data[graph].check()
        return self._graphs

    @property
    def context(self) -> None:
        return None

    @property
    def block(self) -> int:
        return PREFILL_BLOCK

    def close(self) -> None:
        """Give the sessions back, at once or when a step that is running has ended."""
        self._graphs = None
        for file in self._data.values():
            file.close()

    def encode_images(self, pixels: Floats, cancellation: Cancellation = NEVER) -> Floats:
        vision, _ = self._open(spec.VISION_GRAPH)
        return vision.encode_images(pixels, cancellation)

    def allocate(self, capacity: int, previous: KvBuffers | None) -> KvBuffers:
        _, decoder = self._open(spec.DECODER_GRAPH)
        return decoder.allocate(capacity, previous)

    stepping = None

    @property
    def kv_transfer(self) -> KvTransfer | None:
        _, decoder = self._open(spec.DECODER_GRAPH)
        return decoder.kv_transfer

    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        _, decoder = self._open(spec.DECODER_GRAPH)
        return decoder.prefill(embeds, modality, past, buffers, logit_rows, cancellation)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        _, decoder = self._open(spec.DECODER_GRAPH)
        return decoder.decode(embeds, past, buffers, cancellation)


class OrtVision:
    """The session of the vision tower and the abstractor."""

    def __init__(self, path: Path, model: ModelConfig, options: OrtOptions) -> None:
        """Load the graph at ``path``, which may be a variant of the bundle's own."""
        self._session = open_session(path, options)
        size = model.vision.image_size
        rows = (None, model.rows_per_image, model.decoder.hidden_size)
        floats = "tensor(float)"
        expected = {spec.PIXELS: ((None, 3, size, size), floats), spec.IMAGE_ROWS: (rows, floats)}
        check_tensors(path, self._session, expected)

    def encode_images(self, pixels: Floats, cancellation: Cancellation = NEVER) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""
        feeds = {spec.PIXELS: pixels}
        rows: Floats = run_stoppable(
            "the vision tower", cancellation, lambda options: self._session.run([spec.IMAGE_ROWS], feeds, options)[0]
        )
        return rows


class GraphFormat(Protocol):
    """The part of a manifest that says what a decoder graph is like."""

    @property
    def dialect(self) -> DialectName: ...

    @property
    def model(self) -> ModelConfig: ...


def open_decoder(path: Path, manifest: GraphFormat, options: OrtOptions) -> DecoderEngine:
    """Load the decoder graph at ``path``, which may be a variant of the bundle's own."""
    if manifest.dialect == "ort":
        return OrtDecoder(path, manifest.model.decoder, options)
    check_dialect(path, manifest.dialect, options.device)
    return OnnxDecoder(path, manifest.model.decoder, options)


KV_PARTS = ("keys", "values")


@dataclass(frozen=True, eq=False)
class OrtBuffers:
    """K/V buffers on the decoder's device: key and value of each layer in turn, [1, H, capacity, padded D]."""

    buffers: list[Buffer]

    @property
    def arrays(self) -> list[Array]:
        """The contents: the buffers themselves in host memory, copies of those on a GPU."""
        return [buffer.numpy() for buffer in self.buffers]

    @property
    def capacity(self) -> int:
        return self.buffers[0].positions

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class OrtDecoder:
    """The decoder's session; see :class:`owl2.runtime.engine.DecoderEngine`."""

    def __init__(self, path: Path, config: DecoderConfig, options: OrtOptions) -> None:
        self._config = config
        self._session = open_session(path, options)
        self._names = cache_names(config)
        self._dtype, _ = element_of(path, self._session, spec.EMBEDS, options.activations)
        self._kv_dtype, element = element_of(path, self._session, self._names[0][0], options.kv_cache)
        self._width = spec.padded_head_dim(config)
        buffer = ((None, config.num_attention_heads, None, self._width), element)
        expected = {
            spec.EMBEDS: ((None, None, config.hidden_size), None),
            spec.LOGITS: ((None, config.vocab_size), "tensor(float)"),
            **{name: buffer for pair in self._names for name in pair},
        }
        check_tensors(path, self._session, expected)
        self._memory = Memory.of(options.device)
        # A binding keeps the session alive: here, and not in the buffers, it goes with the decoder.
        self._feeds: WeakKeyDictionary[OrtBuffers, StepFeeds] = WeakKeyDictionary()

    def allocate(self, capacity: int, previous: KvBuffers | None) -> OrtBuffers:
        """Each buffer is bound as past and as present of its layer, so that steps write in place."""
        if previous is None:
            shape = (1, self._config.num_attention_heads, capacity, self._width)
            return self._bound([self._memory.zeros(shape, self._kv_dtype) for _ in self._names], capacity)
        return self._bound([self._memory.grown(old, capacity) for old in own(previous, OrtBuffers).buffers], capacity)

    @property
    def kv_transfer(self) -> KvTransfer:
        # The scales of int8 are in the graph.
        form = "int8-calibrated" if self._kv_dtype == np.int8 else np.dtype(self._kv_dtype).name.replace("float", "fp")
        return KvTransfer(form, self._read_kv, self._write_kv)

    def _read_kv(self, buffers: KvBuffers, positions: int) -> KvContent:
        arrays, width = own(buffers, OrtBuffers, positions).arrays, self._config.head_dim
        kept = [np.ascontiguousarray(array[0, :, :positions, :width]) for array in arrays]
        parts = {name: np.stack(kept[index::2]).view(np.uint8).ravel() for index, name in enumerate(KV_PARTS)}
        return KvContent(self.kv_transfer.form, positions, parts)

    def _write_kv(self, content: KvContent, capacity: int) -> OrtBuffers:
        heads, width = self._config.num_attention_heads, self._config.head_dim
        layers = [
            content.parts[name].view(self._kv_dtype).reshape(-1, heads, content.positions, width) for name in KV_PARTS
        ]
        arrays = [np.zeros((1, heads, capacity, self._width), self._kv_dtype) for _ in self._names]
        for index, array in enumerate(arrays):
            array[0, :, : content.positions, :width] = layers[index % 2][index // 2]
        return self._bound([self._memory.holding(array) for array in arrays], capacity)

    def _bound(self, buffers: list[Buffer], capacity: int) -> OrtBuffers:
        binding = self._session.io_binding()
        for buffer, (past, present) in zip(buffers, self._names):
            binding.bind_ortvalue_input(past, buffer.value)
            binding.bind_ortvalue_output(present, buffer.value)
        made, feeds = OrtBuffers(buffers), StepFeeds(binding, self._memory)
        if not self._tables_vary(capacity):
            feeds.fix(self._tables(capacity))
        self._feeds[made] = feeds
        return made

    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        feeds = self._feeds_of(buffers, past + len(embeds))
        rows = row_inputs(modality, logit_rows)
        feeds.is_text_step = False
        feeds.put(rows)
        return self._step(embeds, past, buffers.capacity, feeds, cancellation)

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        feeds = self._feeds_of(buffers, past + len(embeds))
        if not feeds.is_text_step:
            feeds.put(TEXT_STEP)
            feeds.is_text_step = True
        logits: Floats = self._step(embeds, past, buffers.capacity, feeds, cancellation)[0]
        return logits

    def _feeds_of(self, buffers: KvBuffers, total: int) -> StepFeeds:
        feeds = self._feeds.get(own(buffers, OrtBuffers, total))
        if feeds is None:
            raise BackendError("these K/V buffers belong to another model")
        return feeds

    def _step(self, embeds: Floats, past: int, capacity: int, feeds: StepFeeds, cancellation: Cancellation) -> Floats:
        total = past + len(embeds)
        inputs: StepInputs = {
            spec.EMBEDS: embeds[None].astype(self._dtype, copy=False),
            spec.LENGTHS: np.array([total - 1], dtype=np.int32),
            spec.TOTAL_LENGTH: np.array(total, dtype=np.int32),
        }
        if self._tables_vary(capacity):
            inputs |= self._tables(total)
        feeds.put(inputs)  # `inputs` keeps the arrays until the step has ended
        return run_bound(self._session, feeds.binding, cancellation)

    def _tables_vary(self, capacity: int) -> bool:
        """Whether the rotary tables depend on the step while a conversation fills this many positions."""
        limit = self._config.steady_limit
        return limit is not None and capacity > limit

    def _tables(self, total: int) -> StepInputs:
        cos, sin = rotary_tables(self._config, total, self._width, self._dtype)
        return {spec.ROTARY_COS: cos, spec.ROTARY_SIN: sin}
