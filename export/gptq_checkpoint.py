"""From an official checkpoint to one in the GPTQ layout: quantized decoder layers, everything else in fp16."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from owl2.export.checkpoint.checkpoint import DECODER_LAYERS, Checkpoint
from owl2.export.checkpoint.files import GPTQ_INDEX, OPTIONAL_FILES, PREPROCESSOR, json_object
from owl2.export.checkpoint.gptq_format import CONFIG_FILE, CONFIG_KEY, GptqFormat
from owl2.export.checkpoint.gptq_layout import pack
from owl2.export.checkpoint.naming import TABLE
from owl2.export.config import ExportConfig
from owl2.export.decoder import export_layers
from owl2.export.graph.weights import IntegerWeight, Linear, LinearWeight, check_float16
from owl2.export.job.disk import write_json
from owl2.export.job.job import ExportJob, open_job
from owl2.export.job.progress import Reporter, Silent
from owl2.export.report import Accuracy, Checks, Report
from owl2.export.streams import begin_streams
from owl2.export.vision import original_rows
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.errors import ConfigError
from owl2.runtime.evaluation.divergence import Divergence, divergence, modality_of
from owl2.runtime.version import __version__

TYPE_KEYS = ("dtype", "torch_dtype")
ADVICE = "write a bundle instead, which can hold it as fp32 (--layout bundle with --weights, --vision, --activations)"


def export_gptq(config: ExportConfig, reporter: Reporter | None = None) -> Report:
    """Convert a checkpoint; the folder appears whole, or not at all.

    In memory are one layer and the hidden rows of the prompts, as when writing a bundle.

    Args:
        config: with layout ``gptq``; ``bundle`` is the folder to write.
        reporter: is told of the stages.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used, or its shapes do not fit this layout.
        CalibrationError, QuantizationError: the weights cannot be quantized with this data.
        ExportError: the target exists, values exceed fp16, or the disk is full.
    """
    if config.quant is None or config.layout != "gptq":
        raise ConfigError(f"layout gptq and integer weights are needed, got {config.layout} and {config.weights}")
    # Version 1, which every program reads, and groups in the order of the columns.
    form = GptqFormat(config.quant.bits, config.quant.group_size, producer=f"owl2:{__version__}")
    with open_job(config, reporter or Silent()) as job, job.writing(job.size):
        _check_range(job.checkpoint)  # before hours of work
        job.staging.clear()
        job.check_space(job.size)
        _write_settings(job.checkpoint, job.folder, form)
        rows = original_rows(job)
        streams, _ = begin_streams(job, job.checkpoint.tensor(TABLE).numpy(), rows, rows)
        del rows
        job.prompts.images.clear()
        decoder = export_layers(job, GptqWriter(job, form), streams, {})
        first, _ = job.prompts.judged
        loss = Divergence()  # of the new weights against the old ones, both in torch
        for i, prompt in enumerate(job.prompts.measured[first:], first):
            loss += divergence(decoder.original_logits(i), decoder.quantized_logits(i), modality_of(prompt))
        report = job.write_report(Checks(Accuracy.of(job.prompts, loss)), decoder.modules)
        job.staging.publish()
    return report


class GptqWriter:
    """Writes a file for each finished layer and one for the rest; see :class:`owl2.export.decoder.LayerWriter`."""

    def __init__(self, job: ExportJob, form: GptqFormat) -> None:
        self._job, self._form = job, form
        self._files: dict[str, str] = {}
        self._written = self._bytes = 0

    def layer(self, linears: Mapping[str, Linear], gains: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, linear in linears.items():
            assert isinstance(linear.weight, IntegerWeight)
            parts = pack(linear.weight.integers, self._form)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
            if linear.bias is not None:
                tensors[f"{name}.bias"] = linear.bias
        for norm, pair in gains.items():
            tensors |= {f"{norm}.multiway.{branch}.weight": gain for branch, gain in enumerate(pair)}
        prefix = f"{DECODER_LAYERS}{self._written}."
        self._write((prefix + name, tensor) for name, tensor in tensors.items())

    def finish(self, norm: Tensor, head: LinearWeight) -> None:
        """Write the rest as it is in the checkpoint, the vision side included, and the index."""
        checkpoint, folder = self._job.checkpoint, self._job.folder
        rest = [name for name in _unquantized(checkpoint) if not name.startswith(DECODER_LAYERS)]
        self._write((name, checkpoint.tensor(name)) for name in rest)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._files.items()))}
        write_json(folder / GPTQ_INDEX, index)
        with Checkpoint(folder):
            pass  # it has every tensor, in the right shape

    def _write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._written += 1
        file = f"model-{self._written:05}-of-{self._job.layers + 1:05}.safetensors"
        halves = {name: _half(name, tensor) for name, tensor in tensors}
        save_file(halves, self._job.folder / file, metadata={"format": "pt"})
        self._files |= dict.fromkeys(halves, file)
        self._bytes += sum(tensor.nbytes for tensor in halves.values())


def _half(name: str, tensor: Tensor) -> Tensor:
    """The tensor as it is stored: integers as they are, floating-point numbers in fp16."""
    if not tensor.is_floating_point():
        return tensor
    check_float16(name, tensor, ADVICE)
    return tensor.detach().half().contiguous()


def _unquantized(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that stay as they are: all but the matrices of the decoder's layers."""
    with torch.device("meta"):
        state = Owl2Model(checkpoint.config).state_dict()
    return [n for n, value in state.items() if n in checkpoint and (value.ndim < 2 or not n.startswith(DECODER_LAYERS))]


def _check_range(checkpoint: Checkpoint) -> None:
    for name in _unquantized(checkpoint):
        check_float16(name, checkpoint.tensor(name), ADVICE)


def _in_half(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with fp16 as the type of all tensors, under the names that versions of transformers have for it."""
    return {
        key: _in_half(value) if isinstance(value, dict) else "float16" if key in TYPE_KEYS and value else value
        for key, value in config.items()
    }


def _write_settings(checkpoint: Checkpoint, folder: Path, form: GptqFormat) -> None:
    source = checkpoint.folder
    checkpoint.tokenizer.write(source, folder)
    if not (source / PREPROCESSOR).exists():
        write_json(folder / PREPROCESSOR, checkpoint.preprocessor)
    for name in (PREPROCESSOR, *OPTIONAL_FILES):
        if (source / name).is_file() and name not in checkpoint.tokenizer.outdated:
            shutil.copyfile(source / name, folder / name)
    config = _in_half(json_object(source / "config.json"))
    write_json(folder / "config.json", config | {"torch_dtype": "float16", CONFIG_KEY: form.to_json()})
    write_json(folder / CONFIG_FILE, form.to_json())
