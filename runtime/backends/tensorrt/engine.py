"""Native TensorRT backend: engines built ahead, keys and values on the GPU, nothing between but the calls themselves.

Keys and values of all layers lie in one allocation [2 · layers, capacity, W], zeros at first: what the mask hides must
be finite. A step reads the cached rows where they lie. Prefill has the new rows written right behind them. Decoding
has them written to a fixed place, from where one copy on the GPU brings them behind the cached ones: so every address
of a step stays the same while S does, and the step can be replayed as a CUDA graph. S is rounded up to a multiple of
256 for that, and the mask hides the difference.

What crosses to and from the host: rows of embeddings, mask, angles and indices; logits of the rows asked for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from owl2.runtime import spec
from owl2.runtime.backends.steps import attention_mask, row_inputs
from owl2.runtime.backends.tensorrt.context import (
    Context,
    Messages,
    Shape,
    check_engine,
    import_tensorrt,
    load_engine,
    makes_graphs,
    shared_scratch,
)
from owl2.runtime.backends.tensorrt.cuda import Gpu, Slots, Strided, open_gpu
from owl2.runtime.backends.tensorrt.records import (
    DECODE_PROFILE,
    DECODER_ENGINE,
    PREFILL_PROFILE,
    VISION_ENGINE,
    EngineRecord,
    find_engines,
    find_record,
)
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.config import ModelConfig, require
from owl2.runtime.engine import PREFILL_BLOCK, EngineOptions, Floats, Ints, KvBuffers
from owl2.runtime.errors import BackendError
from owl2.runtime.placement import EngineKind
from owl2.runtime.rope import rotary_tables
from owl2.runtime.spec import FloatType

DTYPES: dict[FloatType, type[np.float32 | np.float16]] = {"fp32": np.float32, "fp16": np.float16}
BUCKET = 256
"""S is a multiple of it while decoding: a CUDA graph serves as many steps."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """How engines are opened.

    Attributes:
        kind: which library runs them.
        cuda_graphs: replay decoding steps as CUDA graphs.
    """

    kind: EngineKind = "tensorrt"
    cuda_graphs: bool = True


@dataclass(eq=False)
class DeviceRows:
    """K/V rows of all layers in one allocation of a GPU: [2 · layers, capacity, W], keys and values in turn.

    Attributes:
        address: of the allocation.
        count: 2 · layers.
        capacity: positions they hold.
        row: bytes of a row, a multiple of 256.
        written: positions that may hold something; zeros behind them.
    """

    address: int
    count: int
    capacity: int
    row: int
    written: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.count * self.pitch

    @property
    def pitch(self) -> int:
        """Bytes from the rows of one tensor to those of the next."""
        return self.capacity * self.row

    def at(self, index: int, position: int) -> int:
        """Address of a position's row in tensor ``index``."""
        return self.address + index * self.pitch + position * self.row

    def begin(self, past: int, total: int, device: Gpu, stream: int) -> None:
        """Before a step writes positions ``past`` to ``total``: forget those of earlier steps that were undone.

        Decoding reads rows behind ``past``. The mask is added to their scores, which hides numbers but not NaN, and
        an undone step may have left that.
        """
        self.written, stale = max(self.written, total), self.written
        if stale > past:
            for index in range(self.count):
                device.clear(self.at(index, past), (stale - past) * self.row, stream)
            self.written = total


def prepare(folder: Path, manifest: Manifest, options: EngineOptions) -> Callable[[Bundle], TensorRtEngine]:
    """Check that the device is available and that the bundle has engines for it.

    See :data:`owl2.runtime.backends.choose.Backend`.

    Raises:
        BackendUnavailableError: the device is not available, or the engines are for another one.
        BundleError: the bundle has no engines, or their record cannot be used.
        ConfigError: settings that the device or the engines do not have.
    """
    device, dialect = options.device, manifest.dialect
    require(
        dialect == "onnx",
        f"device {device} runs engines that are built from graphs of the dialect onnx, this bundle has the dialect "
        f"{dialect}; export the checkpoint again with --dialect onnx",
    )
    require(options.threads is None, f"threads {options.threads}: device {device} has none to set; leave them out")
    manifest.kv_type(options.kv_cache)
    kind = cast(EngineKind, device.kind)
    gpu, trt = open_gpu(device.index), import_tensorrt(kind)
    record = find_record(folder, manifest, kind, gpu.name, gpu.compute_capability, str(trt.__version__))
    require(
        options.context is None or options.context <= record.context,
        f"context {options.context} exceeds the {record.context} positions that this bundle's engines were built for; "
        "choose a smaller one or build them again with a larger --context",
    )
    return lambda bundle: TensorRtEngine(bundle, TensorRtOptions(kind), trt, gpu)


