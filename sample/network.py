"""The sample's dimensions and a forward pass for training.

``hidden_rows`` computes the same as ``Owl2Model.decode``, arranged for speed in training: the image branch is computed
for image rows only and overwrites theirs, and projections of the same rows are joined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from batches import Batch
from encoder import VOCAB_SIZE
from torch import Tensor
from world import GRID, SIDE

from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.quant.models.mplug_owl2.decoder import rotary_tables
from owl2.runtime.config import AbstractorConfig, DecoderConfig, ModelConfig, PreprocessConfig, VisionConfig

PATCH = 14


def sample_config() -> ModelConfig:
    """Widths are multiples of 128, so that every matrix splits into whole groups when quantized."""
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        abstractor=AbstractorConfig(
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            intermediate_size=512,
            num_learnable_queries=GRID * GRID,
            grid_size=SIDE // PATCH,
        ),
        decoder=DecoderConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=8,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
        ),
        preprocess=PreprocessConfig(mode="resize", size=SIDE, crop_size=SIDE),
    )


Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """Properties of a batch [B, T] that all layers need.

    Attributes:
        shape: B, T.
        heads: of the attention.
        eps: of the norms.
        where: int64, indices of image rows in [B·T].
        is_image: bool [B·T, 1].
        rotary: [2, T, D], cosines and signed sines.
        future: [T, T], minus infinity where a key is after the query.
    """

    shape: tuple[int, int]
    heads: int
    eps: float
    where: Tensor
    is_image: Tensor
    rotary: Tensor
    future: Tensor


def _norm(weights: Weights, name: str, rows: Tensor, layout: Layout) -> Tensor:
    """RMSNorm of [M, C] with the gain of each row's modality."""
    text, image = (weights[f"{name}.multiway.{branch}.weight"] for branch in (0, 1))
    normed = F.rms_norm(rows, (rows.shape[-1],), None, layout.eps)
    return normed * torch.where(layout.is_image, image, text)


def _attention(weights: Weights, rows: Tensor, layout: Layout) -> Tensor:
    """Causal attention on normalised rows [B·T, C], before the output projection."""
    (batch, tokens), width = layout.shape, rows.shape[1]

    def joined_weights(*names: str) -> Tensor:
        return torch.cat([weights[f"self_attn.{name}.weight"] for name in names])

    qkv = F.linear(rows, joined_weights("q_proj", "k_proj.multiway.0", "v_proj.multiway.0"))
    q, kv = qkv[:, :width], qkv[:, width:]
    if len(layout.where):
        image = F.linear(rows[layout.where], joined_weights("k_proj.multiway.1", "v_proj.multiway.1"))
        kv = kv.index_copy(0, layout.where, image)
    q = q.view(batch, tokens, layout.heads, -1).transpose(1, 2)
    k, v = kv.view(batch, tokens, 2, layout.heads, -1).permute(2, 0, 3, 1, 4)
    q, k = _rotate(q, layout.rotary), _rotate(k, layout.rotary)
    scores = q @ k.transpose(2, 3) * (1 / math.sqrt(q.shape[-1]))
    mixed: Tensor = (scores + layout.future).softmax(-1).to(v.dtype) @ v
    return mixed.transpose(1, 2).reshape(batch * tokens, width)


def _layer(weights: Weights, rows: Tensor, layout: Layout) -> Tensor:
    """One decoder layer on flattened rows [B·T, C]."""
    mixed = _attention(weights, _norm(weights, "input_layernorm", rows, layout), layout)
    rows = rows + F.linear(mixed, weights["self_attn.o_proj.weight"])
    g = _norm(weights, "post_attention_layernorm", rows, layout)
    gate_up = torch.cat([weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]])
    gate, up = F.linear(g, gate_up).chunk(2, dim=1)
    return rows + F.linear(F.silu(gate) * up, weights["mlp.down_proj.weight"])


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x: [B, H, T, D]; rotary: [2, T, D] cosines and signed sines."""
    return x * rotary[0] + x.roll(x.shape[-1] // 2, -1) * rotary[1]


def hidden_rows(model: Owl2Model, batch: Batch) -> Tensor:
    """Hidden rows after the final norm, [B·T, C]."""
    size, tokens = batch.ids.shape
    rows = model.embed(batch.ids).flatten(0, 1)
    is_image = torch.zeros(size * tokens, 1, dtype=torch.bool)
    where = torch.zeros(0, dtype=torch.int64)
    if len(batch.pixels):
        images = model.encode_images(batch.pixels)
        per_image = images.shape[1]
        having = (batch.starts >= 0).nonzero()[:, 0]
        first = having * tokens + batch.starts[having]
        where = (first[:, None] + torch.arange(per_image)).flatten()
        rows = rows.index_copy(0, where, images.flatten(0, 1).to(rows.dtype))
        is_image[where] = True
    config = model.config.decoder
    cos, sin = rotary_tables(config, tokens, tokens)
    rotary = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])
    future = torch.full((tokens, tokens), -math.inf).triu(1)
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    layout = Layout((size, tokens), heads, eps, where, is_image, rotary, future)
    for layer in model.model.layers:
        rows = _layer(dict(layer.named_parameters()), rows, layout)
    return model.model.norm(rows)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The M rows of a batch that predict an answer: logits float32 [M, V], the rest [M]."""

    logits: Tensor
    targets: Tensor
    weights: Tensor
    owners: Tensor

    @property
    def loss(self) -> Tensor:
        """Weighted mean of the cross entropies."""
        each = F.cross_entropy(self.logits, self.targets, reduction="none")
        return (each * self.weights).sum() / self.weights.sum()


def predictions(model: Owl2Model, batch: Batch) -> Predictions:
    """Predict the ids that count."""
    hidden = hidden_rows(model, batch)
    tokens = batch.ids.shape[1]
    owners, places = batch.weights[:, 1:].nonzero(as_tuple=True)
    logits = model.head(hidden[owners * tokens + places]).float()
    return Predictions(logits, batch.ids[owners, places + 1], batch.weights[owners, places + 1], owners)
