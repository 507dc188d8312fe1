"""The way from a checkpoint to a bundle, on one screen."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from owl2.export import __version__
from owl2.export.checkpoint import Checkpoint
from owl2.export.config import BYTES, ExportConfig
from owl2.export.decoder import ExportedDecoder, Streams, export_decoder
from owl2.export.graph.kv_int8 import MINIMUM_ONNXRUNTIME as KV_INT8_ONNXRUNTIME
from owl2.export.graph.kv_int8 import write_int8_kv_graph
from owl2.export.graph.ort import MINIMUM_ONNXRUNTIME
from owl2.export.kv_int8 import FloatLogits, can_be_checked, check_codes, summary
from owl2.export.kv_int8 import compare as compare_kv_int8
from owl2.export.model import Owl2Model
from owl2.export.parity import Parity, compare, with_float_activations
from owl2.export.progress import Reporter, Silent
from owl2.export.prompts import Prompts, fingerprint, pictures_of, prepare
from owl2.export.report import Accuracy, AccuracyMeter, CalibrationRecord, KvInt8, Report
from owl2.export.staging import Staging, check_space, disk_errors
from owl2.export.vision import ExportedVision, export_vision
from owl2.quant.calibration import CalibrationSet, load_calibration
from owl2.quant.kv import RoundedStream
from owl2.quant.stream import Sequence, Stream
from owl2.runtime import spec
from owl2.runtime.backends.ort import OrtDecoder, OrtOptions
from owl2.runtime.bundle import Bundle, FileEntry, Manifest, WeightFormat, hash_file
from owl2.runtime.config import ModelConfig
from owl2.runtime.engine import Decoder, Floats, Ints, KvBuffers
from owl2.runtime.errors import BundleError, CheckpointError
from owl2.runtime.generate import peak_memory
from owl2.runtime.multimodal import embed
from owl2.runtime.spec import KvType
from owl2.runtime.tokenizer import Tokenizer

# So many text positions at the end of a probe are decoded one by one, to compare the cached step too.
DECODED_STEPS = 4


def export_bundle(config: ExportConfig, reporter: Reporter | None = None) -> Report:
    """Convert a checkpoint; the bundle appears whole, or not at all.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
        CalibrationError, QuantizationError: the weights cannot be quantized with this data.
        ParityError: a graph does not compute what torch computes.
        ExportError: the target exists, or the disk is full.
    """
    began = time.perf_counter()
    reporter = reporter or Silent()
    staging = Staging(config.bundle, overwrite=config.overwrite)
    with Checkpoint(config.checkpoint) as checkpoint:
        data, prompts = _prompts(config, checkpoint)
        needed = estimate_size(checkpoint.config, config)
        with staging, disk_errors(staging.folder, needed):
            check_space(staging.folder, needed)
            folder = staging.folder
            for name in spec.TOKENIZER_FILES:
                shutil.copyfile(checkpoint.folder / name, folder / name)
            measured = set(pictures_of(prompts.measured))
            vision = export_vision(checkpoint, folder, config.vision_type, prompts.pictures, measured, reporter)
            streams, probes = _embed(checkpoint, folder, config, prompts, vision)
            record = _calibration_record(data, prompts, streams.calibration)
            decoder = export_decoder(checkpoint, folder, config, streams, reporter)
            kv_int8 = can_be_checked()
            if kv_int8:
                source, target = (folder / spec.DECODER_GRAPHS[kind] for kind in ("fp32", "int8"))
                write_int8_kv_graph(source, target, checkpoint.config.decoder, streams.kv_int8.scales)
            manifest = _manifest(checkpoint.config, config, kv_int8=kv_int8)
            bundle = Bundle(folder, manifest)
            reporter.stage("comparing with torch", 2 * len(probes) + len(prompts.measured))
            exact = _exact_logits(bundle, probes, reporter)
            session = _open_decoder(bundle)
            parity = _check_decoder(exact, _probe_logits(session, probes, reporter), decoder, len(probes))
            kept = FloatLogits()
            accuracy = _measure(bundle, session, prompts, vision, decoder, kept, reporter)
            del session  # before the next one is opened
            loss = _check_kv_int8(bundle, probes, streams, decoder, kept, reporter) if kv_int8 else None
            report = Report(
                recipe=_recipe(config),
                calibration=record,
                parity=(vision.parity, parity),
                accuracy=accuracy,
                kv_int8=loss,
                modules=decoder.modules,
                size=sum(path.stat().st_size for path in folder.iterdir()),
                seconds=round(time.perf_counter() - began, 2),
                peak_memory=peak_memory(),
            )
            _write_json(folder / spec.REPORT, report.to_json())
            _write_manifest(folder, manifest)
            staging.publish()
    return report


def estimate_size(model: ModelConfig, config: ExportConfig) -> int:
    """Bytes of the bundle, within a few percent."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Owl2Model(model).named_parameters()}
    kinds = {"model.embed_tokens.": config.embeddings, "lm_head.": config.head, "model.layers.": config.weights}
    total = 0.0
    for name, shape in shapes.items():
        kind = next((kind for prefix, kind in kinds.items() if name.startswith(prefix)), config.vision_type)
        count = float(np.prod(shape))
        if len(shape) != 2:
            kind = "fp32"
        elif kind in ("int4", "int8") and config.quant is not None:
            total += 4 * count / config.group_size
        total += BYTES[kind] * count
    return int(total)


