"""Parts of the network on a checkpoint's weights, in float32."""

from __future__ import annotations

import torch

from owl2.export.checkpoint.checkpoint import DECODER_LAYERS, Checkpoint
from owl2.export.checkpoint.naming import HEAD_WEIGHT, TABLE
from owl2.quant.grid import QuantizedWeight
from owl2.quant.models.mplug_owl2 import DecoderLayer, RmsNorm, VisionModel, VisualAbstractor
from owl2.runtime.errors import CheckpointError

TABLE_BLOCK = 4096
TABLE_ERROR = 2.0**-10
"""Largest error of a row of the token table, as a part of what the first norm divides the row by; rounding to a float16
that is not too small makes half of it at most."""


def load_vision(checkpoint: Checkpoint) -> tuple[VisionModel, VisualAbstractor]:
    config = checkpoint.config
    tower = VisionModel(config.vision).eval()
    abstractor = VisualAbstractor(config.abstractor, config.decoder.hidden_size).eval()
    checkpoint.load_into(tower, "model.vision_model.")
    checkpoint.load_into(abstractor, "model.visual_abstractor.")
    return tower, abstractor


def load_layer(checkpoint: Checkpoint, index: int, device: str) -> tuple[DecoderLayer, dict[str, QuantizedWeight]]:
    """One decoder layer, and the integers of those of its linear layers that the checkpoint holds quantized."""
    with torch.device("meta"):  # no time for random weights that are replaced at once
        layer = DecoderLayer(checkpoint.config.decoder).eval()
    layer.to_empty(device=device)
    return layer, checkpoint.load_into(layer, f"{DECODER_LAYERS}{index}.")


def load_norm(checkpoint: Checkpoint) -> RmsNorm:
    decoder = checkpoint.config.decoder
    norm = RmsNorm(decoder.hidden_size, decoder.rms_norm_eps)
    checkpoint.load_into(norm, "model.norm.")
    return norm


def head_name(checkpoint: Checkpoint) -> str:
    """Name of the output head's weight [V, C], which may be the token table."""
    return TABLE if checkpoint.config.decoder.tie_word_embeddings else HEAD_WEIGHT


def check_head(checkpoint: Checkpoint) -> None:
    """Refuse a head that the token table is to replace, but that holds other values.

    Raises:
        CheckpointError: with what to do.
    """
    doubled = head_name(checkpoint) == TABLE and HEAD_WEIGHT in checkpoint
    if doubled and not torch.equal(checkpoint.stored(HEAD_WEIGHT), checkpoint.stored(TABLE)):
        raise CheckpointError(
            f"{checkpoint.folder}: tie_word_embeddings makes the token table the head, but {HEAD_WEIGHT} holds other "
            "values; set tie_word_embeddings to false in config.json, or remove the tensor"
        )


def fits_float16(checkpoint: Checkpoint) -> bool:
    """Whether float16 holds the token table: every value is in its range, and no row is lost to rounding."""
    table = checkpoint.stored(TABLE)
    if table.dtype == torch.float16:
        return True
    for start in range(0, len(table), TABLE_BLOCK):
        rows = table[start : start + TABLE_BLOCK].float()
        error = (rows.half().float() - rows).square().mean(dim=1)
        size = rows.square().mean(dim=1) + checkpoint.config.decoder.rms_norm_eps
        if not bool((error <= TABLE_ERROR**2 * size).all()):  # false for NaN too
            return False
    return True
