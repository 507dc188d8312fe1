"""Native TensorRT backend: engines built ahead of time, keys and values on the GPU; docs/devices.md describes a step.

Host and GPU exchange rows of embeddings, mask, angles and indices, and the logits that are asked for.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np

from owl2.runtime import spec
from owl2.runtime.backends.steps import StepInputs, cache_names, position_inputs, row_inputs
from owl2.runtime.backends.tensorrt.context import Context, Resources, captures_graphs, load_engine
from owl2.runtime.backends.tensorrt.cuda import Gpu, open_gpu
from owl2.runtime.backends.tensorrt.decoding import Decoding
from owl2.runtime.backends.tensorrt.module import import_tensorrt
from owl2.runtime.backends.tensorrt.records import (
    DECODE_PROFILE,
    DECODER_ENGINE,
    PREFILL_PROFILE,
    VISION_ENGINE,
    EngineRecord,
    check_files,
    find_record,
)
from owl2.runtime.backends.tensorrt.rows import DeviceRows
from owl2.runtime.backends.tensorrt.tensors import check_engine, decoder_tensors, vision_tensors, with_stand_ins
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.config import require
from owl2.runtime.engine import CLOSED, PREFILL_BLOCK, EngineOptions, Floats, Ints, KvBuffers, own
from owl2.runtime.errors import BackendError, BundleCorruptError
from owl2.runtime.placement import EngineKind
from owl2.runtime.verification import signatures_of


def prepare(folder: Path, manifest: Manifest, options: EngineOptions) -> Callable[[Bundle], TensorRtEngine]:
    """See :data:`owl2.runtime.backends.choose.Backend`; the bundle must have engines for the device."""
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
    record = find_record(folder, manifest, kind, gpu.name, gpu.compute_capability, trt.__version__)
    require(
        options.context is None or options.context <= record.context,
        f"context {options.context} exceeds the {record.context} positions that this bundle's engines were built for; "
        "choose a smaller one or build them again with a larger --context",
    )
    return lambda bundle: TensorRtEngine(bundle, record, trt, gpu)


class TensorRtEngine:
    """See :class:`owl2.runtime.engine.Engine`. Steps of several threads run one after the other."""

    rows_are_independent = False

    def __init__(self, bundle: Bundle, record: EngineRecord, trt: ModuleType, gpu: Gpu) -> None:
        """Load the engines of a verified bundle.

        Raises:
            BundleCorruptError: their files are not what was recorded.
            BackendError: TensorRT refuses them, or they do not fit the manifest, or the GPU's memory.
        """
        model, activations = bundle.manifest.model, bundle.manifest.activations
        folder = record.folder_in(bundle.folder)
        signatures = signatures_of(folder, record.files)
        check_files(bundle.folder, record)
        gpu.use()
        self._record, self._model, self._gpu = record, model, gpu
        self._dtype: type[np.float32 | np.float16] = np.float16 if activations == "fp16" else np.float32
        self._names = cache_names(model.decoder)
        self._row = spec.kv_row_width(model.decoder) * np.dtype(self._dtype).itemsize
        self._lock = threading.Lock()
        self._resources = resources = Resources(gpu)
        self._give_back = weakref.finalize(self, resources.close)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._give_back)
            stream, messages = resources.stream, resources.messages
            logger = messages.logger(trt)
            runtime = trt.Runtime(logger)
            paths = [folder / name for name in (DECODER_ENGINE, VISION_ENGINE)]
            decoder, vision = (load_engine(runtime, path, messages) for path in paths)
            if signatures_of(folder, record.files) != signatures:
                raise BundleCorruptError(f"{folder} changed while its engines were loaded; load the bundle again")
            check_engine(trt, decoder, paths[0], decoder_tensors(trt, model, activations), profiles=2)
            check_engine(trt, vision, paths[1], vision_tensors(trt, model), profiles=1)
            self._prefill = Context(trt, decoder, PREFILL_PROFILE, stream, messages)
            decode = Context(trt, decoder, DECODE_PROFILE, stream, messages)
            self._vision = Context(trt, vision, 0, stream, messages)
            resources.keep([self._prefill, decode, self._vision], [decoder, vision, runtime, logger])
            self._decoding = Decoding(
                model.decoder,
                decode,
                resources,
                positions=record.context,
                dtype=self._dtype,
                captures=not captures_graphs(trt),
            )
            self._no_rows = resources.fixed.reserve("no cached rows", self._row)
            gpu.clear(self._no_rows, self._row, stream)
            gpu.synchronize(stream)
            on_error.pop_all()

    @property
    def context(self) -> int:
        return self._record.context

    @property
    def block(self) -> int:
        return min(PREFILL_BLOCK, self._record.prefill)

    def close(self) -> None:
        """Wait for a step that is running, and give everything back but K/V buffers."""
        with self._lock:
            self._give_back()

    def allocate(self, capacity: int, previous: KvBuffers | None) -> DeviceRows:
        with self._step() as stream:
            made = DeviceRows.zeros(self._gpu, len(self._names), capacity, self._row, stream)
            if previous is not None:
                made.copy_from(own(previous, DeviceRows), stream)
            self._gpu.synchronize(stream)
        return made

    stepping = None
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
        """Run T mixed positions in blocks of the engine's size -> logits [R, V]."""
        decoder, total = self._model.decoder, past + len(embeds)
        rows = own(buffers, DeviceRows, total)
        logits = np.empty((len(logit_rows), decoder.vocab_size), np.float32)
        start = 0
        while start < len(embeds):
            cancellation.check()
            first = past + start
            end = start + block_size(self._record, len(embeds) - start, first)
            wanted = np.flatnonzero((logit_rows >= start) & (logit_rows < end))
            inputs = {
                spec.EMBEDS: embeds[None, start:end].astype(self._dtype),
                **with_stand_ins(row_inputs(modality[start:end], logit_rows[wanted] - start)),
                **position_inputs(decoder, first, end - start, max(first, 1), self._dtype, total),
            }
            made = self._prefill_block(inputs, first, end - start, rows)
            logits[wanted] = made[: len(wanted)]
            start = end
        return logits

    def _prefill_block(self, inputs: StepInputs, past: int, tokens: int, rows: DeviceRows) -> Floats:
        """One step of at most the engine's size -> logits of all of its ``logit_rows``."""
        slots, context = self._resources.growing, self._prefill
        inputs = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        logits = np.empty((len(inputs[spec.LOGIT_ROWS]), self._model.decoder.vocab_size), np.float32)
        with self._step() as stream:
            rows.begin(past, past + tokens, stream)
            for name, array in inputs.items():
                context.bind(name, slots.upload(name, array, stream), array.shape)
            shape = (max(past, 1), spec.kv_row_width(self._model.decoder))
            for index, (read, written) in enumerate(self._names):
                # An engine reads at least one row: where none is cached, one that nothing writes to.
                context.bind(read, rows.at(index, 0) if past else self._no_rows, shape)
                context.bind(written, rows.at(index, past))
            target = slots.reserve(spec.LOGITS, logits.nbytes)
            context.bind(spec.LOGITS, target)
            context.enqueue("the decoder")
            self._gpu.download(logits, target, stream)
            self._gpu.synchronize(stream)
        return logits

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        rows = own(buffers, DeviceRows, past + 1)
        cancellation.check()
        block_size(self._record, 1, past)
        with self._step():
            return self._decoding.run(embeds, past, rows)

    def encode_images(self, pixels: Floats, cancellation: Cancellation = NEVER) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]; in blocks of the engine's size."""
        size, slots = self._record.images, self._resources.growing
        rows = np.empty((len(pixels), self._model.rows_per_image, self._model.decoder.hidden_size), np.float32)
        for start in range(0, len(pixels), size):
            cancellation.check()
            block = np.ascontiguousarray(pixels[start : start + size], np.float32)
            made = rows[start : start + size]
            with self._step() as stream:
                self._vision.bind(spec.PIXELS, slots.upload(spec.PIXELS, block, stream), block.shape)
                target = slots.reserve(spec.IMAGE_ROWS, made.nbytes)
                self._vision.bind(spec.IMAGE_ROWS, target)
                self._vision.enqueue("the vision tower")
                self._gpu.download(made, target, stream)
                self._gpu.synchronize(stream)
        return rows

    @contextlib.contextmanager
    def _step(self) -> Iterator[int]:
        """The stream, for one thread at a time; an error leaves nothing running that needs arrays of this step."""
        with self._lock:
            if not self._give_back.alive:
                raise BackendError(CLOSED)
            self._gpu.use()
            try:
                yield self._resources.stream
            except BaseException:
                with contextlib.suppress(BackendError):
                    self._gpu.synchronize(self._resources.stream)
                raise


def block_size(record: EngineRecord, count: int, past: int) -> int:
    """Rows, of ``count``, that a step after ``past`` cached positions takes; ConfigError if not one fits the engine."""
    room = record.context - past
    require(room > 0, f"position {past} does not fit the engine's context of {record.context}")
    return min(count, record.prefill, room)
