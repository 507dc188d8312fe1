"""Visual abstractor: learned queries gather the vision tower's rows into a few decoder rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl2.runtime.config import AbstractorConfig

# norm1, normk and norm2 are built without an epsilon upstream, so torch's default holds whatever the config says.
NORM_EPS = 1e-5


def sine_positions(width: int, positions: Tensor) -> Tensor:
    """Sines then cosines of ``positions`` at width/2 frequencies: [M] float32 -> [M, width]."""
    half = width // 2
    omega = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float32) / half)
    angles = positions[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_positions(width: int, grid: int, use_cls_token: bool) -> Tensor:
    """Fixed positions of the patches, column half first: -> [grid² (+1), width]; the CLS row is zero."""
    cells = torch.arange(grid * grid)
    columns = sine_positions(width // 2, (cells % grid).float())
    rows = sine_positions(width // 2, (cells // grid).float())
    table = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros(1, width), table]) if use_cls_token else table


class CrossAttention(nn.Module):
    """Queries attend to themselves and to the image's rows."""

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        queries = torch.arange(config.num_learnable_queries, dtype=torch.float32)
        self.register_buffer("q_pos_embed", sine_positions(width, queries))
        self.register_buffer("k_pos_embed", grid_positions(width, config.grid_size, config.use_cls_token))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """queries: [N, Q, C], patches: [N, S, C] -> [N, Q, C]; positions enter queries and keys, not values."""
        context = torch.cat([queries, patches], dim=1)
        positions = torch.cat([self.q_pos_embed, self.k_pos_embed])
        q = self._split(self.query(queries + self.q_pos_embed))
        k = self._split(self.key(context + positions))
        v = self._split(self.value(context))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GatedMlp(nn.Module):
    """w2(LayerNorm(SiLU(w1 x) ∘ w3 x)), all with bias."""

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, Q, C] -> [N, Q, C]."""
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))  # type: ignore[no-any-return]


class CrossOutput(nn.Module):
    """The layers after the attention, grouped as in the checkpoint."""

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = GatedMlp(config)

    def forward(self, residual: Tensor, attention: Tensor) -> Tensor:
        """residual, attention: [N, Q, C] -> [N, Q, C]."""
        x = residual + self.out_proj(attention)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class CrossAttentionBlock(nn.Module):
    """One abstractor layer. The *normalised* queries replace the residual stream."""

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.normk = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attention = CrossAttention(config)
        self.output = CrossOutput(config)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """queries: [N, Q, C], patches: [N, S, C] -> [N, Q, C]."""
        queries = self.norm1(queries)
        return self.output(queries, self.attention(queries, self.normk(patches)))  # type: ignore[no-any-return]


class AbstractorLayer(nn.Module):
    """Holds the block under its official name."""

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.crossattention = CrossAttentionBlock(config)


class AbstractorEncoder(nn.Module):
    """Holds the layers under their official name."""

    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AbstractorLayer(config) for _ in range(config.num_hidden_layers))

    def block(self, index: int) -> CrossAttentionBlock:
        layer = self.layers[index]
        assert isinstance(layer, AbstractorLayer)
        return layer.crossattention


class VisualAbstractor(nn.Module):
    """Vision rows to decoder rows."""

    def __init__(self, config: AbstractorConfig, decoder_width: int) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.zeros(1, config.num_learnable_queries, config.hidden_size))
        self.encoder = AbstractorEncoder(config)
        self.visual_fc = nn.Linear(config.hidden_size, decoder_width)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, decoder_width))

    def hidden_states(self, patches: Tensor) -> list[Tensor]:
        """patches: [N, S, C] -> query rows after each layer, each [N, Q, C]."""
        queries = self.query_embeds.expand(len(patches), -1, -1)
        states = []
        for index in range(len(self.encoder.layers)):
            queries = self.encoder.block(index)(queries, patches)
            states.append(queries)
        return states

    def forward(self, patches: Tensor) -> Tensor:
        """patches: [N, S, C] -> [N, Q + 1, decoder width]; the last row is the end-of-image row."""
        rows = self.visual_fc(self.hidden_states(patches)[-1])
        return torch.cat([rows, self.vit_eos.expand(len(rows), -1, -1)], dim=1)