def _prompts(config: ExportConfig, checkpoint: Checkpoint) -> tuple[CalibrationSet, Prompts]:
    calibrate = config.quant is not None and config.method == "gptq"
    data = load_calibration(config.calibration, config.samples, need_pictures=calibrate)
    try:
        tokenizer = Tokenizer.load(checkpoint.folder)
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    decoder = checkpoint.config.decoder
    if tokenizer.vocab_size > decoder.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder}: tokenizer.model has {tokenizer.vocab_size} pieces, config.json a vocab_size of "
            f"{decoder.vocab_size}; they do not belong together"
        )
    return data, prepare(data, checkpoint.config, tokenizer, calibrate=calibrate)


Embedded = tuple[Floats, Ints]
"""Rows [T, C] before the first layer, and int64 [T] that is 1 at image rows."""


def _embed(
    checkpoint: Checkpoint, folder: Path, config: ExportConfig, prompts: Prompts, vision: ExportedVision
) -> tuple[Streams, list[Embedded]]:
    """Write the token table; turn all prompts into streams before the first layer, the probes into arrays too."""
    table = checkpoint.tensor("model.embed_tokens.weight").numpy()
    _write_table(folder / spec.EMBEDDINGS, table, np.float16 if config.embeddings == "fp16" else np.float32)

    def stream(embedded: list[Embedded]) -> Stream:
        sequences = [Sequence.of(torch.from_numpy(embeds), torch.from_numpy(kinds)) for embeds, kinds in embedded]
        return Stream(checkpoint.config.decoder, sequences)

    measured = [embed(prompt.keys, table, vision.reference) for prompt in prompts.measured]
    calibration = [embed(prompt.keys, table, vision.rows) for prompt in prompts.calibration]
    stored = stream(measured)
    probes = measured[: len(prompts.probes)]
    rounded = RoundedStream(stream(probes))
    return Streams(stream(calibration) if calibration else None, stored, stored.copy(), rounded), probes


