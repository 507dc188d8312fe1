"""Sensitivity of the vision side's linear layers to int8, by measurement.

One part at a time is set to int8, weights and activations (docs/quantization.md). Such errors are independent: their
squares add up to the error of all parts together, on the sample model 1.50 % of the RMS against 1.46 % measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl2.export.graph.weights import ChannelInt8Weight
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor

# Parts are kept until a quarter of the error is left, or a tenth of the multiply-adds is in floating point.
ERROR_LEFT = 0.25
MAX_FLOAT_WORK = 0.1


@dataclass(frozen=True, eq=False)
class VisionPart:
    """Linear layers that are int8 or not together.

    Attributes:
        name: as in the checkpoint.
        modules: the linear layers.
        effect: RMS change of the image rows when only these are int8, over the rows' RMS.
        work: multiply-adds for one image.
    """

    name: str
    modules: tuple[nn.Linear, ...]
    effect: float
    work: int


@torch.no_grad()
def measure_parts(tower: VisionModel, abstractor: VisualAbstractor, pixels: Tensor) -> Iterator[VisionPart]:
    """Each layer of the tower as one part, each linear layer of the abstractor as one.

    Args:
        tower, abstractor: on the checkpoint's weights.
        pixels: [N, 3, R, R], images to measure with; the time grows with half the tower per layer.
    """
    states = tower.hidden_states(pixels)
    patches = _finish(tower, states[-1])
    reference = abstractor(patches)
    for index, layer in enumerate(tower.encoder.layers):
        with _int8(_linears(layer)) as counted:
            x = states[index]
            for later in tower.encoder.layers[index:]:
                x = later(x)
            change = abstractor(_finish(tower, x)) - reference
        yield _part(f"vision_model.encoder.layers.{index}", _linears(layer), change, reference, counted)
    for name, module in abstractor.named_modules():
        if isinstance(module, nn.Linear):
            with _int8([module]) as counted:
                change = abstractor(patches) - reference
            yield _part(f"visual_abstractor.{name}", (module,), change, reference, counted)


def choose_kept(parts: Sequence[VisionPart]) -> list[VisionPart]:
    """The parts to keep in floating point, those that gain most for their work first."""
    left = sum(part.effect**2 for part in parts)
    enough, budget = ERROR_LEFT**2 * left, MAX_FLOAT_WORK * sum(part.work for part in parts)
    kept = []
    for part in sorted(parts, key=lambda part: -(part.effect**2) / part.work):
        if left <= enough:
            break
        if part.work <= budget:
            kept.append(part)
            left -= part.effect**2
            budget -= part.work
    return kept


def _linears(module: nn.Module) -> tuple[nn.Linear, ...]:
    return tuple(child for child in module.modules() if isinstance(child, nn.Linear))


def _finish(tower: VisionModel, x: Tensor) -> Tensor:
    """The abstractor's input from the tower's last rows."""
    return x if tower.post_layernorm is None else tower.post_layernorm(x)


def _part(
    name: str, modules: tuple[nn.Linear, ...], change: Tensor, reference: Tensor, counted: Sequence[int]
) -> VisionPart:
    return VisionPart(name, modules, float(change.norm() / reference.norm()), sum(counted) // len(reference))


@contextmanager
def _int8(modules: Sequence[nn.Linear]) -> Iterator[list[int]]:
    """Let ``modules`` compute as ONNX Runtime's DynamicQuantizeMatMul; yields the multiply-adds of each call."""
    counted: list[int] = []

    def register(module: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        weight = ChannelInt8Weight.quantize(module.weight.detach()).dequantize()

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> Tensor:
            x = inputs[0]
            counted.append(x.numel() * len(weight))
            return F.linear(torch.stack([_quantized(image) for image in x]), weight, module.bias)

        return module.register_forward_hook(hook)

    handles = [register(module) for module in modules]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def _quantized(x: Tensor) -> Tensor:
    """Round to uint8 with one scale and zero point for all of ``x``, and back (ONNX DynamicQuantizeLinear)."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
