"""Exporting the vision tower and the abstractor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checks.parity import Parity, compare, with_float_activations
from owl2.export.checks.sensitivity import Part, choose_kept, measure_parts
from owl2.export.config import ExportConfig, VisionType
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.dialects import DIALECTS
from owl2.export.graph.vision import VisionGraph
from owl2.export.graph.weights import ChannelInt8Weight, DenseWeight, LinearWeight
from owl2.export.job.progress import Reporter
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor
from owl2.runtime import spec
from owl2.runtime.backends.ort.session import DEFAULT_OPTIONS, OrtOptions, open_session
from owl2.runtime.engine import Floats
from owl2.runtime.images import PreparedImage
from owl2.runtime.spec import FloatType

# At full size the parts take one to two minutes per image.
SENSITIVITY_IMAGES = 1


@dataclass(frozen=True, slots=True)
class PartReport:
    """What int8 costs a part of the vision side.

    Attributes:
        part: name of a layer of the tower or of a linear layer of the abstractor, as in the checkpoint.
        effect: RMS change of the image rows when only this part is int8, over the rows' RMS.
        kept: whether it is stored in fp16 for that reason.
    """

    part: str
    effect: float
    kept: bool


@dataclass(frozen=True)
class ExportedVision:
    """What the export of the vision side yields.

    Attributes:
        reference: decoder rows of the measured images by digest, from torch on the checkpoint's weights.
        rows: decoder rows of all images by digest, from the exported graph.
        parity: the graph against torch on the stored weights.
        sensitivity: what int8 would cost each part; empty for floating point.
    """

    reference: dict[str, Floats]
    rows: dict[str, Floats]
    parity: Parity
    sensitivity: tuple[PartReport, ...]

    def of(self, digests: Iterable[str]) -> ExportedVision:
        """The graph's rows of some images alone."""
        return ExportedVision({}, {digest: self.rows[digest] for digest in digests}, self.parity, self.sensitivity)


def store(weight: Tensor, kind: VisionType) -> LinearWeight:
    """The stored form of a float32 [N, K] weight."""
    return ChannelInt8Weight.quantize(weight) if kind == "int8" else DenseWeight(weight, kind)


def export_vision(
    checkpoint: Checkpoint,
    folder: Path,
    config: ExportConfig,
    images: Mapping[str, PreparedImage],
    measured: set[str],
    reporter: Reporter,
) -> ExportedVision:
    """Write ``vision.onnx``, compare it with torch and run all images through it.

    Args:
        checkpoint: source of the weights.
        folder: where the graph goes.
        config: says how linear weights are stored, and in which operators the graph is written.
        images: by digest.
        measured: digests of the images that torch runs too.
        reporter: is told of each image.

    Raises:
        ParityError: the graph does not compute what torch computes.
    """
    path = folder / spec.VISION_GRAPH
    chosen = [images[digest] for digest in sorted(measured)]
    reference, stored, sensitivity = _write(checkpoint, path, config, chosen, len(images), reporter)
    parity = _check(path, images, stored, reference, config.activation_type)
    session = open_session(path, DEFAULT_OPTIONS)
    rows = {}
    for digest, image in images.items():
        rows[digest] = run_vision(session, image)
        reporter.advance()
    return ExportedVision(reference, rows, parity, sensitivity)


