"""Vision tower: a ViT encoder whose output is all rows of its last layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl2.runtime.config import VisionConfig

# Without a CLS token, the position table of every checkpoint is 16x16 and is resized to the image's grid.
TABLE_GRID = 16


class Embeddings(nn.Module):
    """Patches, CLS row, positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        if config.use_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        else:
            self.position_embedding = nn.Parameter(torch.zeros(TABLE_GRID**2, width))
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def positions(self) -> Tensor:
        """Position rows of this image size: -> [1, num_tokens, C]."""
        table: Tensor = self.position_embedding
        if self.config.use_cls_token:
            return table
        grid = self.config.grid
        if grid != TABLE_GRID:
            square = table.float().view(1, TABLE_GRID, TABLE_GRID, -1).permute(0, 3, 1, 2)
            square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
            table = square.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)
        return table[None]

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [N, 3, R, R] -> [N, num_tokens, C]."""
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        if self.config.use_cls_token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.pre_layernorm(x + self.positions())  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Full self-attention with one fused projection laid out [heads, 3, head_dim]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, S, C] -> [N, S, C]."""
        batch, tokens, width = x.shape
        qkv = self.query_key_value(x).view(batch, tokens, self.heads, 3, width // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        joined = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.dense(joined)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """fc2(act(fc1(x))), act being quick_gelu, x · sigmoid(1.702 x), or gelu in its exact erf form."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, S, C] -> [N, S, C]."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, S, C] -> [N, S, C]."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Holds the layers under their official name."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def layer(self, index: int) -> Layer:
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer


class VisionModel(nn.Module):
    """Pixels to one row per patch (and CLS)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_post_layernorm else None
        self.post_layernorm = norm

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """pixels: [N, 3, R, R] -> after pre_layernorm and after each layer, each [N, num_tokens, C]."""
        states = [self.embeddings(pixels)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [N, 3, R, R] -> [N, num_tokens, C]; the post-norm covers all rows."""
        last = self.hidden_states(pixels)[-1]
        return last if self.post_layernorm is None else self.post_layernorm(last)
