"""Settings of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from owl2.quant.config import Method, QuantConfig
from owl2.runtime.arguments import checked
from owl2.runtime.config import require
from owl2.runtime.fit.storage import StorageTypes, storage_types
from owl2.runtime.foreign import shorten
from owl2.runtime.scoring.scale import PRESETS
from owl2.runtime.spec import FloatType, VisionType, WeightType

Layout = Literal["bundle", "gptq"]
Purpose = Literal["chat", "scoring"]


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Source, target and storage types of an export.

    Attributes:
        checkpoint: folder in the official layout; this and the other paths may also be given as strings.
        bundle: folder to write.
        weights: type of the decoder's linear layers.
        vision: type of the vision tower's and the abstractor's linear layers; for None see :func:`storage_types`.
        method: how weights are rounded to integers.
        group_size: columns that share a scale.
        calibration: folder of images or JSONL file; None for the built-in set.
        samples: calibration samples used, at most.
        overwrite: replace an existing bundle.
        layout: ``bundle``, or ``gptq`` for a checkpoint in the layout of AutoGPTQ, GPTQModel and Optimum.
        dialect: operators of the graphs: ``ort`` for ONNX Runtime, ``onnx`` for TensorRT, or another one of
            :data:`owl2.export.graph.dialect.DIALECTS`.
        activations: type in which the graphs compute; for None see :func:`storage_types`.
        device: where layers are computed and quantized: ``cpu``, ``cuda`` or ``cuda:N``.
        fresh: start over where an interrupted export could be continued.
        purpose: what the model is for: ``chat``, or ``scoring``, for which images are calibrated as a scorer asks.
        preset: name of the preset with which the model scores images; empty for none, None for what its names tell.
        lora: folder of a LoRA adapter in PEFT's layout, merged into the weights; None for the checkpoint alone.
        base_preprocessor: take the image preprocessing of mPLUG-Owl2 itself for a checkpoint that has no
            preprocessor_config.json.

    Raises:
        ConfigError: a value outside its set, or one that the layout does not have.
    """

    checkpoint: Path
    bundle: Path
    weights: WeightType = "int4"
    vision: VisionType | None = None
    method: Method = "gptq"
    group_size: int = 128
    calibration: Path | None = None
    samples: int = 128
    overwrite: bool = False
    layout: Layout = "bundle"
    dialect: str = "ort"
    activations: FloatType | None = None
    device: str = "cpu"
    fresh: bool = False
    lora: Path | None = None
    purpose: Purpose = "chat"
    preset: str | None = None
    base_preprocessor: bool = False

    def __post_init__(self) -> None:
        from owl2.export.graph.dialect import DIALECTS  # only an export needs torch

        for name in ("checkpoint", "bundle", "calibration", "lora"):
            given = getattr(self, name)
            optional = name in ("calibration", "lora") and given is None
            require(optional or isinstance(given, str | Path), f"{name} must be a path, got {given!r}")
            if not optional:
                object.__setattr__(self, name, Path(given))
        _require_one_of("weights", self.weights, get_args(WeightType))
        _require_one_of("vision", self.vision, (None, *get_args(VisionType)))
        _require_one_of("layout", self.layout, get_args(Layout))
        _require_one_of("dialect", self.dialect, tuple(DIALECTS))
        _require_one_of("activations", self.activations, (None, *get_args(FloatType)))
        require(
            re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None,
            f"device {shorten(self.device)}: use cpu, cuda or cuda:N",
        )
        _require_one_of("purpose", self.purpose, get_args(Purpose))
        _require_one_of("preset", self.preset, (None, "", *PRESETS))
        require(self.samples > 0, f"samples must be positive, got {self.samples}")
        if self.layout == "gptq":
            require(
                self.weights in ("int4", "int8") and self.vision in (None, "fp16"),
                f"layout gptq has integer weights and the vision side in fp16; got weights {self.weights}, vision "
                f"{self.vision}",
            )
            require(
                self.dialect == "ort" and self.activations is None and self.preset is None,
                "a checkpoint of layout gptq has no graphs and no manifest: leave dialect, activations and preset out",
            )
        _ = self.types, self.quant  # refuse what does not go together

    @property
    def types(self) -> StorageTypes:
        """The types of everything that is written, defaults resolved."""
        if self.layout == "gptq":
            return replace(storage_types(self.weights, vision="fp16"), head="fp16")
        return storage_types(self.weights, self.dialect, self.activations, self.vision)

    @property
    def quant(self) -> QuantConfig | None:
        """Settings of the decoder's quantizer; None for floating point."""
        if self.weights in ("fp16", "fp32"):
            return None
        # ONNX Runtime takes negative scales, TensorRT and GPTQ checkpoints do not.
        signed = self.layout == "bundle" and self.dialect == "ort"
        return QuantConfig(
            bits=int(self.weights[3:]),
            group_size=self.group_size,
            method=self.method,
            signed_scales=signed,
            scale_dtype="fp16" if self.layout == "gptq" else self.types.activations,
        )


def _require_one_of(name: str, value: str | None, allowed: tuple[Any, ...]) -> None:
    require(value in allowed, f"{name} {value!r}: use one of {', '.join(filter(None, allowed))}")


setattr(ExportConfig, "__init__", checked(ExportConfig.__init__))  # noqa: B010
