"""Quantizing the linear layers of one decoder layer, in the order in which rows pass through them.

"True sequential" (Frantar et al. 2022, code of the paper): each linear layer sees the inputs that the already
quantized ones before it produce, within the layer too. A projection that belongs to one modality branch sees
the rows of that modality only; shared ones see all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from owl2.export.model import DecoderLayer
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import GptqReport, gptq
from owl2.quant.grid import QuantizedWeight, rtn
from owl2.quant.hessian import HessianAccumulator
from owl2.quant.stream import Sequence, Stream
from owl2.runtime.errors import CalibrationError, QuantizationError

ATTENTION = "self_attn.q_proj"
TEXT_BRANCH = ("self_attn.k_proj.multiway.0", "self_attn.v_proj.multiway.0")
IMAGE_BRANCH = ("self_attn.k_proj.multiway.1", "self_attn.v_proj.multiway.1")
SITES = (
    (ATTENTION, *TEXT_BRANCH, *IMAGE_BRANCH),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linear layers that share an input, in order; the first of each is fed all rows."""

LINEARS = tuple(name for site in SITES for name in site)


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight and, for GPTQ, what it cost."""

    weight: QuantizedWeight
    report: GptqReport | None


class _InputSeen(Exception):
    """Ends a forward pass once the wanted input was seen."""


@contextmanager
def _watching(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Put the input of ``module`` into ``seen`` and end the forward pass there."""

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _InputSeen

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def site_inputs(layer: DecoderLayer, name: str, stream: Stream) -> Iterator[tuple[Sequence, Tensor]]:
    """Each sequence with the rows [T, K] that enter the linear layer ``name`` of ``layer``."""
    for sequence in stream.sequences:
        seen: list[Tensor] = []
        with _watching(layer.get_submodule(name), seen):
            try:
                next(Stream(stream.config, [sequence]).outputs(layer))
            except _InputSeen:
                yield sequence, seen[0]


def quantize_layer(
    layer: DecoderLayer, stream: Stream | None, config: QuantConfig, name: str, kept: Collection[str] = ()
) -> dict[str, QuantizedLinear]:
    """Quantize the linear layers of ``layer`` and leave their dequantized weights in it.

    Args:
        layer: float32; changed in place.
        stream: calibration rows before this layer; not moved. ``rtn`` needs none.
        config: settings of all weights.
        name: of the layer, for messages.
        kept: names of linear layers that stay as they are.

    Returns:
        One entry per other name of :data:`LINEARS`.

    Raises:
        CalibrationError: GPTQ without a stream, or a branch that sees no rows.
        QuantizationError: a weight cannot be quantized; the message names it.
    """
    if config.method == "rtn":
        done = {
            linear: QuantizedLinear(rtn(_weight(layer, linear), config), None)
            for linear in LINEARS
            if linear not in kept
        }
        for linear, quantized in done.items():
            _store(layer, linear, quantized)
        return done
    if stream is None and any(linear not in kept for linear in LINEARS):
        raise CalibrationError(f"{name}: GPTQ needs calibration rows; give some, or choose method rtn on purpose")
    done = {}
    for site in SITES:
        wanted = [linear for linear in site if linear not in kept]
        if stream is None or not wanted:
            continue
        hessians = _hessians(layer, site, stream, name)
        for linear in wanted:
            try:
                done[linear] = QuantizedLinear(*gptq(_weight(layer, linear), hessians[linear], config))
            except QuantizationError as error:
                raise QuantizationError(f"{name} {linear}: {error}") from error
            _store(layer, linear, done[linear])
    return done


def _hessians(layer: DecoderLayer, site: tuple[str, ...], stream: Stream, name: str) -> dict[str, Tensor]:
    """The Hessian of each linear layer of ``site``, each [K, K]; equal ones are the same tensor."""
    weight = _weight(layer, site[0])
    width, device = weight.shape[1], weight.device
    if site[0] != ATTENTION:
        rows = HessianAccumulator(width, f"{name} {site[0]}", device)
        for _, inputs in site_inputs(layer, site[0], stream):
            rows.add(inputs)
        return dict.fromkeys(site, rows.result())
    text = HessianAccumulator(width, f"{name} keys and values, text rows", device)
    image = HessianAccumulator(width, f"{name} keys and values, image rows", device)
    for sequence, inputs in site_inputs(layer, ATTENTION, stream):
        routing = sequence.routing.to(device)
        text.add(inputs[routing.text])
        image.add(inputs[routing.image])
    branches = dict.fromkeys(TEXT_BRANCH, text.result()) | dict.fromkeys(IMAGE_BRANCH, image.result())
    return branches | {ATTENTION: text.joined(image).result()}


def _weight(layer: DecoderLayer, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@torch.no_grad()
def _store(layer: DecoderLayer, name: str, quantized: QuantizedLinear) -> None:
    _weight(layer, name).copy_(quantized.weight.dequantize())