class TensorRtEngine:
    """See :class:`owl2.runtime.engine.Engine`. Steps of several threads run one after the other."""

    def __init__(self, bundle: Bundle, options: TensorRtOptions, trt: Any, device: Gpu) -> None:  # noqa: ANN401
        """Load the engines of a verified bundle.

        Args:
            bundle: of the dialect onnx, with engines.
            options: how.
            trt: the module ``tensorrt`` or ``tensorrt_rtx``.
            device: the GPU.

        Raises:
            BackendUnavailableError: the engines are for another GPU or another TensorRT.
            BundleError: there are none, or their files or graphs are not what was recorded.
            BackendError: TensorRT refuses them, or they do not fit the manifest, or the GPU's memory.
        """
        activations = bundle.manifest.activations
        device.use()
        folder, self.record = find_engines(
            bundle, options.kind, device.name, device.compute_capability, str(trt.__version__)
        )
        self._model, self._device = bundle.manifest.model, device
        self._dtype: DTypeLike = DTYPES[activations]
        self._lock = threading.Lock()
        self._parts = parts = _Parts(device)
        self.close = weakref.finalize(self, parts.close)
        """Give everything back but K/V buffers, which go with their owners; also happens by itself."""
        with _closing_on_error(self.close):
            logger = parts.messages.logger(trt)
            runtime = trt.Runtime(logger)
            decoder, vision = (
                load_engine(runtime, folder / name, parts.messages) for name in (DECODER_ENGINE, VISION_ENGINE)
            )
            floats = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF}[activations]
            expected = decoder_tensors(self._model, floats, trt.DataType.FLOAT, trt.DataType.INT64)
            check_engine(trt, decoder, folder / DECODER_ENGINE, expected, 2)
            check_engine(trt, vision, folder / VISION_ENGINE, vision_tensors(self._model, trt.DataType.FLOAT), 1)
            graphs = options.cuda_graphs

            def context(engine: Any, profile: int) -> Context:  # noqa: ANN401 - TensorRT has no types
                return Context(trt, engine, profile, parts.stream, parts.messages, graphs)

            self._prefill = context(decoder, PREFILL_PROFILE)
            self._decode = context(decoder, DECODE_PROFILE)
            self._vision = context(vision, 0)
            # What TensorRT made must go in this order, and before the stream.
            parts.native = [self._prefill, self._decode, self._vision, decoder, vision, runtime, logger]
            parts.scratch = shared_scratch(device, [self._prefill, self._decode, self._vision])
            self._decoding = _Decoding(self._model, self.record, self._dtype, parts, self._decode)
            self._decoding.graphs = graphs and not makes_graphs(trt)
            self._no_rows = parts.fixed.reserve("no cached rows", self._row)
            device.clear(self._no_rows, self._row, parts.stream)
            device.synchronize(parts.stream)

    @property
    def context(self) -> int:
        """Positions that a conversation can take."""
        return self.record.context

    @property
    def block(self) -> int:
        """New positions of a prefill step."""
        return min(PREFILL_BLOCK, self.record.prefill)

    @property
    def _row(self) -> int:
        """Bytes of a K/V row."""
        return spec.kv_row_width(self._model.decoder) * np.dtype(self._dtype).itemsize

    def allocate(self, capacity: int, previous: KvBuffers | None) -> DeviceRows:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``; copied on the GPU."""
        count, row = 2 * self._model.decoder.num_hidden_layers, self._row
        with self._step() as stream:
            made = DeviceRows(self._device.allocate(count * capacity * row), count, capacity, row)
            weakref.finalize(made, _free, self._device, made.address)
            self._device.clear(made.address, made.nbytes, stream)
            if isinstance(previous, DeviceRows):
                source, target = Strided(previous.address, previous.pitch), Strided(made.address, made.pitch)
                made.written = min(capacity, previous.written)
                self._device.copy(target, source, min(capacity, previous.capacity) * row, count, stream)
            self._device.synchronize(stream)
        return made

    def prefill(self, embeds: Floats, modality: Ints, past: int, buffers: KvBuffers, logit_rows: Ints) -> Floats:
        """Run T mixed positions after ``past`` cached ones -> logits [R, V]; in blocks where the engine is small."""
        rows = _own(buffers, past + len(embeds))
        decoder = self._model.decoder
        logits = np.empty((len(logit_rows), decoder.vocab_size), np.float32)
        # Angles may depend on the whole length, so they are those of the whole step in every block.
        cos, sin = rotary_tables(decoder, past + len(embeds), decoder.head_dim, self._dtype)
        start = 0
        while start < len(embeds):
            end = block_end(self.record, len(embeds), start, past + start)
            wanted = np.flatnonzero((logit_rows >= start) & (logit_rows < end))
            inputs = routed(modality[start:end], logit_rows[wanted] - start)
            span = slice(past + start, past + end)
            inputs[spec.ROTARY_COS], inputs[spec.ROTARY_SIN] = cos[span], sin[span]
            made = self._block(embeds[None, start:end], inputs, past + start, rows)
            logits[wanted] = made[: len(wanted)]
            start = end
        return logits

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""
        rows = _own(buffers, past + 1)
        require(past < self.context, f"position {past} does not fit the engine's context of {self.context}")
        with self._step() as stream:
            return self._decoding.run(embeds, past, rows, stream)

    def encode_images(self, pixels: Floats) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""
        most = self.record.images
        blocks = [self._encode(pixels[start : start + most]) for start in range(0, len(pixels), most)]
        return np.concatenate(blocks)

    def _encode(self, pixels: Floats) -> Floats:
        rows = np.empty((len(pixels), self._model.rows_per_image, self._model.decoder.hidden_size), np.float32)
        pixels = np.ascontiguousarray(pixels, np.float32)
        slots = self._parts.growing
        with self._step() as stream:
            self._vision.bind(spec.PIXELS, slots.upload(spec.PIXELS, pixels, stream), pixels.shape)
            target = slots.reserve(spec.IMAGE_ROWS, rows.nbytes)
            self._vision.bind(spec.IMAGE_ROWS, target)
            self._vision.enqueue("the vision tower")
            self._device.download(rows, target, stream)
            self._device.synchronize(stream)
        return rows

    def _block(self, embeds: Floats, inputs: dict[str, NDArray[Any]], past: int, rows: DeviceRows) -> Floats:
        """One step of at most the engine's size -> logits of all of its ``logit_rows``."""
        tokens, cached, slots, context = embeds.shape[1], max(past, 1), self._parts.growing, self._prefill
        feeds = {
            spec.EMBEDS: embeds.astype(self._dtype),
            spec.ATTENTION_MASK: attention_mask(tokens, past, cached).astype(self._dtype),
            **inputs,
        }
        feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        logits = np.empty((len(inputs[spec.LOGIT_ROWS]), self._model.decoder.vocab_size), np.float32)
        with self._step() as stream:
            rows.begin(past, past + tokens, self._device, stream)
            for name, array in feeds.items():
                context.bind(name, slots.upload(name, array, stream), array.shape)
            shape = (cached, spec.kv_row_width(self._model.decoder))
            for index, (read, written) in enumerate(cache_names(self._model)):
                # Before there are any cached rows, one is given that nobody writes to.
                context.bind(read, rows.at(index, 0) if past else self._no_rows, shape)
                context.bind(written, rows.at(index, past))
            target = slots.reserve(spec.LOGITS, logits.nbytes)
            context.bind(spec.LOGITS, target)
            context.enqueue("the decoder")
            self._device.download(logits, target, stream)
            self._device.synchronize(stream)
        return logits

    @contextlib.contextmanager
    def _step(self) -> Iterator[int]:
        """One thread at a time; after an error nothing is left running that arrays of this step are needed for."""
        with self._lock:
            if not self.close.alive:
                raise BackendError("this engine was closed; load the bundle again")
            self._device.use()
            try:
                yield self._parts.stream
            except BaseException:
                with contextlib.suppress(BackendError):
                    self._device.synchronize(self._parts.stream)
                raise


