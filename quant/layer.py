"""Quantizing the linear layers of one decoder layer, in the order in which rows pass through them.

"True sequential" (Frantar et al. 2022, code of the paper): each linear layer sees the inputs that the already
quantized ones before it produce, within the layer too. A projection that belongs to one modality branch sees
the rows of that modality only; shared ones see all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from owl2.quant.asymmetric import asymmetric_target
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import gptq, relative_error, sampled_rows
from owl2.quant.grid import QuantizedWeight, rtn
from owl2.quant.hessian import HessianAccumulator
from owl2.quant.models.mplug_owl2 import DecoderLayer
from owl2.quant.stream import Calibration, Sequence, Stream
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


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What GPTQ cost in one linear layer; errors are squared, relative to the energy of the layer's output.

    The layer before rounding is the one that GPTQ aims at (:mod:`owl2.quant.asymmetric`).

    Attributes:
        error: on the calibration rows as weighted for this layer.
        rtn_error: the same for rounding to nearest with the same scale search.
        text_error, image_error: on the rows of one modality; None where the layer never sees them.
        damping: fraction of the mean of the Hessian's diagonal that was added.
        dead_columns: inputs that were always zero during calibration.
    """

    error: float
    rtn_error: float
    text_error: float | None
    image_error: float | None
    damping: float
    dead_columns: int


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight and, for GPTQ, what it cost."""

    weight: QuantizedWeight
    report: ModuleReport | None


class _InputSeen(Exception):
    """Ends a forward pass once the wanted input was seen."""


@contextlib.contextmanager
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
        with _watching(layer.get_submodule(name), seen), contextlib.suppress(_InputSeen):
            next(Stream(stream.config, [sequence]).outputs(layer))
        yield sequence, seen[0]


def quantize_layer(
    layer: DecoderLayer,
    original: DecoderLayer | None,
    calibration: Calibration | None,
    config: QuantConfig,
    name: str,
    kept: Collection[str] = (),
) -> dict[str, QuantizedLinear]:
    """Quantize the linear layers of ``layer`` and leave their dequantized weights in it.

    Args:
        layer: float32; changed in place.
        original: the same layer, which stays as it is; ``rtn`` needs none.
        calibration: rows before this layer, not moved; ``rtn`` needs none.
        config: settings of all weights.
        name: of the layer, for messages.
        kept: names of linear layers that stay as they are.

    Returns:
        One entry per other name of :data:`LINEARS`.

    Raises:
        CalibrationError: GPTQ without calibration, or a branch that sees no rows.
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
    if calibration is None or original is None:
        if all(linear in kept for linear in LINEARS):
            return {}
        raise CalibrationError(f"{name}: GPTQ needs calibration rows; give some, or choose method rtn on purpose")
    done = {}
    for site in SITES:
        wanted = [linear for linear in site if linear not in kept]
        if not wanted:
            continue
        text, image = _moments(layer, original, site, calibration, name)
        shared = text.joined(image, config.image_weight)
        if site[0] != ATTENTION:  # no branch asks for its own; half a GB each for down_proj at full size
            text.release_deviation()
            image.release_deviation()
        for linear in wanted:
            seen = (None if linear in IMAGE_BRANCH else text), (None if linear in TEXT_BRANCH else image)
            try:
                done[linear] = _quantize(_weight(layer, linear), seen, shared, config)
            except QuantizationError as error:
                raise QuantizationError(f"{name} {linear}: {error}") from error
            _store(layer, linear, done[linear])
    return done


def _moments(
    layer: DecoderLayer, original: DecoderLayer, site: tuple[str, ...], calibration: Calibration, name: str
) -> tuple[HessianAccumulator, HessianAccumulator]:
    """Moments of the text rows and of the image rows that enter the linear layers of ``site``."""
    weight = _weight(layer, site[0])
    what = "keys and values" if site[0] == ATTENTION else site[0]
    text, image = (
        HessianAccumulator(weight.shape[1], f"{name} {what}, {kind} rows", weight.device) for kind in ("text", "image")
    )
    inputs = site_inputs(layer, site[0], calibration.quantized)
    exact_inputs = site_inputs(original, site[0], calibration.original)
    for (sequence, rows), (_, exact) in zip(inputs, exact_inputs, strict=True):
        routing = sequence.routing.to(weight.device)
        text.add(rows[routing.text], exact[routing.text])
        image.add(rows[routing.image], exact[routing.image])
    return text, image


def _quantize(
    weight: Tensor,
    seen: tuple[HessianAccumulator | None, HessianAccumulator | None],
    shared: HessianAccumulator,
    config: QuantConfig,
) -> QuantizedLinear:
    """GPTQ on the rows that a linear layer sees: text, image (None if it never does), or both as ``shared``."""
    alone = seen[1] if seen[0] is None else seen[0] if seen[1] is None else None
    rows = shared if alone is None else alone
    target = asymmetric_target(weight, rows.hessian, rows.deviation, config.damping, config.asymmetry)
    quantized, cost = gptq(target, rows.hessian, config)
    sampled = sampled_rows(target)
    stored = quantized.dequantize()[sampled]
    text, image = (None if m is None else relative_error(target[sampled], stored, m.hessian) for m in seen)
    return QuantizedLinear(
        quantized, ModuleReport(cost.error, cost.rtn_error, text, image, cost.damping, cost.dead_columns)
    )


def _weight(layer: DecoderLayer, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@torch.no_grad()
def _store(layer: DecoderLayer, name: str, quantized: QuantizedLinear) -> None:
    _weight(layer, name).copy_(quantized.weight.dequantize())
