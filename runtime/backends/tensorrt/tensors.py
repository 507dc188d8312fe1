"""Inputs and outputs that engines must have, and the values of those that need more care than a graph's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from owl2.runtime import spec
from owl2.runtime.backends.steps import StepInputs, cache_names
from owl2.runtime.config import ModelConfig
from owl2.runtime.errors import BackendError
from owl2.runtime.spec import FloatType

Shape = tuple[int, ...]
Tensors = Mapping[str, tuple[Shape, Any]]
"""Shape, -1 where it varies, and TensorRT's type of each input and output."""


def decoder_tensors(trt: ModuleType, model: ModelConfig, activations: FloatType) -> Tensors:
    """Inputs and outputs of the decoder."""
    decoder, width = model.decoder, spec.kv_row_width(model.decoder)
    floats = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF}[activations]
    indices = (spec.MODALITY, spec.TEXT_ROWS, spec.IMAGE_ROW_INDEX, spec.ROW_ORDER, spec.LOGIT_ROWS)
    half = decoder.head_dim // 2
    return {
        spec.EMBEDS: ((1, -1, decoder.hidden_size), floats),
        **dict.fromkeys(indices, ((-1,), trt.DataType.INT64)),
        spec.ATTENTION_MASK: ((-1, -1), floats),
        spec.ROTARY_COS: ((-1, half), floats),
        spec.ROTARY_SIN: ((-1, half), floats),
        **{name: ((-1, width), floats) for names in cache_names(decoder) for name in names},
        spec.LOGITS: ((-1, decoder.vocab_size), trt.DataType.FLOAT),
    }


def vision_tensors(trt: ModuleType, model: ModelConfig) -> Tensors:
    """The input and the output of the vision tower."""
    size = model.vision.image_size
    return {
        spec.PIXELS: ((-1, 3, size, size), trt.DataType.FLOAT),
        spec.IMAGE_ROWS: ((-1, model.rows_per_image, model.decoder.hidden_size), trt.DataType.FLOAT),
    }


def check_engine(trt: ModuleType, engine: Any, path: Path, expected: Tensors, profiles: int) -> None:  # noqa: ANN401
    """Compare the inputs, outputs and number of profiles of an engine with those that are needed.

    Raises:
        BackendError: they differ.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: (tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)) for name in names}
    for name in dict.fromkeys((*expected, *found)):
        if not _fits(found.get(name), expected.get(name)):
            raise BackendError(
                f"{path} does not fit the manifest: {name} is {found.get(name)}, {expected.get(name)} is needed; "
                "build the engines again"
            )
    on_host = [name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE]
    if on_host:
        raise BackendError(f"{path} wants {on_host[0]} in host memory; build the engines again")
    if engine.num_optimization_profiles != profiles:
        raise BackendError(
            f"{path} has {engine.num_optimization_profiles} optimization profiles, {profiles} are needed; build the "
            "engines again"
        )


def _fits(found: tuple[Shape, Any] | None, expected: tuple[Shape, Any] | None) -> bool:
    """A size that varies in the engine may be fixed in the model, but not the other way round."""
    if found is None or expected is None or len(found[0]) != len(expected[0]) or found[1] != expected[1]:
        return False
    return all(have in (need, -1) for have, need in zip(found[0], expected[0]))


def with_stand_ins(inputs: StepInputs) -> StepInputs:
    """The inputs of a step for an engine, which takes no empty list of text rows or logit rows: row 0 stands in.

    The stand-in for text rows comes before the image rows, where the order leaves it out.
    """
    nothing = np.zeros(1, dtype=np.int64)
    inputs = dict(inputs)
    if not len(inputs[spec.TEXT_ROWS]):
        inputs[spec.TEXT_ROWS] = nothing
        inputs[spec.ROW_ORDER] = inputs[spec.ROW_ORDER] + 1
    if not len(inputs[spec.LOGIT_ROWS]):
        inputs[spec.LOGIT_ROWS] = nothing
    return inputs