class _Parts:
    """What an engine has to give back, apart from it so that a finalizer can hold it."""

    def __init__(self, device: Gpu) -> None:
        self.device = device
        self.messages = Messages()
        self.stream = device.create_stream()
        self.native: list[Any] = []
        self.scratch = 0
        self.graph = 0
        self.fixed, self.growing = Slots(device), Slots(device)

    def drop_graph(self) -> None:
        if self.graph:
            graph, self.graph = self.graph, 0
            self.device.destroy_graph(graph)

    def close(self) -> None:
        """Errors are of no use here: the process may be about to end, or the GPU may have failed before."""
        with contextlib.suppress(BackendError):
            self.device.use()
            self.device.synchronize(self.stream)
        with contextlib.suppress(BackendError):
            self.drop_graph()
        for part in self.native:
            if isinstance(part, Context):
                part.close()
        self.native.clear()
        for slots in (self.fixed, self.growing):
            with contextlib.suppress(BackendError):
                slots.close()
        with contextlib.suppress(BackendError):
            if self.scratch:
                self.device.free(self.scratch)
            self.device.destroy_stream(self.stream)


class _Decoding:
    """Steps of one position: inputs at fixed places with room for the longest step, one CUDA graph at a time.

    A graph is undefined once its context has been given other shapes or addresses, so there is one for the present
    buffers and S; the first step with new ones runs by itself, which TensorRT wants before it is captured.
    """

    def __init__(
        self, model: ModelConfig, record: EngineRecord, dtype: DTypeLike, parts: _Parts, context: Context
    ) -> None:
        self.graphs = True
        self._model, self._record, self._dtype, self._parts, self._context = model, record, dtype, parts, context
        self._key: tuple[int, int, int] | None = None
        self._row = spec.kv_row_width(model.decoder) * np.dtype(dtype).itemsize
        one = np.zeros(1, dtype=np.int64)
        constants = row_inputs(one, one)
        for name, array in constants.items():
            context.bind(name, parts.fixed.upload(name, array, parts.stream), array.shape)
        # So that no step has to allocate: a graph goes on reading where these lay when it was captured.
        half, item = model.decoder.head_dim // 2, np.dtype(dtype).itemsize
        self._places = {
            name: parts.fixed.reserve(name, count * item)
            for name, count in (
                (spec.EMBEDS, model.decoder.hidden_size),
                (spec.ATTENTION_MASK, record.context + 1),
                (spec.ROTARY_COS, half),
                (spec.ROTARY_SIN, half),
            )
        }
        names = list(cache_names(model))
        self._new = parts.fixed.reserve("new rows", len(names) * self._row)
        for index, (_, written) in enumerate(names):
            context.bind(written, self._new + index * self._row)
        self._logits = parts.fixed.reserve(spec.LOGITS, model.decoder.vocab_size * 4)
        context.bind(spec.LOGITS, self._logits)
        parts.device.synchronize(parts.stream)

    def run(self, embeds: Floats, past: int, rows: DeviceRows, stream: int) -> Floats:
        """One step -> logits [V]."""
        device, decoder = self._parts.device, self._model.decoder
        cached = decode_rows(past, rows.capacity, self._record.context)
        rows.begin(past, past + 1, device, stream)
        cos, sin = rotary_tables(decoder, past + 1, decoder.head_dim, self._dtype)
        feeds = {
            spec.EMBEDS: embeds[None].astype(self._dtype),
            spec.ATTENTION_MASK: attention_mask(1, past, cached).astype(self._dtype),
            spec.ROTARY_COS: cos[past : past + 1],
            spec.ROTARY_SIN: sin[past : past + 1],
        }
        for name, array in feeds.items():
            device.upload(self._places[name], array, stream)
        key = rows.address, rows.pitch, cached
        if key == self._key:
            self._repeat(stream)
        else:
            self._bind(rows, cached, {name: array.shape for name, array in feeds.items()})
            self._context.enqueue("the decoder")
            self._key = key
        target = Strided(rows.at(0, past), rows.pitch)
        device.copy(target, Strided(self._new, self._row), self._row, rows.count, stream)
        logits = np.empty(decoder.vocab_size, np.float32)
        device.download(logits, self._logits, stream)
        device.synchronize(stream)
        return logits

    def _bind(self, rows: DeviceRows, cached: int, shapes: dict[str, Shape]) -> None:
        self._key = None
        self._parts.drop_graph()
        for name, fed in shapes.items():
            self._context.bind(name, self._places[name], fed)
        shape = (cached, spec.kv_row_width(self._model.decoder))
        for index, (read, _) in enumerate(cache_names(self._model)):
            self._context.bind(read, rows.at(index, 0), shape)

    def _repeat(self, stream: int) -> None:
        """The step that ran before, with other contents."""
        if self.graphs and not self._parts.graph:
            self._capture(stream)
        if self._parts.graph:
            self._parts.device.launch(self._parts.graph, stream)
        else:
            self._context.enqueue("the decoder")

    def _capture(self, stream: int) -> None:
        device = self._parts.device
        try:
            device.begin_capture(stream)
            try:
                self._context.enqueue("capturing the decoder")
            except BaseException:
                with contextlib.suppress(BackendError):
                    device.destroy_graph(device.end_capture(stream))
                raise
            self._parts.graph = device.end_capture(stream)
        except BackendError as error:
            # Graphs save time between kernels, no more: the conversation goes on without.
            self.graphs = False
            log.warning("decoding goes on without CUDA graphs: %s", error)


