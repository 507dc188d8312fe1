"""Settings that a quantized checkpoint brings along for its export, and the work that is left to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from owl2.export.checkpoint.checkpoint import DECODER_LAYERS, Checkpoint
from owl2.export.checkpoint.gptq_format import read_format
from owl2.export.checkpoint.gptq_layout import WORD_BITS
from owl2.export.config import ExportConfig
from owl2.quant.layer import LINEARS
from owl2.runtime.config import require
from owl2.runtime.foreign import ForeignError, read_json

GPTQ_CHECKPOINT = "gptq checkpoint"
"""The method in the manifest if the checkpoint's own integers were kept."""


def default_settings(folder: Path) -> dict[str, Any]:
    """Settings that a quantized checkpoint brings along, by the names of :class:`ExportConfig`; none for others.

    Raises:
        CheckpointError: the checkpoint is quantized in an unsupported way.
    """
    try:
        config = read_json(folder / "config.json")
    except (OSError, ForeignError):
        return {}  # opening the checkpoint says what is wrong with it
    form = read_format(folder, config) if isinstance(config, dict) else None
    return {} if form is None else {"weights": f"int{form.bits}", "group_size": form.block}


def check_settings(config: ExportConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for settings that the checkpoint cannot be exported with."""
    form, decoder = checkpoint.gptq, checkpoint.config.decoder
    if form is None:
        if config.layout == "gptq" and config.quant is not None:
            packed = WORD_BITS // config.quant.bits
            for name in ("hidden_size", "intermediate_size"):
                require(
                    getattr(decoder, name) % packed == 0,
                    f"{name} {getattr(decoder, name)} is not a multiple of {packed}; layout gptq packs {packed} "
                    f"numbers of {config.quant.bits} bits into a word and cannot hold this model",
                )
        return
    own, group = f"int{form.bits}", "whole rows" if form.group_size == -1 else f"groups of {form.group_size}"
    require(
        config.layout == "bundle",
        f"{config.checkpoint} is in the GPTQ layout already; copy it, or convert the original checkpoint",
    )
    require(
        config.weights == own,
        f"weights {config.weights} were asked for, but {config.checkpoint} holds {own} weights, which are kept as they "
        f"are; leave --weights out or give {own}, or convert the original checkpoint",
    )
    require(
        config.group_size == form.block,
        f"group size {config.group_size} was asked for, but {config.checkpoint} has {group}, stored in a bundle as "
        f"{form.block}; leave --group-size out or give {form.block}, or convert the original checkpoint",
    )
    require(
        config.dialect == "ort" or form.symmetric is not False,
        f"{config.checkpoint} has zero points (sym false), which TensorRT does not take; leave --dialect onnx out, or "
        "convert the original checkpoint",
    )


def remaining(checkpoint: Checkpoint) -> list[str]:
    """Linear layers of the decoder that the checkpoint holds as floating-point numbers."""
    layers = range(checkpoint.config.decoder.num_hidden_layers)
    names = (f"{DECODER_LAYERS}{index}.{linear}" for index in layers for linear in LINEARS)
    return [name for name in names if name not in checkpoint.quantized]


def needs_calibration(config: ExportConfig, checkpoint: Checkpoint) -> bool:
    """Whether any layer is quantized here, by GPTQ."""
    return config.quant is not None and config.method == "gptq" and bool(remaining(checkpoint))


def source_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's part of the report."""
    form = checkpoint.gptq
    noted = {"notes": checkpoint.notes} if checkpoint.notes else {}
    if form is None:
        return {"kind": "checkpoint", **noted}
    return {
        "kind": GPTQ_CHECKPOINT,
        **noted,
        "quantizer": form.producer,
        "bits": form.bits,
        "group_size": form.group_size,
        "desc_act": form.desc_act,
        "sym": form.symmetric,
        "kept": len(checkpoint.quantized),
        "quantized_here": remaining(checkpoint),
    }
