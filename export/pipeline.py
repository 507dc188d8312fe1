"""The way from a checkpoint to a bundle, on one screen."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from owl2.export import __version__
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.source import KEPT, check_settings, needs_calibration, remaining, source_record
from owl2.export.checks.bundle import Embedded, Made, check_bundle
from owl2.export.checks.kv_int8 import can_be_checked
from owl2.export.config import BYTES, ExportConfig
from owl2.export.decoder import Streams, export_decoder
from owl2.export.graph.dialects import MINIMUM_ONNXRUNTIME
from owl2.export.graph.kv_int8 import MINIMUM_ONNXRUNTIME as KV_INT8_ONNXRUNTIME, write_int8_kv_graph
from owl2.export.job.device import check_device, device_memory_errors
from owl2.export.job.journal import Journal, journal_size, resume_key
from owl2.export.job.progress import Reporter, Silent
from owl2.export.job.staging import Staging, check_space, disk_errors, write_json
from owl2.export.job.usage import Usage
from owl2.export.prompts import Prompts, fingerprint, images_of, prepare
from owl2.export.report import CalibrationRecord, Report
from owl2.export.vision import ExportedVision, export_vision
from owl2.quant.calibration.samples import CalibrationSet, load_calibration
from owl2.quant.kv import RoundedStream
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.quant.stream import Calibration, Sequence, Stream
from owl2.runtime import spec
from owl2.runtime.bundle import Bundle, Manifest, WeightFormat
from owl2.runtime.config import ModelConfig
from owl2.runtime.engine import Floats
from owl2.runtime.errors import BundleError, CheckpointError, ExportError
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.spec import KvType
from owl2.runtime.verification import FileEntry, hash_file


def export_bundle(config: ExportConfig, reporter: Reporter | None = None) -> Report:
    """Convert a checkpoint; the bundle appears whole, or not at all.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
        CalibrationError, QuantizationError: the weights cannot be quantized with this data.
        ParityError: a graph does not compute what torch computes.
        ExportError: the target exists, or the disk is full.
    """
    reporter = reporter or Silent()
    staging = Staging(config.bundle, source=config.checkpoint, overwrite=config.overwrite)
    check_device(config.device)
    with Usage() as usage, Checkpoint(config.checkpoint) as checkpoint:
        check_settings(config, checkpoint)
        data, prompts = load_prompts(config, checkpoint)
        needed = estimate_size(checkpoint.config, config) + journal_size(prompts, checkpoint.config)
        with _tells_what_is_kept(staging, reporter), disk_errors(staging, needed), staging:
            layers = checkpoint.config.decoder.num_hidden_layers
            journal = Journal(staging, resume_key(config, checkpoint, prompts), layers, usage)
            if remark := journal.resume(fresh=config.fresh):
                reporter.note(remark)
            check_space(staging, needed)
            folder = staging.folder
            for name in spec.TOKENIZER_FILES:
                shutil.copyfile(checkpoint.folder / name, folder / name)
            vision = _vision(checkpoint, folder, config, prompts, journal, reporter)
            streams, probes = _embed(checkpoint, folder, config, prompts, vision)
            record = calibration_record(data, prompts, streams.calibration)
            # What the layers do not need makes room for them: pixels, and rows of the calibration images.
            probed, vision = prompts.probes, vision.of(images_of(prompts.measured))
            prompts = prompts.without_images()
            with device_memory_errors(config.device):
                decoder = export_decoder(checkpoint, folder, config, streams, journal, reporter)
            rounded = streams.kv_int8
            del streams
            # The kernel for it is ONNX Runtime's, and takes float32 queries.
            kv_int8 = can_be_checked() and config.dialect == "ort" and config.activation_type == "fp32"
            if kv_int8:
                source, target = (folder / spec.DECODER_GRAPHS[kind] for kind in ("fp32", "int8"))
                write_int8_kv_graph(source, target, checkpoint.config.decoder, rounded.scales)
            manifest = _manifest(checkpoint, config, kv_int8=kv_int8)
            made = Made(Bundle(folder, manifest), decoder, vision, rounded, calibrated=record.samples > 0)
            checks = check_bundle(made, prompts, probed, probes, reporter)
            report = Report(
                recipe=recipe_of(checkpoint, config),
                calibration=record,
                parity=(vision.parity, checks.parity),
                accuracy=checks.accuracy,
                goldens=checks.goldens,
                kv_int8=checks.kv_int8,
                modules=decoder.modules,
                vision=vision.sensitivity,
                size=sum(path.stat().st_size for path in folder.iterdir()),
                seconds=round(usage.seconds, 2),
                layer_seconds=tuple(usage.layer_seconds),
                peak_memory=usage.peak,
                peak_own_memory=usage.own_peak,
            )
            write_json(folder / spec.REPORT, report.to_json())
            _write_manifest(folder, manifest)
            staging.publish()
    return report


@contextlib.contextmanager
def _tells_what_is_kept(staging: Staging, reporter: Reporter) -> Iterator[None]:
    """Say what an interrupted export leaves; errors that say so themselves are left alone."""
    try:
        yield
    except BaseException as error:
        if staging.kept and not (isinstance(error, ExportError) and staging.left in str(error)):
            reporter.note(staging.left)
        raise


def _vision(
    checkpoint: Checkpoint,
    folder: Path,
    config: ExportConfig,
    prompts: Prompts,
    journal: Journal,
    reporter: Reporter,
) -> ExportedVision:
    """The vision side as an earlier run left it, or exported now."""
    vision = journal.vision()
    if vision is None:
        measured = set(images_of(prompts.measured))
        vision = export_vision(checkpoint, folder, config, prompts.images, measured, reporter)
        journal.keep_vision(vision)
    return vision


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


def load_prompts(config: ExportConfig, checkpoint: Checkpoint) -> tuple[CalibrationSet, Prompts]:
    """Calibration data and the prompts made of it.

    Raises:
        CalibrationError: the data cannot be used.
        CheckpointError: the tokenizer cannot be used.
    """
    calibrate = needs_calibration(config, checkpoint)
    data = load_calibration(config.calibration, config.samples, need_images=calibrate)
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


def _embed(
    checkpoint: Checkpoint, folder: Path, config: ExportConfig, prompts: Prompts, vision: ExportedVision
) -> tuple[Streams, list[Embedded]]:
    """Write the token table; turn all prompts into streams before the first layer, the probes into arrays too."""
    table = checkpoint.tensor("model.embed_tokens.weight").numpy()
    _write_table(folder / spec.EMBEDDINGS, table, np.float16 if config.embeddings == "fp16" else np.float32)
    return begin_streams(checkpoint, prompts, table, vision.reference, vision.rows)


def begin_streams(
    checkpoint: Checkpoint,
    prompts: Prompts,
    table: NDArray[np.float32],
    reference: Mapping[str, Floats],
    rows: Mapping[str, Floats],
) -> tuple[Streams, list[Embedded]]:
    """All prompts before the first layer, the probes as arrays too.

    Args:
        checkpoint: says how wide the layers are.
        prompts: tokenized.
        table: token rows [V, C].
        reference: rows of each image by digest, for the measured prompts.
        rows: the same for the calibration prompts.
    """

    def stream(embedded: list[Embedded]) -> Stream:
        sequences = [Sequence.of(torch.from_numpy(embeds), torch.from_numpy(kinds)) for embeds, kinds in embedded]
        return Stream(checkpoint.config.decoder, sequences)

    measured = [embed(prompt.keys, table, reference) for prompt in prompts.measured]
    calibration = [embed(prompt.keys, table, rows) for prompt in prompts.calibration]
    stored = stream(measured)
    probes = measured[: len(prompts.probes)]
    begun = Calibration(stream(calibration)) if calibration else None
    return Streams(begun, stored, stored.copy(), RoundedStream(stream(probes))), probes


def _write_table(path: Path, table: NDArray[np.float32], dtype: type[np.float16 | np.float32]) -> None:
    with path.open("wb") as file:
        for block in np.array_split(table, max(1, len(table) // 4096)):
            file.write(block.astype(dtype).tobytes())


def recipe_of(checkpoint: Checkpoint, config: ExportConfig) -> dict[str, object]:
    """The settings as they took effect; paths of the machine stay out."""
    quant = config.quant if remaining(checkpoint) else None
    return {
        "source": source_record(checkpoint),
        "weights": config.weights,
        "head": config.head,
        "vision": config.vision_type,
        "dialect": config.dialect,
        "activations": config.activation_type,
        "embeddings": config.embeddings,
        "quant": None if quant is None else asdict(quant),
        "samples": config.samples,
        "device": config.device,
    }


def calibration_record(data: CalibrationSet, prompts: Prompts, calibration: Calibration | None) -> CalibrationRecord:
    """The report's part on what the quantizer looked at; ``calibration`` is None where it looked at nothing."""
    if calibration is None:
        return CalibrationRecord("none", 0, 0, 0, 0, "", ())
    return CalibrationRecord(
        source=data.source,
        samples=len(prompts.calibration),
        images=len(images_of(prompts.calibration)),
        text_rows=calibration.quantized.text_rows,
        image_rows=calibration.quantized.image_rows,
        fingerprint=fingerprint(prompts.calibration),
        notes=data.notes + prompts.notes,
    )