def decoder_tensors(model: ModelConfig, floats: Any, float32: Any, int64: Any) -> dict[str, tuple[Shape, Any]]:  # noqa: ANN401
    """Shape, -1 where it varies, and type of each input and output of the decoder."""
    decoder, width = model.decoder, spec.kv_row_width(model.decoder)
    indices = (spec.MODALITY, spec.TEXT_ROWS, spec.IMAGE_ROW_INDEX, spec.ROW_ORDER, spec.LOGIT_ROWS)
    half = decoder.head_dim // 2
    return {
        spec.EMBEDS: ((1, -1, decoder.hidden_size), floats),
        **dict.fromkeys(indices, ((-1,), int64)),
        spec.ATTENTION_MASK: ((-1, -1), floats),
        spec.ROTARY_COS: ((-1, half), floats),
        spec.ROTARY_SIN: ((-1, half), floats),
        **{name: ((-1, width), floats) for names in cache_names(model) for name in names},
        spec.LOGITS: ((-1, decoder.vocab_size), float32),
    }


def vision_tensors(model: ModelConfig, float32: Any) -> dict[str, tuple[Shape, Any]]:  # noqa: ANN401
    """Shape, -1 where it varies, and type of the input and the output of the vision tower."""
    size = model.vision.image_size
    return {
        spec.PIXELS: ((-1, 3, size, size), float32),
        spec.IMAGE_ROWS: ((-1, model.rows_per_image, model.decoder.hidden_size), float32),
    }


