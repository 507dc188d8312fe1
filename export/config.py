"""Settings of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from owl2.quant.config import Method, QuantConfig
from owl2.runtime.config import require
from owl2.runtime.spec import FloatType

WeightType = Literal["int4", "int8", "fp16", "fp32"]
VisionType = Literal["int8", "fp16", "fp32"]
Layout = Literal["bundle", "gptq"]

DEFAULT_WEIGHTS: WeightType = "int4"
DEFAULT_GROUP_SIZE = 128
VISION_BESIDE: dict[WeightType, VisionType] = {"int4": "int8", "int8": "int8", "fp16": "fp16", "fp32": "fp32"}
BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """What is exported, where to, and how its weights are stored.

    Attributes:
        checkpoint: folder in the official layout.
        bundle: folder to write.
        weights: of the decoder's linear layers.
        vision: of the vision tower's and the abstractor's linear layers; None for int8 beside integer weights
            (fp16 where the graph cannot compute with it) and for the decoder's own type otherwise.
        method: how integer weights are found.
        group_size: columns that share a scale.
        calibration: folder of images or JSONL file; None for the built-in set.
        samples: most calibration samples used.
        overwrite: replace a bundle that is there.
        layout: ``bundle``, or ``gptq`` for a checkpoint in the layout of AutoGPTQ, GPTQModel and Optimum.
        dialect: operators of the graphs: ``ort`` for ONNX Runtime, ``onnx`` for TensorRT, or another one of
            :data:`owl2.export.graph.dialect.DIALECTS`.
        activations: type in which the graphs compute; None for fp32 in the dialect ort and beside fp32 weights, fp16
            in the dialect onnx.
        device: where layers are computed and quantized: ``cpu``, ``cuda`` or ``cuda:N``.
        fresh: start over where an interrupted export could be continued.

    Raises:
        ConfigError: a value outside its set, or one that the layout does not have.
    """

    checkpoint: Path
    bundle: Path
    weights: WeightType = DEFAULT_WEIGHTS
    vision: VisionType | None = None
    method: Method = "gptq"
    group_size: int = DEFAULT_GROUP_SIZE
    calibration: Path | None = None
    samples: int = 128
    overwrite: bool = False
    layout: Layout = "bundle"
    dialect: str = "ort"
    activations: FloatType | None = None
    device: str = "cpu"
    fresh: bool = False

    def __post_init__(self) -> None:
        require(
            self.weights in get_args(WeightType),
            f"weights {self.weights!r}: use one of {', '.join(get_args(WeightType))}",
        )
        require(
            self.vision is None or self.vision in get_args(VisionType),
            f"vision {self.vision!r}: use one of {', '.join(get_args(VisionType))}",
        )
        require(
            re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None,
            f"device {self.device!r}: use cpu, cuda or cuda:N",
        )
        require(self.samples > 0, f"samples must be positive, got {self.samples}")
        require(self.layout in get_args(Layout), f"layout {self.layout!r}: use bundle or gptq")
        require(
            self.layout == "bundle" or (self.weights in ("int4", "int8") and self.vision in (None, "fp16")),
            f"layout gptq has integer weights and the vision side in fp16; got weights {self.weights}, vision "
            f"{self.vision}",
        )
        # Not before: only an export needs what this imports.
        from owl2.export.graph.dialect import DIALECTS

        require(self.dialect in DIALECTS, f"dialect {self.dialect!r}: use one of {', '.join(DIALECTS)}")
        require(
            self.activations in (None, *get_args(FloatType)),
            f"activations {self.activations!r}: use one of {', '.join(get_args(FloatType))}",
        )
        self._check_types()
        _ = self.quant

    def _check_types(self) -> None:
        """Refuse types of weights that a graph cannot compute with."""
        require(
            self.layout == "bundle" or (self.dialect == "ort" and self.activations is None),
            "a checkpoint of layout gptq has no graphs: leave dialect and activations out",
        )
        types = f"weights {self.weights}, vision {self.vision_type}, activations {self.activation_type}"
        require(
            self.activation_type == "fp32" or "fp32" not in (self.weights, self.vision_type),
            f"fp32 weights need fp32 activations; got {types}",
        )
        require(
            self.activation_type == "fp32" or self.vision_type != "int8",
            f"an int8 vision side computes with fp32 activations; give --vision fp16; got {types}",
        )
        require(
            self.dialect == "ort" or "int8" not in (self.weights, self.vision_type),
            "the dialect onnx is for TensorRT, which does not take int8 weights as they are made here; use int4, fp16 "
            f"or fp32; got {types}",
        )

    @property
    def quant(self) -> QuantConfig | None:
        """How the decoder's weights become integers; None when they stay floating point."""
        if self.weights in ("fp16", "fp32"):
            return None
        # ONNX Runtime takes negative scales, TensorRT and GPTQ checkpoints do not.
        signed = self.layout == "bundle" and self.dialect == "ort"
        return QuantConfig(
            bits=int(self.weights[3:]),
            group_size=self.group_size,
            method=self.method,
            signed_scales=signed,
            scale_dtype="fp16" if self.layout == "gptq" else self.activation_type,
        )

    @property
    def head(self) -> WeightType:
        """The output head's type: int8 beside integer weights, where 4 bits would cost the most; fp16 for TensorRT."""
        if self.layout == "gptq":
            return "fp16"
        if self.weights in ("fp16", "fp32"):
            return self.weights
        return "int8" if self.dialect == "ort" else "fp16"

    @property
    def activation_type(self) -> FloatType:
        """The activations' type, the default resolved."""
        if self.activations is not None:
            return self.activations
        return "fp32" if self.dialect == "ort" or self.weights == "fp32" else "fp16"

    @property
    def vision_type(self) -> VisionType:
        """The vision side's type, the default resolved."""
        if self.vision is not None:
            return self.vision
        usual = VISION_BESIDE[self.weights]
        floating = self.layout == "gptq" or self.dialect != "ort" or self.activation_type == "fp16"
        return "fp16" if floating and usual == "int8" else usual

    @property
    def embeddings(self) -> Literal["fp32", "fp16"]:
        """The token table's type."""
        return "fp32" if self.weights == "fp32" else "fp16"
