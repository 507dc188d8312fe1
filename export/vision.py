"""Exporting the vision tower and the abstractor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from owl2.export.checkpoint.modules import load_vision
from owl2.export.checks.engines import encode_images, encode_images_in_float
from owl2.export.checks.parity import compare
from owl2.export.checks.sensitivity import choose_kept, measure_parts
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.dialect import DIALECTS
from owl2.export.graph.vision import VisionGraph
from owl2.export.graph.weights import ChannelInt8Weight, DenseWeight, LinearWeight, check_float16
from owl2.export.job.job import ExportJob
from owl2.export.job.progress import Reporter
from owl2.export.prompts import digests
from owl2.export.report import Parity, PartReport
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor
from owl2.runtime import spec
from owl2.runtime.engine import Floats
from owl2.runtime.images import PreparedImage

# At full size the parts take one to two minutes per image.
SENSITIVITY_IMAGES = 1


@dataclass(frozen=True)
class ExportedVision:
    """Results of exporting the vision side.

    Attributes:
        original: decoder rows of the measured images by digest, from torch on the checkpoint's weights.
        rows: decoder rows of all images by digest, from the exported graph.
        parity: the graph against torch on the stored weights.
        sensitivity: cost of int8 in each part; empty for floating point.
    """

    original: dict[str, Floats]
    rows: dict[str, Floats]
    parity: Parity
    sensitivity: tuple[PartReport, ...]


def export_vision(job: ExportJob) -> ExportedVision:
    """Write ``vision.onnx``, compare it with torch and run all images through it.

    Raises:
        ParityError: the graph does not compute what torch computes.
    """
    path, images = job.folder / spec.VISION_GRAPH, job.prompts.images
    measured = {digest: images[digest] for digest in sorted(digests(job.prompts.measured))}
    quantized, original, sensitivity = _write(job, list(measured.values()))
    parity = compare(
        spec.VISION_GRAPH,
        exact=_stacked(encode_images_in_float(path, measured, job.model)),
        actual=_stacked(encode_images(path, measured, job.model)),
        quantized=_stacked(quantized),
        original=_stacked(original),
        activations=job.config.types.activations,
    )
    rows = encode_images(path, images, job.model, job.reporter)
    return ExportedVision(original, rows, parity, sensitivity)


def _stacked(rows: Mapping[str, Floats]) -> Floats:
    return np.stack(list(rows.values()))


@torch.no_grad()
def _write(
    job: ExportJob, measured: list[PreparedImage]
) -> tuple[dict[str, Floats], dict[str, Floats], tuple[PartReport, ...]]:
    """Write the graph; torch's own weights are gone from memory when this returns.

    Returns:
        Torch's rows by digest on the stored weights, the same on the checkpoint's, and the cost of int8 in each part.
    """
    types, reporter = job.config.types, job.reporter
    tower, abstractor = load_vision(job.checkpoint)
    parts = []
    if types.vision == "int8":
        linears = sum(isinstance(module, nn.Linear) for module in abstractor.modules())
        reporter.stage("vision, cost of int8", len(tower.encoder.layers) + linears)
        # Not held-out ones: the accuracy is measured on those.
        seen = list(job.prompts.images_of(job.prompts.calibration or job.prompts.probes).values())
        pixels = torch.from_numpy(np.stack([image.pixels for image in seen[:SENSITIVITY_IMAGES]]))
        for part in measure_parts(tower, abstractor, pixels):
            parts.append(part)
            reporter.advance()
    kept = choose_kept(parts)
    floating = {module for part in kept for module in part.modules}

    networks = {"vision_model": tower, "visual_abstractor": abstractor}
    names = {module: f"{prefix}.{name}" for prefix, whole in networks.items() for name, module in whole.named_modules()}

    def make_weight(module: nn.Module, weight: Tensor) -> LinearWeight:
        stored = "fp16" if module in floating else types.vision
        return ChannelInt8Weight.quantize(weight) if stored == "int8" else DenseWeight.of(names[module], weight, stored)

    reporter.stage("vision tower and abstractor", 2 * len(measured) + len(job.prompts.images))
    original = _torch_rows(tower, abstractor, measured, reporter)
    for module in (*tower.modules(), *abstractor.modules()):
        if isinstance(module, nn.Linear):
            # From here on torch has the weights that the graph stores.
            module.weight.copy_(make_weight(module, module.weight).dequantize())
    if types.activations == "fp16":
        for prefix, network in networks.items():
            for name, tensor in (*network.named_parameters(), *network.named_buffers()):
                check_float16(f"{prefix}.{name}", tensor)
                tensor.copy_(tensor.half().to(tensor.dtype))
    quantized = _torch_rows(tower, abstractor, measured, reporter)
    with GraphBuilder(job.folder / spec.VISION_GRAPH, types.activations) as graph:
        VisionGraph(DIALECTS[job.config.dialect](graph), job.model, make_weight).write(tower, abstractor)
    return quantized, original, tuple(PartReport(part.name, part.effect, part in kept) for part in parts)


@torch.no_grad()
def original_rows(job: ExportJob) -> dict[str, Floats]:
    """Decoder rows of all images by digest, from torch on the checkpoint's weights."""
    images = list(job.prompts.images.values())
    job.reporter.stage("vision tower and abstractor", len(images))
    return _torch_rows(*load_vision(job.checkpoint), images, job.reporter)


def _torch_rows(
    tower: VisionModel, abstractor: VisualAbstractor, images: list[PreparedImage], reporter: Reporter
) -> dict[str, Floats]:
    rows = {}
    for image in images:
        rows[image.digest] = abstractor(tower(torch.from_numpy(image.pixels)[None]))[0].numpy()
        reporter.advance()
    return rows
