"""Decoder with modality-split keys, values and norms (mPLUG-Owl2, Ye et al. 2023, section 3.3).

Branch 0 belongs to text positions, branch 1 to image positions. Row-wise operations work on flattened
rows [B·T, C]; only attention needs the order of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl2.runtime.config import DecoderConfig
from owl2.runtime.rope import rotary_angles

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values, each [B, H, S, D]."""


@dataclass(frozen=True)
class Routing:
    """Indices of text rows and of image rows among flattened rows, and the order that puts both back.

    Attributes:
        text, image: int64 row indices into [B·T].
        order: int64 [B·T]; ``concat(text rows, image rows)[order]`` is the original order.
    """

    text: Tensor
    image: Tensor
    order: Tensor

    @classmethod
    def of(cls, modality: Tensor) -> Routing:
        """modality: [B, T], 1 at image positions."""
        flat = modality.reshape(-1).bool()
        text, image = (~flat).nonzero()[:, 0], flat.nonzero()[:, 0]
        return cls(text, image, torch.cat([text, image]).argsort())

    def to(self, device: torch.device) -> Routing:
        return Routing(self.text.to(device), self.image.to(device), self.order.to(device))


def rotary_tables(config: DecoderConfig, length: int, total: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..length-1 in a sequence of ``total``: each float32 [length, D/2]."""
    angles = torch.from_numpy(rotary_angles(config, range(length), total))
    return angles.cos(), angles.sin()


def rotary_slice(config: DecoderConfig, start: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions start..start+tokens-1, the last of a sequence: each float32 [tokens, D/2]."""
    cos, sin = rotary_tables(config, start + tokens, start + tokens)
    return cos[start:], sin[start:]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half layout: x [B, H, T, D], cos and sin [T, D/2] -> [B, H, T, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RmsNorm(nn.Module):
    """RMSNorm in float32, cast back to the working dtype, then times the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] -> [..., C]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Multiway(nn.Module):
    """Two copies of a module, chosen per row by modality."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([text, image])

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """rows: [B·T, C]; each branch sees its own rows only -> [B·T, C']."""
        text, image = self.multiway
        if len(routing.image) == 0:
            return text(rows)  # type: ignore[no-any-return]
        return torch.cat([text(rows[routing.text]), image(rows[routing.image])])[routing.order]


class NewKeyValues(nn.Module):
    """Rotated keys and values [B, H, T, D] of new positions, as attention reads them and a cache would hold them.

    A forward hook here sees them, or replaces them by the values that a narrower cache holds.
    """

    def forward(self, keys: Tensor, values: Tensor) -> KeyValue:
        return keys, values


class Attention(nn.Module):
    """Causal attention over a mixed sequence; q and o are shared, k and v are split."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.new_kv = NewKeyValues()

        def linear() -> nn.Linear:
            return nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

        self.q_proj = linear()
        self.k_proj = Multiway(linear(), linear())
        self.v_proj = Multiway(linear(), linear())
        self.o_proj = linear()

    def forward(
        self,
        rows: Tensor,
        routing: Routing,
        shape: tuple[int, int],
        rotary: tuple[Tensor, Tensor],
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """rows: [B·T, C] with shape (B, T), rotary of these T positions -> [B·T, C] and all keys and values."""
        batch, tokens = shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, tokens, self.heads, -1).transpose(1, 2)

        q = rotate(split(self.q_proj(rows)), *rotary)
        k = rotate(split(self.k_proj(rows, routing)), *rotary)
        k, v = self.new_kv(k, split(self.v_proj(rows, routing)))
        if past is None:
            joined = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            visible = torch.ones(tokens, k.shape[2], dtype=torch.bool, device=rows.device).tril(k.shape[2] - tokens)
            joined = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.o_proj(joined.transpose(1, 2).reshape(batch * tokens, -1)), (k, v)


class Mlp(nn.Module):
    """down(SiLU(gate x) ∘ up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """rows: [M, C] -> [M, C]."""
        return self.down_proj(F.silu(self.gate_proj(rows)) * self.up_proj(rows))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()

        def norm() -> RmsNorm:
            return RmsNorm(config.hidden_size, config.rms_norm_eps)

        self.input_layernorm = Multiway(norm(), norm())
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Multiway(norm(), norm())
        self.mlp = Mlp(config)

    def forward(
        self,
        rows: Tensor,
        routing: Routing,
        shape: tuple[int, int],
        rotary: tuple[Tensor, Tensor],
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """rows: [B·T, C] with shape (B, T) -> [B·T, C] and this layer's keys and values [B, H, S + T, D]."""
        attention, present = self.self_attn(self.input_layernorm(rows, routing), routing, shape, rotary, past)
        rows = rows + attention
        return rows + self.mlp(self.post_attention_layernorm(rows, routing)), present
