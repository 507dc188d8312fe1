"""Quantizing the linear layers of one decoder layer, in the order in which rows pass through them.

"True sequential" (Frantar et al. 2022, code of the paper): each linear layer sees the inputs that the already
quantized ones before it produce, within the layer too. A projection that belongs to one modality branch sees
the rows of that modality only; shared ones see all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from owl2.export.model import DecoderLayer
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import gptq, relative_error, sampled_rows
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


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What GPTQ cost in one linear layer; errors are squared, relative to the energy of the layer's output.

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


@dataclass(frozen=True)
class Rows:
    """Second moments of the rows that a linear layer sees; None for the modality that it never sees."""

    text: HessianAccumulator | None
    image: HessianAccumulator | None


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
    layer: DecoderLayer, stream: Stream | None, config: QuantConfig, name: str
) -> dict[str, QuantizedLinear]:
    """Quantize all linear layers of ``layer`` and leave their dequantized weights in it.

    Args:
        layer: float32; changed in place.
        stream: calibration rows before this layer; not moved. ``rtn`` needs none.
        config: settings of all weights.
        name: of the layer, for messages.

    Returns:
        One entry per name of :data:`LINEARS`.

    Raises:
        CalibrationError: GPTQ without a stream, or a branch that sees no rows.
        QuantizationError: a weight cannot be quantized; the message names it.
    """
    if config.method == "rtn":
        done = {linear: QuantizedLinear(rtn(_weight(layer, linear), config), None) for linear in LINEARS}
        for linear, quantized in done.items():
            _store(layer, linear, quantized)
        return done
    if stream is None:
        raise CalibrationError(f"{name}: GPTQ needs calibration rows; give some, or choose method rtn on purpose")
    done = {}
    for site in SITES:
        text, image = _moments(layer, site[0], stream, name)
        shared = text.joined(image, config.image_weight)
        for linear in site:
            rows = Rows(None if linear in IMAGE_BRANCH else text, None if linear in TEXT_BRANCH else image)
            try:
                done[linear] = _quantize(_weight(layer, linear), rows, shared, config)
            except QuantizationError as error:
                raise QuantizationError(f"{name} {linear}: {error}") from error
            _store(layer, linear, done[linear])
    return done


def _moments(
    layer: DecoderLayer, linear: str, stream: Stream, name: str
) -> tuple[HessianAccumulator, HessianAccumulator]:
    """Second moments of the text rows and of the image rows that enter ``linear``."""
    width = _weight(layer, linear).shape[1]
    what = "keys and values" if linear == ATTENTION else linear
    text, image = (HessianAccumulator(width, f"{name} {what}, {kind} rows") for kind in ("text", "image"))
    for sequence, inputs in site_inputs(layer, linear, stream):
        text.add(inputs[sequence.routing.text])
        image.add(inputs[sequence.routing.image])
    return text, image


def _quantize(weight: Tensor, rows: Rows, shared: Tensor, config: QuantConfig) -> QuantizedLinear:
    """GPTQ on the rows that a linear layer sees; ``shared`` is the Hessian of both modalities, [K, K]."""
    alone = rows.image if rows.text is None else rows.text if rows.image is None else None
    quantized, report = gptq(weight, shared if alone is None else alone.result(), config)
    sampled = sampled_rows(weight)
    stored = quantized.dequantize()[sampled]

    def error_on(moment: HessianAccumulator | None) -> float | None:
        return None if moment is None else relative_error(weight[sampled], stored, moment.result())

    return QuantizedLinear(
        quantized,
        ModuleReport(
            error=report.error,
            rtn_error=report.rtn_error,
            text_error=error_on(rows.text),
            image_error=error_on(rows.image),
            damping=report.damping,
            dead_columns=report.dead_columns,
        ),
    )


def _weight(layer: DecoderLayer, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@torch.no_grad()
def _store(layer: DecoderLayer, name: str, quantized: QuantizedLinear) -> None:
    _weight(layer, name).copy_(quantized.weight.dequantize())