def _manifest(checkpoint: Checkpoint, config: ExportConfig, *, kv_int8: bool) -> Manifest:
    """The manifest without its files, which are not complete yet."""
    quant = config.quant
    method = "none" if quant is None else quant.method
    minimum = MINIMUM_ONNXRUNTIME[config.dialect]
    kv_cache: dict[KvType, str] = {config.activation_type: minimum}
    if kv_int8:
        kv_cache["int8"] = KV_INT8_ONNXRUNTIME
    return Manifest(
        format=spec.FORMAT_VERSION,
        producer=f"owl2 {__version__}",
        dialect=config.dialect,
        activations=config.activation_type,
        minimum_onnxruntime=minimum,
        kv_cache=kv_cache,
        family="mplug_owl2",
        weights=WeightFormat(
            decoder=config.weights,
            head=config.head,
            vision=config.vision_type,
            embeddings=config.embeddings,
            method=KEPT if checkpoint.quantized else method,
            group_size=0 if quant is None else quant.group_size,
        ),
        model=checkpoint.config,
        files={},
        engines={},
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    files = {
        path.name: FileEntry(path.stat().st_size, hash_file(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    write_json(folder / spec.MANIFEST, manifest.to_json() | {"files": {n: asdict(f) for n, f in files.items()}})
