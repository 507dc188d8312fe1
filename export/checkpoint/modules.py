"""Parts of the network on a checkpoint's weights, in float32."""

from __future__ import annotations

import torch

from owl2.export.checkpoint.checkpoint import DECODER_LAYERS, Checkpoint
from owl2.quant.grid import QuantizedWeight
from owl2.quant.models.mplug_owl2 import DecoderLayer, RmsNorm, VisionModel, VisualAbstractor

TABLE = "model.embed_tokens.weight"
"""Name of the token table [V, C]."""


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
    return TABLE if checkpoint.config.decoder.tie_word_embeddings else "lm_head.weight"
