"""Build the TensorRT-RTX engines of a model of full size (mPLUG-Owl2 7B, random integers): time, memory and size.

The graphs are written directly from random numbers, since the size and building time of a TensorRT engine do not depend
on the values of weights. Takes about 14 GiB of memory and 10 GB of disk; nothing is run, so no GPU is needed.

    measure_engine.py /scratch --gpu rtx4090
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from random_checkpoint import CONFIG, PREPROCESSOR
from torch import Tensor, nn

from owl2.export.checkpoint.hf_config import model_config
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.onnx_dialect import OnnxDialect
from owl2.export.graph.vision import VisionGraph
from owl2.export.graph.weights import DenseWeight, IntegerWeight, Linear, LinearWeight
from owl2.export.job.progress import Terminal
from owl2.export.tensorrt.build import build_engine
from owl2.export.tensorrt.profiles import Limits, decoder_profiles, vision_profile
from owl2.export.tensorrt.target import choose_target, find_gpu
from owl2.quant.grid import QuantizedWeight
from owl2.quant.layer import LINEARS
from owl2.quant.models.mplug_owl2 import DecoderLayer, VisionModel, VisualAbstractor
from owl2.runtime import spec
from owl2.runtime.config import ModelConfig
from owl2.runtime.engine import PREFILL_BLOCK

GROUP = 128
GIB = 2**30


def random_int4(shape: torch.Size) -> IntegerWeight:
    """Codes of all values, scales of the magnitude of trained weights."""
    rows, columns = shape
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    scales = (torch.rand(rows, columns // GROUP) + 0.5) / (8 * columns**0.5)
    return IntegerWeight(QuantizedWeight(codes, scales.half().float(), 4, GROUP))


def write_decoder(folder: Path, config: ModelConfig) -> None:
    """Write the decoder layer by layer, as an export does."""
    decoder = config.decoder
    with torch.device("meta"):
        layer = DecoderLayer(decoder)
    gains = (torch.ones(decoder.hidden_size), torch.ones(decoder.hidden_size))
    with GraphBuilder(folder / spec.DECODER_GRAPH, "fp16") as graph:
        writer = DecoderGraph(OnnxDialect(graph), decoder)
        for index in range(decoder.num_hidden_layers):
            shapes = {name: layer.get_parameter(f"{name}.weight").shape for name in LINEARS}
            linears = {n: Linear(f"layers.{index}.{n}", random_int4(shape)) for n, shape in shapes.items()}
            writer.layer(linears, {"input_layernorm": gains, "post_attention_layernorm": gains})
        head = torch.randn(decoder.vocab_size, decoder.hidden_size) / decoder.hidden_size**0.5
        writer.finish(gains[0], DenseWeight(head, "fp16"))


def write_vision(folder: Path, config: ModelConfig) -> None:
    """Write the vision side with torch's own initial weights."""

    def make_weight(_: nn.Linear, weight: Tensor) -> LinearWeight:
        return DenseWeight(weight, "fp16")

    tower = VisionModel(config.vision)
    abstractor = VisualAbstractor(config.abstractor, config.decoder.hidden_size)
    with GraphBuilder(folder / spec.VISION_GRAPH, "fp16") as graph:
        VisionGraph(OnnxDialect(graph), config, make_weight).write(tower, abstractor)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gpu", default="rtx4090", help="GPU that the engines are for (default rtx4090)")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default 32)")
    parser.add_argument("--context", type=int, default=2048, help="positions of a conversation (default 2048)")
    parser.add_argument(
        "--prefill", type=int, default=PREFILL_BLOCK, help=f"positions of a step (default {PREFILL_BLOCK})"
    )
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    config = model_config(CONFIG | {"num_hidden_layers": given.layers}, PREPROCESSOR, {})
    limits = Limits(given.context, given.prefill, 1)
    device, here = find_gpu(given.gpu)
    target = choose_target("tensorrt-rtx", device, "onnx", "int4", here=here)
    steps = (
        (spec.VISION_GRAPH, write_vision, (vision_profile(config, limits),)),
        (spec.DECODER_GRAPH, write_decoder, decoder_profiles(config, limits)),
    )
    for name, write, profiles in steps:
        began = time.perf_counter()
        with torch.no_grad():
            write(given.scratch, config)
        written = time.perf_counter() - began
        engine = given.scratch / f"{name}.engine"
        with Terminal() as reporter:
            built = build_engine(
                target.module, given.scratch / name, engine, profiles, reporter, compute=target.compute
            )
        size = (given.scratch / f"{name}.data").stat().st_size
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"{name} for {device.product}: graph {size / GIB:.2f} GiB written in {written:.0f} s; parsed in "
            f"{built.parse_seconds:.1f} s, built in {built.build_seconds:.0f} s, engine {built.size / GIB:.2f} GiB; "
            f"memory of the process so far at most {peak / GIB:.1f} GiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
