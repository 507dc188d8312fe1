"""Settings of quantizing a linear layer's weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from owl2.runtime.config import require

Method = Literal["gptq", "rtn"]
ScaleType = Literal["fp32", "fp16"]

BITS = (4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
MAX_SWEEPS = 100


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """Settings that turn a weight into integers; always symmetric, one scale per row and group of columns.

    Attributes:
        bits: 4 or 8.
        group_size: consecutive columns that share a scale; the block sizes of ONNX Runtime's MatMulNBits.
        method: ``gptq`` corrects later columns for the rounding of earlier ones and needs a Hessian; ``rtn``
            rounds to nearest.
        act_order: quantize columns with strong inputs first, group by group, so that groups stay consecutive
            columns in the file.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        sweeps: of coordinate descent over all codes after GPTQ; 0 for none.
        image_weight: weight of an image row in the Hessian of a projection that both modalities share; a text row
            counts 1. Nothing is read from the model's output at image rows, they only lend keys and values to the
            text after them, so their errors matter less (Li et al. 2024, MBQ, section 3.1).
        asymmetry: how far GPTQ aims at the output of the original model instead of the weight's output on inputs
            that quantizing earlier layers has changed; 0 not at all, 1 all the way.
        clip_search: try scales that clip the largest weights and keep the one with the least error.
        signed_scales: let a scale be negative, so that the largest weight may use the one extra code on the
            negative side. Lowers the squared error by 6 to 12 % (4 bits) at no cost in ONNX Runtime; TensorRT
            refuses scales that are not positive.
        scale_dtype: scales are exact in this type; codes are chosen for the rounded scale.

    Raises:
        ConfigError: a value outside these sets.
    """

    bits: int = 4
    group_size: int = 128
    method: Method = "gptq"
    act_order: bool = True
    damping: float = 0.01
    sweeps: int = 2
    image_weight: float = 0.2
    asymmetry: float = 0.5
    clip_search: bool = True
    signed_scales: bool = False
    scale_dtype: ScaleType = "fp32"

    def __post_init__(self) -> None:
        require(self.bits in BITS, f"bits {self.bits} is not supported; use 4 or 8")
        require(
            self.group_size in GROUP_SIZES,
            f"group_size {self.group_size} is not supported; use one of {', '.join(map(str, GROUP_SIZES))}",
        )
        require(self.method in get_args(Method), f"method {self.method!r} is not known; use gptq or rtn")
        require(
            self.scale_dtype in get_args(ScaleType),
            f"scale_dtype {self.scale_dtype!r} is not known; use fp32 or fp16",
        )
        require(
            0.0 < self.damping <= 1.0,
            f"damping {self.damping} must be above 0 and at most 1 (a fraction of the mean of the diagonal)",
        )
        require(0 <= self.sweeps <= MAX_SWEEPS, f"sweeps {self.sweeps} must be 0 to {MAX_SWEEPS}")
        require(
            0.0 < self.image_weight <= 1000.0,
            f"image_weight {self.image_weight} must be above 0 and at most 1000 (a text row counts 1)",
        )
        require(0.0 <= self.asymmetry <= 1.0, f"asymmetry {self.asymmetry} must be 0 to 1")