@torch.no_grad()
def _write(
    checkpoint: Checkpoint,
    path: Path,
    config: ExportConfig,
    measured: list[PreparedImage],
    images: int,
    reporter: Reporter,
) -> tuple[dict[str, Floats], dict[str, Floats], tuple[PartReport, ...]]:
    """Write the graph; torch's own weights are gone from memory when this returns.

    Returns:
        What torch makes of the measured images with the checkpoint's weights and with the stored ones, by digest,
        and what int8 costs each part.
    """
    kind = config.vision_type
    tower, abstractor = _load(checkpoint)
    parts = _measure_parts(tower, abstractor, measured, reporter) if kind == "int8" else []
    kept = choose_kept(parts)
    floating = {module for part in kept for module in part.modules}

    def make_weight(module: nn.Linear, weight: Tensor) -> LinearWeight:
        return store(weight, "fp16" if module in floating else kind)

    reporter.stage("vision tower and abstractor", 2 * len(measured) + images)
    reference = _torch_rows(tower, abstractor, measured, reporter)
    for module in (*tower.modules(), *abstractor.modules()):
        if isinstance(module, nn.Linear):
            # From here on torch has the weights that the graph stores.
            module.weight.copy_(make_weight(module, module.weight).dequantize())
    if config.activation_type == "fp16":
        for part in (tower, abstractor):
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.copy_(tensor.half().to(tensor.dtype))
    stored = _torch_rows(tower, abstractor, measured, reporter)
    with GraphBuilder(path, config.activation_type) as graph:
        VisionGraph(graph, DIALECTS[config.dialect], checkpoint.config, make_weight).write(tower, abstractor)
    return reference, stored, tuple(PartReport(part.name, part.effect, part in kept) for part in parts)


def _measure_parts(
    tower: VisionModel, abstractor: VisualAbstractor, measured: list[PreparedImage], reporter: Reporter
) -> list[Part]:
    linears = sum(isinstance(module, nn.Linear) for module in abstractor.modules())
    reporter.stage("vision, cost of int8", len(tower.encoder.layers) + linears)
    pixels = torch.from_numpy(np.stack([image.pixels for image in measured[:SENSITIVITY_IMAGES]]))
    parts = []
    for part in measure_parts(tower, abstractor, pixels):
        parts.append(part)
        reporter.advance()
    return parts


@torch.no_grad()
def reference_rows(
    checkpoint: Checkpoint, images: Mapping[str, PreparedImage], reporter: Reporter
) -> dict[str, Floats]:
    """Decoder rows of all images by digest, from torch on the checkpoint's weights."""
    reporter.stage("vision tower and abstractor", len(images))
    return _torch_rows(*_load(checkpoint), list(images.values()), reporter)


def _load(checkpoint: Checkpoint) -> tuple[VisionModel, VisualAbstractor]:
    config = checkpoint.config
    tower = VisionModel(config.vision).eval()
    abstractor = VisualAbstractor(config.abstractor, config.decoder.hidden_size).eval()
    checkpoint.load_into(tower, "model.vision_model.")
    checkpoint.load_into(abstractor, "model.visual_abstractor.")
    return tower, abstractor


def _torch_rows(
    tower: VisionModel, abstractor: VisualAbstractor, images: list[PreparedImage], reporter: Reporter
) -> dict[str, Floats]:
    made = {}
    for image in images:
        made[image.digest] = abstractor(tower(torch.from_numpy(image.pixels)[None]))[0].numpy()
        reporter.advance()
    return made


def run_vision(session: ort.InferenceSession, image: PreparedImage) -> Floats:
    """Decoder rows [queries + 1, C] of one image."""
    rows: Floats = session.run([spec.IMAGE_ROWS], {spec.PIXELS: image.pixels[None]})[0][0]
    return rows


def _check(
    path: Path,
    images: Mapping[str, PreparedImage],
    stored: Mapping[str, Floats],
    reference: Mapping[str, Floats],
    activations: FloatType,
) -> Parity:
    digests = list(stored)

    def rows(graph: Path, *, frugal: bool) -> Floats:
        session = open_session(graph, OrtOptions(frugal=frugal))
        return np.stack([run_vision(session, images[digest]) for digest in digests])

    with with_float_activations(path) as variant:
        exact = rows(variant, frugal=True)
    return compare(
        "vision.onnx",
        exact=exact,
        actual=rows(path, frugal=False),
        stored=np.stack([stored[d] for d in digests]),
        reference=np.stack([reference[d] for d in digests]),
        activations=activations,
    )
