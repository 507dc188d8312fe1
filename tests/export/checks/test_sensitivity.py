"""int8 hurts where activations have outliers; those parts are found and kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.modules import load_vision
from owl2.export.checks.sensitivity import ERROR_LEFT, MAX_FLOAT_WORK, VisionPart, choose_kept, measure_parts
from owl2.export.graph.weights import ChannelInt8Weight
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor

Vision = tuple[VisionModel, VisualAbstractor, Tensor]


@pytest.fixture
def vision(sample_checkpoint: Path) -> Vision:
    with Checkpoint(sample_checkpoint) as checkpoint:
        config = checkpoint.config
        tower, abstractor = load_vision(checkpoint)
    pixels = torch.randn(1, 3, config.vision.image_size, config.vision.image_size, generator=torch.manual_seed(3))
    return tower, abstractor, pixels


@torch.no_grad()
def test_an_effect_is_what_int8_does_to_the_image_rows(vision: Vision) -> None:
    """The last linear layer, by hand: what it changes needs no forward pass after it."""
    tower, abstractor, pixels = vision
    parts = {part.name: part for part in measure_parts(tower, abstractor, pixels)}
    x = abstractor.hidden_states(tower(pixels))[-1]
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    scale = (high - low) / 255
    zero = round(-low / scale)
    rounded = ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale
    layer = abstractor.visual_fc
    weight = ChannelInt8Weight.quantize(layer.weight).dequantize()
    change = rounded @ weight.T - x @ layer.weight.T
    part = parts["visual_abstractor.visual_fc"]
    assert part.effect == pytest.approx(float(change.norm() / abstractor(tower(pixels)).norm()), rel=1e-3)
    assert part.work == x.shape[1] * layer.weight.numel()


@torch.no_grad()
def test_effects_add_up_and_cover_every_linear_layer_once(vision: Vision) -> None:
    tower, abstractor, pixels = vision
    before = abstractor(tower(pixels))
    parts = list(measure_parts(tower, abstractor, pixels))
    assert torch.equal(abstractor(tower(pixels)), before)  # measuring changes nothing
    covered = [module for part in parts for module in part.modules]
    linears = [m for model in (tower, abstractor) for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(covered) == len(linears)
    assert set(covered) == set(linears)
    assert all(0 < part.effect < 0.1 for part in parts)


@torch.no_grad()
def test_a_layer_with_outliers_is_kept(vision: Vision) -> None:
    """One input channel of a layer 300 times as strong as the rest: one scale for all no longer fits."""
    tower, abstractor, pixels = vision
    index = 1
    mlp = tower.encoder.layer(index).mlp
    norm = tower.encoder.layer(index).post_attention_layernorm
    norm.weight[7] *= 300
    norm.bias[7] *= 300
    mlp.fc1.weight[:, 7] /= 300
    parts = list(measure_parts(tower, abstractor, pixels))
    worst = max(parts, key=lambda part: part.effect)
    assert worst.name == f"vision_model.encoder.layers.{index}"


def part(name: str, effect: float, work: int) -> VisionPart:
    return VisionPart(name, (), effect, work)


def test_the_best_gain_for_the_work_is_kept_within_the_budget() -> None:
    parts = [part("large", 0.4, 900), part("cheap", 0.3, 50), part("dear", 0.31, 120), part("slight", 0.001, 1)]
    kept = [p.name for p in choose_kept(parts)]
    assert kept == ["cheap", "slight"]  # "dear" and "large" exceed what is left of the tenth of the work
    assert sum(p.work for p in choose_kept(parts)) <= MAX_FLOAT_WORK * 1071


def test_keeping_stops_when_little_error_is_left() -> None:
    parts = [part("a", 0.1, 10), *(part(f"small {i}", 0.001, 10) for i in range(100))]
    assert [p.name for p in choose_kept(parts)] == ["a"]
    left = sum(p.effect**2 for p in parts) - 0.1**2
    assert left <= ERROR_LEFT**2 * sum(p.effect**2 for p in parts)


def test_nothing_to_keep() -> None:
    assert choose_kept([]) == []
    assert choose_kept([part("a", 0.0, 10)]) == []