def cache_names(model: ModelConfig) -> list[tuple[str, str]]:
    """Names of what is read and what is written, of each key and value tensor in the order of :class:`DeviceRows`."""
    layers = range(model.decoder.num_hidden_layers)
    return [pair for layer in layers for pair in zip(spec.past_names(layer), spec.present_names(layer))]


def block_end(record: EngineRecord, count: int, start: int, past: int) -> int:
    """Where a block that begins at row ``start`` of ``count`` ends, with ``past`` positions cached before it.

    Raises:
        ConfigError: not one row fits the engine.
    """
    room = record.context - past
    require(room > 0, f"position {past} does not fit the engine's context of {record.context}")
    return min(count, start + min(record.prefill, room))


def routed(modality: Ints, logit_rows: Ints) -> dict[str, NDArray[Any]]:
    """:func:`row_inputs` for engines, which take no empty list of text rows or logit rows: row 0 stands in.

    The stand-in for text rows is put in front of the image rows, where the order leaves it out.
    """
    inputs: dict[str, NDArray[Any]] = {**row_inputs(modality, logit_rows)}
    nothing = np.zeros(1, dtype=np.int64)
    if not len(inputs[spec.TEXT_ROWS]):
        inputs[spec.TEXT_ROWS] = nothing
        inputs[spec.ROW_ORDER] = inputs[spec.ROW_ORDER] + 1
    if not len(logit_rows):
        inputs[spec.LOGIT_ROWS] = nothing
    return inputs


def decode_rows(past: int, capacity: int, context: int) -> int:
    """S of a decoding step: a multiple of 256 and more than ``past``, as far as buffers and engine reach."""
    return min((past // BUCKET + 1) * BUCKET, capacity, context)


def _own(buffers: KvBuffers, total: int) -> DeviceRows:
    if not isinstance(buffers, DeviceRows):
        raise BackendError(f"these K/V buffers belong to another backend: {type(buffers).__name__}")
    require(total <= buffers.capacity, f"{total} positions do not fit K/V buffers of {buffers.capacity}")
    return buffers


def _free(device: Gpu, address: int) -> None:
    """Runs wherever and whenever Python drops the owner."""
    with contextlib.suppress(BackendError):
        device.use()
        device.free(address)


@contextlib.contextmanager
def _closing_on_error(close: Any) -> Iterator[None]:  # noqa: ANN401 - a finalizer
    try:
        yield
    except BaseException:
        close()
        raise
