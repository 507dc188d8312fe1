"""From an official checkpoint to one in the GPTQ layout: quantized decoder layers, everything else in fp16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from owl2.export import __version__
from owl2.export.checkpoint.checkpoint import DECODER_LAYERS, REQUIRED_FILES, Checkpoint
from owl2.export.checkpoint.gptq_layout import CONFIG_FILE, CONFIG_KEY, GptqFormat, GptqTensors, pack
from owl2.export.checkpoint.source import check_settings
from owl2.export.config import ExportConfig
from owl2.export.decoder import ExportedDecoder, Streams, export_layer, finish_decoder, stage_name
from owl2.export.graph.dialect import Linear
from owl2.export.graph.weights import LinearWeight
from owl2.export.job.device import check_device, device_memory_errors
from owl2.export.job.progress import Reporter, Silent
from owl2.export.job.staging import Staging, check_space, disk_errors, write_json
from owl2.export.job.usage import Usage
from owl2.export.pipeline import begin_streams, calibration_record, load_prompts, recipe_of
from owl2.export.prompts import Prompts
from owl2.export.report import Accuracy, Report
from owl2.export.safetensors_writer import SHARD_BYTES, SafetensorsWriter, TensorEntry
from owl2.export.vision import reference_rows
from owl2.quant.config import QuantConfig
from owl2.quant.grid import QuantizedWeight
from owl2.quant.layer import LINEARS, ModuleReport
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig
from owl2.runtime.errors import ConfigError, ExportError
from owl2.runtime.evaluation.divergence import Divergence, divergence, modality_of

# Copied as they are; the first ones must exist.
COPIED = (
    *(name for name in REQUIRED_FILES if name != "config.json"),
    "generation_config.json",
    "added_tokens.json",
    "tokenizer.json",
)


def export_gptq(config: ExportConfig, reporter: Reporter | None = None, shard_bytes: int = SHARD_BYTES) -> Report:
    """Convert a checkpoint; the folder appears whole, or not at all.

    In memory are one layer and the hidden rows of the prompts, as when writing a bundle.

    Args:
        config: with layout ``gptq``; ``bundle`` is the folder to write.
        reporter: is told of the stages.
        shard_bytes: most bytes of a weight file.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used, or its shapes do not fit this layout.
        CalibrationError, QuantizationError: the weights cannot be quantized with this data.
        ExportError: the target exists, values exceed fp16, or the disk is full.
    """
    reporter = reporter or Silent()
    if config.quant is None or config.layout != "gptq":
        raise ConfigError(f"layout gptq and integer weights are needed, got {config.layout} and {config.weights}")
    staging = Staging(config.bundle, source=config.checkpoint, overwrite=config.overwrite)
    if staging.unfinished and not config.fresh:
        raise ExportError(
            f"{staging.work} holds an unfinished export of a bundle, which would be lost; finish it with its own "
            "command, choose another folder, or give --fresh to remove it"
        )
    check_device(config.device)
    form = written_format(config.quant)
    with Usage() as usage, Checkpoint(config.checkpoint) as checkpoint:
        check_settings(config, checkpoint)
        _check_shapes(checkpoint.config.decoder, form)
        plan = tensor_plan(checkpoint, form)
        data, prompts = load_prompts(config, checkpoint)
        needed = sum(entry.size for entry in plan.values())
        with disk_errors(staging, needed), staging:
            staging.clear()
            check_space(staging, needed)
            folder = staging.folder
            _write_files(checkpoint.folder, folder, form)
            streams = _begin(checkpoint, prompts, reporter)
            record = calibration_record(data, prompts, streams.calibration)
            prompts = prompts.without_images()
            with device_memory_errors(config.device), SafetensorsWriter(folder, plan, shard_bytes) as file:
                decoder = _quantize(checkpoint, GptqWriter(file, checkpoint, form), config, streams, usage, reporter)
            report = Report(
                recipe=recipe_of(checkpoint, config),
                calibration=record,
                parity=(),
                accuracy=_accuracy(decoder, prompts),
                modules=decoder.modules,
                vision=(),
                goldens=(),
                kv_int8=None,
                size=sum(path.stat().st_size for path in folder.iterdir()),
                seconds=round(usage.seconds, 2),
                layer_seconds=tuple(usage.layer_seconds),
                peak_memory=usage.peak,
                peak_own_memory=usage.own_peak,
            )
            write_json(folder / spec.REPORT, report.to_json())
            staging.publish()
    return report


def _begin(checkpoint: Checkpoint, prompts: Prompts, reporter: Reporter) -> Streams:
    """All prompts before the first layer; the token table and the images' rows are gone when this returns."""
    table = checkpoint.tensor("model.embed_tokens.weight").numpy()
    rows = reference_rows(checkpoint, prompts.images, reporter)
    return begin_streams(checkpoint, prompts, table, rows, rows)[0]


