"""Settings that no recorded model uses follow their formula, written here as slowly and plainly as possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from numpy.typing import NDArray

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.quant.models.mplug_owl2 import Owl2Model, rotary_tables
from owl2.runtime.config import DecoderConfig, RopeScaling
from owl2.runtime.rope import rotary_angles

Array = NDArray[np.float64]


def slow_angle(position: int, pair: int, config: DecoderConfig, total: int) -> float:
    """Angle by which one pair of channels turns at one position of a sequence of ``total``."""
    theta, dim = config.rope_theta, config.hidden_size // config.num_attention_heads
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "linear":
        return float(position / scaling.factor * theta ** (-2 * pair / dim))
    if scaling is not None and total > config.max_position_embeddings:
        stretch = scaling.factor * total / config.max_position_embeddings - (scaling.factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    return float(position * theta ** (-2 * pair / dim))


def slow_rotate(x: Array, position: int, config: DecoderConfig, total: int) -> Array:
    """One head's vector at one position; pair i is made of channels i and i + D/2."""
    out, half = np.empty_like(x), len(x) // 2
    for pair in range(half):
        angle = slow_angle(position, pair, config, total)
        out[pair] = x[pair] * np.cos(angle) - x[pair + half] * np.sin(angle)
        out[pair + half] = x[pair + half] * np.cos(angle) + x[pair] * np.sin(angle)
    return out


def slow_logits(model: Owl2Model, embeds: NDArray[np.float32], modality: NDArray[np.int64]) -> Array:
    """The decoder in float64, position by position and head by head: [L, C] -> [L, V]."""
    config = model.config.decoder
    tensors: dict[str, Array] = {name: value.double().numpy() for name, value in model.state_dict().items()}
    length, dim = len(embeds), config.hidden_size // config.num_attention_heads
    heads = [slice(start, start + dim) for start in range(0, config.hidden_size, dim)]

    def linear(name: str, x: Array) -> Array:
        return np.asarray(tensors[f"{name}.weight"] @ x + tensors.get(f"{name}.bias", 0.0))

    def norm(name: str, x: Array) -> Array:
        return np.asarray(x / np.sqrt(np.mean(x**2) + config.rms_norm_eps) * tensors[f"{name}.weight"])

    def silu(x: Array) -> Array:
        return np.asarray(x / (1 + np.exp(-x)))

    rows = list(embeds.astype(np.float64))
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        queries, keys, values = [], [], []
        for position, row in enumerate(rows):
            branch = f"multiway.{modality[position]}"
            x = norm(f"{layer}.input_layernorm.{branch}", row)
            q = linear(f"{layer}.self_attn.q_proj", x)
            k = linear(f"{layer}.self_attn.k_proj.{branch}", x)
            queries.append([slow_rotate(q[head], position, config, length) for head in heads])
            keys.append([slow_rotate(k[head], position, config, length) for head in heads])
            values.append(linear(f"{layer}.self_attn.v_proj.{branch}", x))
        for position in range(length):
            mixed = np.zeros(config.hidden_size)
            for number_of_head, head in enumerate(heads):
                scores = np.array(
                    [queries[position][number_of_head] @ keys[j][number_of_head] for j in range(position + 1)]
                )
                weights = np.exp(scores / np.sqrt(dim))
                mixed[head] = sum(w * values[j][head] for j, w in enumerate(weights / weights.sum()))
            row = rows[position] + linear(f"{layer}.self_attn.o_proj", mixed)
            x = norm(f"{layer}.post_attention_layernorm.multiway.{modality[position]}", row)
            gate, up = linear(f"{layer}.mlp.gate_proj", x), linear(f"{layer}.mlp.up_proj", x)
            rows[position] = row + linear(f"{layer}.mlp.down_proj", silu(gate) * up)
    return np.stack([linear("lm_head", norm("model.norm", row)) for row in rows])