def _write_table(path: Path, table: NDArray[np.float32], dtype: type[np.float16 | np.float32]) -> None:
    with path.open("wb") as file:
        for block in np.array_split(table, max(1, len(table) // 4096)):
            file.write(block.astype(dtype).tobytes())


def _probe_logits(session: Decoder, probes: list[Embedded], reporter: Reporter) -> Floats:
    """Logits of all probes, one after the other: [sum of T, V]."""
    made = []
    for embeds, modality in probes:
        made.append(_stepwise_logits(session, embeds, modality, session.allocate(len(embeds), None)))
        reporter.advance()
    return np.concatenate(made)


def _exact_logits(bundle: Bundle, probes: list[Embedded], reporter: Reporter) -> Floats:
    """The same with float32 activations; that session is gone before the next one is opened."""
    with with_float_activations(bundle.path(spec.DECODER_GRAPH)) as variant:
        session = OrtDecoder(variant, bundle.manifest.model.decoder, OrtOptions(frugal=True))
        return _probe_logits(session, probes, reporter)


def _check_decoder(exact: Floats, actual: Floats, decoder: ExportedDecoder, probes: int) -> Parity:
    """Compare the decoder graph with torch on the probes.

    Raises:
        ParityError: they differ.
    """
    return compare(
        spec.DECODER_GRAPH,
        exact=exact,
        actual=actual,
        stored=np.concatenate([decoder.stored_logits(i) for i in range(probes)]),
        reference=np.concatenate([decoder.reference_logits(i) for i in range(probes)]),
    )


def _check_kv_int8(
    bundle: Bundle,
    probes: list[Embedded],
    streams: Streams,
    decoder: ExportedDecoder,
    kept: FloatLogits,
    reporter: Reporter,
) -> KvInt8:
    """Compare the decoder with an int8 K/V cache with torch on the probes, then with its float32 one on ``kept``.

    Raises:
        ParityError: it does not compute what torch computes.
    """
    reporter.stage("int8 K/V cache", len(probes) + len(kept.prompts))
    model, made = bundle.manifest.model.decoder, []
    with with_float_activations(bundle.decoder_graph("int8")) as variant:
        session = OrtDecoder(variant, model, OrtOptions(kv_cache="int8", frugal=True))
        for (embeds, modality), codes in zip(probes, streams.kv_int8.codes):
            buffers = session.allocate(len(embeds), None)
            made.append(_stepwise_logits(session, embeds, modality, buffers))
            check_codes(buffers.arrays[:2], [entry.numpy() for entry in codes], model)
            reporter.advance()
    difference = compare_kv_int8(
        made=np.concatenate(made),
        rounded=np.concatenate([decoder.kv_int8_logits(i) for i in range(len(probes))]),
        unrounded=np.concatenate([decoder.stored_logits(i) for i in range(len(probes))]),
    )
    del session
    session, meter = _open_decoder(bundle, "int8"), AccuracyMeter()
    for embeds, modality, logits in kept.prompts:
        meter.add(logits, _full_logits(session, embeds, modality), modality)
        reporter.advance()
    return summary(meter, difference, model, calibrated=streams.calibration is not None)


def _open_decoder(bundle: Bundle, kv_cache: KvType = spec.DEFAULT_KV_CACHE) -> OrtDecoder:
    """The decoder as the runtime opens it, but without a second copy of floating-point weights in memory."""
    options = OrtOptions(kv_cache=kv_cache, frugal=bundle.manifest.weights.method == "none")
    return OrtDecoder(bundle.decoder_graph(kv_cache), bundle.manifest.model.decoder, options)


def _measure(
    bundle: Bundle,
    session: Decoder,
    prompts: Prompts,
    vision: ExportedVision,
    decoder: ExportedDecoder,
    kept: FloatLogits,
    reporter: Reporter,
) -> Accuracy:
    """Compare the whole bundle, its own vision rows and token table included, with torch on the checkpoint."""
    table = bundle.embeddings()
    first, name = (len(prompts.probes), "held-out calibration samples") if prompts.held_out else (0, "built-in probes")
    meter = AccuracyMeter()
    for index, prompt in enumerate(prompts.measured):
        if index >= first:
            embeds, modality = embed(prompt.keys, table, vision.rows)
            made = _full_logits(session, embeds, modality)
            meter.add(decoder.reference_logits(index), made, modality)
            kept.offer(embeds, modality, made)
        reporter.advance()
    return meter.result(name)


def _full_logits(session: Decoder, embeds: Floats, modality: Ints) -> Floats:
    """Logits [T, V] of all positions from one prefill."""
    count = len(embeds)
    return session.prefill(embeds, modality, 0, session.allocate(count, None), np.arange(count))


def _stepwise_logits(session: Decoder, embeds: Floats, modality: Ints, buffers: KvBuffers) -> Floats:
    """Logits [T, V]: most positions in one prefill, the last ones step by step from the KV cache."""
    count = len(embeds)
    text_tail = count - 1 - int(np.flatnonzero(modality)[-1]) if modality.any() else count - 1
    first = count - min(text_tail, DECODED_STEPS)
    made = [session.prefill(embeds[:first], modality[:first], 0, buffers, np.arange(first))]
    made += [session.decode(embeds[i : i + 1], i, buffers)[None] for i in range(first, count)]
    return np.concatenate(made)


def _recipe(config: ExportConfig) -> dict[str, object]:
    """The settings as they took effect; paths of the machine stay out."""
    return {
        "weights": config.weights,
        "head": config.head,
        "vision": config.vision_type,
        "embeddings": config.embeddings,
        "quant": None if config.quant is None else asdict(config.quant),
        "samples": config.samples,
    }


def _calibration_record(data: CalibrationSet, prompts: Prompts, stream: Stream | None) -> CalibrationRecord:
    if stream is None:
        return CalibrationRecord("none", 0, 0, 0, 0, "", ())
    return CalibrationRecord(
        source=data.source,
        samples=len(prompts.calibration),
        pictures=len(pictures_of(prompts.calibration)),
        text_rows=stream.text_rows,
        image_rows=stream.image_rows,
        fingerprint=fingerprint(prompts.calibration),
        notes=data.notes,
    )


def _manifest(model: ModelConfig, config: ExportConfig, *, kv_int8: bool) -> Manifest:
    """The manifest without its files, which are not complete yet."""
    quant = config.quant
    kv_cache = {"fp32": MINIMUM_ONNXRUNTIME} | ({"int8": KV_INT8_ONNXRUNTIME} if kv_int8 else {})
    return Manifest(
        format=spec.FORMAT_VERSION,
        producer=f"owl2 {__version__}",
        dialect="ort",
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        kv_cache=kv_cache,
        template="mplug_owl2",
        weights=WeightFormat(
            decoder=config.weights,
            head=config.head,
            vision=config.vision_type,
            embeddings=config.embeddings,
            method="none" if quant is None else quant.method,
            group_size=0 if quant is None else quant.group_size,
        ),
        model=model,
        files={},
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    files = {
        path.name: FileEntry(path.stat().st_size, hash_file(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    _write_json(folder / spec.MANIFEST, manifest.to_json() | {"files": {n: asdict(f) for n, f in files.items()}})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