def _quantize(
    checkpoint: Checkpoint,
    writer: GptqWriter,
    config: ExportConfig,
    streams: Streams,
    usage: Usage,
    reporter: Reporter,
) -> ExportedDecoder:
    layers = checkpoint.config.decoder.num_hidden_layers
    modules: dict[str, ModuleReport] = {}
    reporter.stage(stage_name(config, checkpoint), layers + 1)
    usage.begin_layers()
    for index in range(layers):
        export_layer(checkpoint, writer, config, index, streams, modules)
        usage.end_layer()
        reporter.advance()
    made = finish_decoder(checkpoint, writer, config, streams, modules)
    reporter.advance()
    return made


def written_format(quant: QuantConfig) -> GptqFormat:
    """What is written: version 1, which every program reads, and groups in the order of the columns."""
    return GptqFormat(quant.bits, quant.group_size, producer=f"owl2:{__version__}")


def tensor_plan(checkpoint: Checkpoint, form: GptqFormat) -> dict[str, TensorEntry]:
    """Every tensor of the new checkpoint, in the order of the model."""
    with torch.device("meta"):
        state = Owl2Model(checkpoint.config).state_dict()
    plan: dict[str, TensorEntry] = {}
    for name, value in state.items():
        linear = name.removesuffix(".weight")
        if _is_quantized(linear):
            rows, width = value.shape
            for suffix, (shape, dtypes) in GptqTensors.shapes(rows, width, form).items():
                plan[f"{linear}.{suffix}"] = TensorEntry("I32" if dtypes[0] == "int32" else "F16", shape)
        elif name in checkpoint:
            plan[name] = TensorEntry("F16", tuple(value.shape))
    return plan


def _is_quantized(linear: str) -> bool:
    return linear.startswith(DECODER_LAYERS) and linear.split(".", 3)[-1] in LINEARS


class GptqWriter:
    """Puts finished layers into the new checkpoint; see :class:`owl2.export.decoder.LayerWriter`."""

    def __init__(self, file: SafetensorsWriter, checkpoint: Checkpoint, form: GptqFormat) -> None:
        self._file, self._checkpoint, self._form = file, checkpoint, form
        self._index = 0

    def layer(self, linears: Mapping[str, Linear], gains: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the next layer.

        Raises:
            QuantizationError: a weight that this layout cannot hold exactly.
        """
        prefix = f"{DECODER_LAYERS}{self._index}."
        for name, linear in linears.items():
            assert isinstance(linear.weight, QuantizedWeight)
            for suffix, tensor in pack(linear.weight, self._form).items():
                self._file.write(f"{prefix}{name}.{suffix}", tensor)
            if linear.bias is not None:
                self._file.write(f"{prefix}{name}.bias", linear.bias)
        for norm, pair in gains.items():
            for branch, gain in enumerate(pair):
                self._file.write(f"{prefix}{norm}.multiway.{branch}.weight", gain)
        self._index += 1

    def finish(self, norm: Tensor, head: LinearWeight) -> None:
        """Write what is not in the layers, the vision side included, and complete the files."""
        for name in self._file.missing():
            self._file.write(name, self._checkpoint.tensor(name))
        self._file.finish()


def _check_shapes(decoder: DecoderConfig, form: GptqFormat) -> None:
    packed = 32 // form.bits
    for name in ("hidden_size", "intermediate_size"):
        if getattr(decoder, name) % packed:
            raise ConfigError(
                f"{name} {getattr(decoder, name)} is no multiple of {packed}; layout gptq packs {packed} numbers of "
                f"{form.bits} bits into a word and cannot hold this model"
            )


def _write_files(source: Path, folder: Path, form: GptqFormat) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"torch_dtype": "float16", CONFIG_KEY: form.to_json()})
    write_json(folder / CONFIG_FILE, form.to_json())


def _accuracy(decoder: ExportedDecoder, prompts: Prompts) -> Accuracy:
    """The new weights against the old ones, both in torch."""
    first, name = prompts.judged
    apart = Divergence()
    for index, prompt in enumerate(prompts.measured[first:], first):
        apart += divergence(decoder.reference_logits(index), decoder.stored_logits(index), modality_of(prompt))
    return Accuracy.of(name, apart)