@pytest.fixture(scope="module", params=["a1_base_bin", "a2_fp16_safetensors"])
def model(request: pytest.FixtureRequest) -> Owl2Model:
    with Checkpoint(GOLDEN / request.param / "model") as checkpoint:
        model = Owl2Model(checkpoint.config).requires_grad_(False)
        checkpoint.load_into(model, "")
    return model


def sequence(model: Owl2Model, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings [1, L, C] and a modality [1, L] with text, image rows, text."""
    embeds = torch.randn(1, length, model.config.decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    modality = torch.zeros(1, length, dtype=torch.int64)
    modality[:, 3:10] = 1
    return 0.3 * embeds, modality


def varied(model: Owl2Model, **changes: Any) -> Owl2Model:
    """The same weights under another configuration; biases, where it asks for them, are random."""
    config = replace(model.config, decoder=replace(model.config.decoder, **changes))
    other = Owl2Model(config).requires_grad_(False)
    missing = other.load_state_dict(model.state_dict(), strict=False).missing_keys
    generator = torch.Generator().manual_seed(0)
    for name in missing:
        assert name.endswith(".bias")
        other.get_parameter(name).normal_(generator=generator)
    return other


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": RopeScaling("linear", 2.5)},
        {"rope_scaling": RopeScaling("dynamic", 4.0), "max_position_embeddings": 16},
        {"rope_theta": 500.0},
        {"attention_bias": True},
        {"rms_norm_eps": 1e-2},
    ],
    ids=["linear", "dynamic", "theta", "bias", "eps"],
)
def test_decoder_follows_its_formula_and_the_setting_matters(model: Owl2Model, changes: dict[str, object]) -> None:
    embeds, modality = sequence(model, 21)
    other = varied(model, **changes)
    logits = other.head(other.decode(embeds, modality)[0])[0].numpy()
    expected = slow_logits(other, embeds[0].numpy(), modality[0].numpy())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert np.abs(logits - model.head(model.decode(embeds, modality)[0])[0].numpy()).max() > 0.1


@pytest.mark.parametrize("total", [5, 16, 17, 40])
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.5), RopeScaling("dynamic", 4.0)])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rotary_angles_follow_their_formula(theta: float, scaling: RopeScaling | None, total: int) -> None:
    config = DecoderConfig(
        hidden_size=72, num_attention_heads=3, max_position_embeddings=16, rope_theta=theta, rope_scaling=scaling
    )
    expected = [[slow_angle(position, pair, config, total) for pair in range(12)] for position in range(5)]
    np.testing.assert_allclose(rotary_angles(config, range(5), total), expected, rtol=2e-6)
    cos, sin = rotary_tables(config, 5, total)
    np.testing.assert_allclose(cos, np.cos(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(expected), rtol=0, atol=1e-5)


def test_dynamic_scaling_changes_nothing_up_to_the_trained_length(model: Owl2Model) -> None:
    embeds, modality = sequence(model, 16)
    other = varied(model, rope_scaling=RopeScaling("dynamic", 4.0), max_position_embeddings=16)
    assert torch.equal(other.decode(embeds, modality)[0], model.decode(embeds, modality)[0])


def test_dynamic_scaling_leaves_cached_keys_alone(model: Owl2Model) -> None:
    embeds, modality = sequence(model, 17)
    other = varied(model, rope_scaling=RopeScaling("dynamic", 4.0), max_position_embeddings=16)
    _, past = other.decode(embeds[:, :16], modality[:, :16])
    _, stepped = other.decode(embeds[:, 16:], modality[:, 16:], past)
    _, at_once = other.decode(embeds, modality)
    old, new = stepped[0][0][:, :, :16], stepped[0][0][:, :, 16:]
    assert torch.equal(old, past[0][0])
    torch.testing.assert_close(new, at_once[0][0][:, :, 16:], rtol=0, atol=1e-5)
    assert (old - at_once[0][0][:, :, :16]).abs().max() > 0.1
