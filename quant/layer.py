"""Quantizing the linear layers of one decoder layer, in the order in which rows pass through them.

"True sequential" (Frantar et al. 2022, code of the paper): each linear layer sees inputs that the quantized ones
before it have computed, within the layer too. A projection of one modality branch sees only the rows of that modality;
shared ones see all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from owl2.quant.asymmetric import asymmetric_target
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import gptq, relative_error, sampled_rows
from owl2.quant.grid import QuantizedWeight, rtn
from owl2.quant.hessian import HessianAccumulator
from owl2.quant.models.mplug_owl2 import DecoderLayer
from owl2.quant.stream import Calibration, HiddenStates, Stream
from owl2.runtime.errors import CalibrationError, QuantizationError

TEXT_BRANCH = ("self_attn.k_proj.multiway.0", "self_attn.v_proj.multiway.0")
IMAGE_BRANCH = ("self_attn.k_proj.multiway.1", "self_attn.v_proj.multiway.1")
SITES = (
    ("self_attn.q_proj", *TEXT_BRANCH, *IMAGE_BRANCH),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linear layers that share an input, in order; the first of each receives all rows."""

LINEARS = tuple(name for site in SITES for name in site)

Moments = tuple[HessianAccumulator, HessianAccumulator, HessianAccumulator]
"""Of text rows, of image rows, and of both together."""


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """:class:`owl2.quant.gptq.GptqReport` of one linear layer, against the weight that GPTQ aims at.

    Attributes:
        text_error, image_error: on the rows of one modality; None where the layer never sees them.
    """

    error: float
    rtn_error: float
    text_error: float | None
    image_error: float | None
    damping: float
    dead_columns: int


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight and, for GPTQ, its error."""

    weight: QuantizedWeight
    report: ModuleReport | None


class _InputSeen(Exception):
    """Ends a forward pass after the wanted input was seen."""


def site_inputs(layer: DecoderLayer, name: str, stream: Stream) -> Iterator[tuple[HiddenStates, Tensor]]:
    """Each sequence with the rows [T, K] that enter the linear layer ``name`` of ``layer``."""
    seen: list[Tensor] = []

    def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _InputSeen

    for sequence in stream.sequences:
        with layer.get_submodule(name).register_forward_pre_hook(see), contextlib.suppress(_InputSeen):
            next(Stream(stream.config, [sequence]).outputs(layer))
        yield sequence, seen.pop()


def quantize_layer(
    layer: DecoderLayer,
    original: DecoderLayer | None,
    calibration: Calibration | None,
    config: QuantConfig,
    name: str,
    skip: Collection[str] = (),
) -> dict[str, QuantizedLinear]:
    """Quantize the linear layers of ``layer`` and leave their dequantized weights in it.

    Args:
        layer: float32; changed in place.
        original: the same layer, which stays as it is; ``rtn`` needs none.
        calibration: rows before this layer, not moved; ``rtn`` needs none.
        name: of the layer, for messages.
        skip: names of linear layers to leave as they are.

    Returns:
        One entry per other name of :data:`LINEARS`.
    """
    done: dict[str, QuantizedLinear] = {}
    for site in SITES:
        linears = [linear for linear in site if linear not in skip]
        if not linears:
            continue
        moments = None if config.method == "rtn" else _moments(layer, original, site, calibration, config, name)
        for linear in linears:
            weight = _weight(layer, linear)
            try:
                if moments is None:
                    done[linear] = QuantizedLinear(rtn(weight, config), None)
                else:
                    done[linear] = _gptq(weight, linear, moments, config)
            except QuantizationError as error:
                raise QuantizationError(f"{name} {linear}: {error}") from error
            weight.copy_(done[linear].weight.dequantize())
    return done


def _moments(
    layer: DecoderLayer,
    original: DecoderLayer | None,
    site: tuple[str, ...],
    calibration: Calibration | None,
    config: QuantConfig,
    name: str,
) -> Moments:
    if calibration is None or original is None:
        raise CalibrationError(f"{name}: GPTQ needs calibration rows; give some, or choose method rtn on purpose")
    weight = _weight(layer, site[0])
    inputs = "keys and values" if site is SITES[0] else site[0]
    text, image = (
        HessianAccumulator(weight.shape[1], f"{name} {inputs}, {modality} rows", weight.device)
        for modality in ("text", "image")
    )
    quantized_inputs = site_inputs(layer, site[0], calibration.quantized)
    original_inputs = site_inputs(original, site[0], calibration.original)
    for (sequence, rows), (_, original_rows) in zip(quantized_inputs, original_inputs, strict=True):
        routing = sequence.routing.to(weight.device)
        text.add(rows[routing.text], original_rows[routing.text])
        image.add(rows[routing.image], original_rows[routing.image])
    shared = text.joined(image, config.image_weight)
    if site is not SITES[0]:  # no branch asks for its own; half a GB each for down_proj at full size
        text.release_deviation()
        image.release_deviation()
    return text, image, shared


def _gptq(weight: Tensor, linear: str, moments: Moments, config: QuantConfig) -> QuantizedLinear:
    """GPTQ on the rows that a linear layer sees."""
    text, image, shared = moments
    for_text, for_image = linear not in IMAGE_BRANCH, linear not in TEXT_BRANCH
    seen = shared if for_text and for_image else text if for_text else image
    target = asymmetric_target(weight, seen.hessian, seen.deviation, config.damping, config.asymmetry)
    quantized, cost = gptq(target, seen.hessian, config)
    sampled = sampled_rows(target)
    stored = quantized.dequantize()[sampled]
    report = ModuleReport(
        error=cost.error,
        rtn_error=cost.rtn_error,
        text_error=relative_error(target[sampled], stored, text.hessian) if for_text else None,
        image_error=relative_error(target[sampled], stored, image.hessian) if for_image else None,
        damping=cost.damping,
        dead_columns=cost.dead_columns,
    )
    return QuantizedLinear(quantized, report)


def _weight(layer: DecoderLayer, linear: str) -> Tensor:
    return layer.get_parameter(f"{linear}.weight").detach()
