"""The scripts that load a LLaMA from a GGUF file into owl2's decoder, on a tiny model with random weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch import Tensor

from owl2.quant.models.mplug_owl2 import Routing, rotary_tables

SCRIPTS = ROOT / "scripts" / "witness"
HEADS, KV_HEADS, HEAD_DIM, WIDE, TOKENS, THETA = 4, 2, 6, 40, 5, 100.0
WIDTH = HEADS * HEAD_DIM


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("checkpoint")


@pytest.fixture
def quantizers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("quantizers")


@pytest.fixture
def gguf() -> dict[str, Tensor]:
    """Tensors of a one-layer model under the names and in the row order of a GGUF file."""
    shapes = {
        "token_embd": (11, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (WIDE, WIDTH),
        "blk.0.ffn_up": (WIDE, WIDTH),
        "blk.0.ffn_down": (WIDTH, WIDE),
    }
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=generator).half().float() for name, shape in shapes.items()}


def rotate_neighbours(head: Tensor, position: int) -> Tensor:
    """Rotary position of one head [D] as llama.cpp stores it: elements 2i and 2i + 1 are a pair."""
    turned = head.clone()
    for i in range(0, HEAD_DIM, 2):
        angle = torch.tensor(position / THETA ** (i / HEAD_DIM))
        turned[i] = head[i] * angle.cos() - head[i + 1] * angle.sin()
        turned[i + 1] = head[i] * angle.sin() + head[i + 1] * angle.cos()
    return turned


def slow_layer(gguf: dict[str, Tensor], rows: Tensor) -> Tensor:
    """One LLaMA layer with grouped heads, head by head and position by position, on the GGUF's own order."""

    def weight(name: str) -> Tensor:
        return gguf[f"blk.0.{name}.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight(name)

    x = norm(rows, "attn_norm")
    q = (x @ weight("attn_q").T).view(TOKENS, HEADS, HEAD_DIM)
    k = (x @ weight("attn_k").T).view(TOKENS, KV_HEADS, HEAD_DIM)
    v = (x @ weight("attn_v").T).view(TOKENS, KV_HEADS, HEAD_DIM)
    mixed = torch.zeros(TOKENS, HEADS, HEAD_DIM)
    for t in range(TOKENS):
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            query = rotate_neighbours(q[t, head], t)
            keys = torch.stack([rotate_neighbours(k[s, shared], s) for s in range(t + 1)])
            mixed[t, head] = (keys @ query / HEAD_DIM**0.5).softmax(0) @ v[: t + 1, shared]
    rows = rows + mixed.view(TOKENS, WIDTH) @ weight("attn_output").T
    x = norm(rows, "ffn_norm")
    gate, up = x @ weight("ffn_gate").T, x @ weight("ffn_up").T
    return rows + (gate * gate.sigmoid() * up) @ weight("ffn_down").T


def test_a_layer_from_gguf_computes_what_the_gguf_means(
    checkpoint: ModuleType, quantizers: ModuleType, gguf: dict[str, Tensor], tmp_path: Path
) -> None:
    settings = {
        "vocab_size": 11,
        "hidden_size": WIDTH,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(checkpoint.convert(gguf, HEADS, KV_HEADS), tmp_path / "model.safetensors")
    llama = quantizers.Llama.open(tmp_path, None)
    rows = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    text = Routing.of(torch.zeros(1, TOKENS, dtype=torch.int64))
    with torch.no_grad():
        found, _ = llama.layer(0)(rows, text, (1, TOKENS), rotary_tables(llama.config, TOKENS, TOKENS))
    assert torch.allclose(found, slow_layer(gguf, rows), atol=2e-4)


def test_score_is_what_its_formulas_say(quantizers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "ROWS_AT_ONCE", 2)
    generator = torch.Generator().manual_seed(0)
    reference, rows = (torch.randn(3, TOKENS, 4, generator=generator) for _ in range(2))
    head = torch.randn(7, 4, generator=generator)
    windows = torch.randint(7, (3, TOKENS), generator=generator)
    score = quantizers.score(reference, rows, windows, head, 0.0)
    losses, divergences, same = [], [], []
    for window in range(3):
        for t in range(TOKENS - 1):
            p, q = (head @ reference[window, t]).softmax(0), (head @ rows[window, t]).softmax(0)
            losses.append(-q[windows[window, t + 1]].log())
            divergences.append(sum(a * (a / b).log() for a, b in zip(p, q)))
            same.append(int(p.argmax()) == int(q.argmax()))
    assert score.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert score.divergence == pytest.approx(float(sum(divergences)) / len(divergences), rel=1e-5)
    assert score.agreement == pytest.approx(sum(same) / len(same))
