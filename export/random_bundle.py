"""A bundle of any shape with random weights: as fast and as large as a real one, and it says nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from owl2.export.decoder import NORMS
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.dialect import DIALECTS
from owl2.export.graph.vision import VisionGraph
from owl2.export.graph.weights import ChannelInt8Weight, IntegerWeight, Linear, LinearWeight
from owl2.export.job.disk import write_json
from owl2.export.job.written_bundle import WrittenBundle
from owl2.export.random_tokenizer import write_random_tokenizer
from owl2.quant.grid import QuantizedWeight
from owl2.quant.layer import LINEARS
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor
from owl2.runtime import spec
from owl2.runtime.bundle import WeightFormat
from owl2.runtime.config import AbstractorConfig, DecoderConfig, ModelConfig, PreprocessConfig, VisionConfig

GROUP_SIZE = 128
WEIGHTS = WeightFormat("int4", "int8", "int8", "fp16", "rtn", GROUP_SIZE)
CODE_DEVIATION = {4: 4.6, 8: 73.9}
"""Standard deviation of uniform codes by their bits."""


SHAPES = {
    "7b": ModelConfig(VisionConfig(), AbstractorConfig(), DecoderConfig(), PreprocessConfig()),
    # For tests: runs in milliseconds.
    "small": ModelConfig(
        VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56),
        AbstractorConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_learnable_queries=8,
            grid_size=4,
        ),
        DecoderConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
        ),
        PreprocessConfig(size=56, crop_size=56),
    ),
}
"""Models whose shapes can be measured without their weights."""


def write_shape(shape: str, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    """Write a bundle of one of :data:`SHAPES`, as :func:`write_random_bundle`."""
    write_random_bundle(folder, SHAPES[shape], on_progress=on_progress)


@torch.no_grad()
def write_random_bundle(
    folder: Path,
    model: ModelConfig,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write an int4 bundle of random weights, layer by layer.

    Args:
        folder: new, or empty.
        model: shapes.
        seed: of the weights.
        on_progress: told how many parts are done, of how many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random, total = np.random.default_rng(seed), model.decoder.num_hidden_layers + 2
    write_random_tokenizer(folder, model.decoder.vocab_size)
    _write_vision(folder, model, seed)
    on_progress(1, total)
    _write_table(folder, model.decoder, random)
    with GraphBuilder(folder / spec.DECODER_GRAPH) as graph:
        writer = DecoderGraph(DIALECTS["ort"](graph), model.decoder)
        ones = torch.ones(model.decoder.hidden_size)
        gains = dict.fromkeys(NORMS, (ones, ones))
        for index in range(model.decoder.num_hidden_layers):
            writer.layer(_layer(index, model.decoder, random), gains)
            on_progress(index + 2, total)
        writer.finish(ones, IntegerWeight(_integers(model.decoder.vocab_size, model.decoder.hidden_size, 8, random)))
    (folder / spec.GOLDENS).write_bytes(b"")
    write_json(folder / spec.REPORT, {"random": seed})
    kv_cache: dict[spec.KvType, str] = {"fp32": DIALECTS["ort"].MINIMUM_ONNXRUNTIME}
    bundle = WrittenBundle(folder, model, "ort", "fp32", WEIGHTS, kv_cache)
    write_json(folder / spec.MANIFEST, bundle.manifest().sealed())
    on_progress(total, total)


def _write_vision(folder: Path, model: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)

    def make_weight(_: nn.Module, weight: Tensor) -> LinearWeight:
        return ChannelInt8Weight.quantize(weight)

    with GraphBuilder(folder / spec.VISION_GRAPH) as graph:
        tower, abstractor = VisionModel(model.vision), VisualAbstractor(model.abstractor, model.decoder.hidden_size)
        VisionGraph(DIALECTS["ort"](graph), model, make_weight).write(tower, abstractor)


def _write_table(folder: Path, decoder: DecoderConfig, random: np.random.Generator) -> None:
    with (folder / spec.EMBEDDINGS).open("wb") as file:
        for start in range(0, decoder.vocab_size, 4096):
            rows = min(4096, decoder.vocab_size - start)
            file.write(random.standard_normal((rows, decoder.hidden_size), np.float32).astype(np.float16).tobytes())


def _layer(index: int, decoder: DecoderConfig, random: np.random.Generator) -> dict[str, Linear]:
    width, inner = decoder.hidden_size, decoder.intermediate_size
    shapes = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {
        name: Linear(f"layers.{index}.{name}", IntegerWeight(_integers(*shapes.get(name, (width, width)), 4, random)))
        for name in LINEARS
    }


def _integers(rows: int, columns: int, bits: int, random: np.random.Generator) -> QuantizedWeight:
    """Uniform codes, with scales of either sign that keep the variance of a row of activations."""
    limit = 2 ** (bits - 1)
    codes = random.integers(-limit, limit, (rows, columns), np.int8)
    scales = random.choice(np.array([-1, 1], np.float32), (rows, -(-columns // GROUP_SIZE)))
    scales *= np.float32(1 / (CODE_DEVIATION[bits] * columns**0.5))
    return QuantizedWeight(torch.from_numpy(codes), torch.from_numpy(scales), bits, GROUP_SIZE)
