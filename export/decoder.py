"""Exporting the decoder, layer by layer: in memory are one layer and the hidden rows of the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from owl2.export.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.dialect import Linear
from owl2.export.graph.ort import OrtDialect
from owl2.export.model import DecoderLayer, RmsNorm
from owl2.export.progress import Reporter
from owl2.export.weights import DenseWeight, LinearWeight
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import GptqReport
from owl2.quant.grid import rtn
from owl2.quant.kv import RoundedStream, watched
from owl2.quant.layer import LINEARS, quantize_layer
from owl2.quant.stream import Stream
from owl2.runtime import spec
from owl2.runtime.engine import Floats

NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Streams:
    """Prompts on their way through the layers.

    Attributes:
        calibration: through the stored weights, for GPTQ; None where it is not used.
        stored: the measured prompts, through the stored weights.
        reference: the measured prompts, through the original weights.
        kv_int8: the probes, through the stored weights with keys and values as an int8 cache holds them.
    """

    calibration: Stream | None
    stored: Stream
    reference: Stream
    kv_int8: RoundedStream


@dataclass(frozen=True)
class ExportedDecoder:
    """What the export of the decoder yields.

    Attributes:
        modules: what GPTQ cost, by name of the linear layer; empty for other methods.
        stored: rows [T, C] of each measured prompt behind the final norm, from torch on the stored weights.
        reference: the same on the original weights.
        kv_int8: the same of each probe on the stored weights, with keys and values as an int8 cache holds them.
        stored_head, reference_head: float32 [V, C].
    """

    modules: dict[str, GptqReport]
    stored: list[Tensor]
    reference: list[Tensor]
    kv_int8: list[Tensor]
    stored_head: Tensor
    reference_head: Tensor

    def stored_logits(self, index: int) -> Floats:
        """Logits [T, V] of one measured prompt on the stored weights."""
        return (self.stored[index] @ self.stored_head.T).numpy()

    def reference_logits(self, index: int) -> Floats:
        """The same on the original weights."""
        return (self.reference[index] @ self.reference_head.T).numpy()

    def kv_int8_logits(self, index: int) -> Floats:
        """Logits [T, V] of one probe on the stored weights, with an int8 K/V cache."""
        return (self.kv_int8[index] @ self.stored_head.T).numpy()


def export_decoder(
    checkpoint: Checkpoint, folder: Path, config: ExportConfig, streams: Streams, reporter: Reporter
) -> ExportedDecoder:
    """Write ``decoder.onnx``.

    Raises:
        CalibrationError, QuantizationError: a weight cannot be quantized.
    """
    decoder = checkpoint.config.decoder
    modules: dict[str, GptqReport] = {}
    reporter.stage(_stage_name(config), decoder.num_hidden_layers + 1)
    with GraphBuilder(folder / spec.DECODER_GRAPH) as graph:
        writer = DecoderGraph(graph, OrtDialect(), decoder)
        for index in range(decoder.num_hidden_layers):
            name = f"layers.{index}"
            layer = _load_layer(checkpoint, f"model.{name}.")
            streams.reference.advance(layer)
            weights = _store_layer(layer, streams.calibration, config, name, modules)
            _advance_stored(streams, layer)
            writer.layer(_linears(layer, weights, name), _gains(layer))
            reporter.advance()
        norm, head, reference_head = _finish(checkpoint, writer, config)
        reporter.advance()
    with torch.no_grad():
        stored = [norm(sequence.rows) for sequence in streams.stored.sequences]
        reference = [norm(sequence.rows) for sequence in streams.reference.sequences]
        kv_int8 = [norm(sequence.rows) for sequence in streams.kv_int8.stream.sequences]
    return ExportedDecoder(modules, stored, reference, kv_int8, head, reference_head)


def _advance_stored(streams: Streams, layer: DecoderLayer) -> None:
    """Move what passes through the stored weights behind ``layer``."""
    with watched(layer) as seen:
        (streams.calibration or streams.stored).advance(layer)
    if streams.calibration is not None:
        streams.stored.advance(layer)
    streams.kv_int8.advance(layer, seen.scales())


def _load_layer(checkpoint: Checkpoint, prefix: str) -> DecoderLayer:
    with torch.device("meta"):  # no time for random weights that are replaced at once
        layer = DecoderLayer(checkpoint.config.decoder).eval()
    layer.to_empty(device="cpu")
    checkpoint.load_into(layer, prefix)
    return layer


def _stage_name(config: ExportConfig) -> str:
    method = f", {config.method.upper()}" if config.quant is not None else ""
    return f"decoder layers, {config.weights}{method}"


def _store_layer(
    layer: DecoderLayer, calibration: Stream | None, config: ExportConfig, name: str, modules: dict[str, GptqReport]
) -> dict[str, LinearWeight]:
    """The stored form of each linear layer's weight; ``layer`` computes with these from now on."""
    if config.quant is None:
        dtype: Literal["fp32", "fp16"] = "fp32" if config.weights == "fp32" else "fp16"
        weights: dict[str, LinearWeight] = {}
        for linear in LINEARS:
            weight = _parameter(layer, f"{linear}.weight")
            weights[linear] = stored = DenseWeight(weight.clone(), dtype)
            weight.copy_(stored.dequantize())
        return weights
    done = quantize_layer(layer, calibration, config.quant, name)
    modules.update({f"{name}.{linear}": entry.report for linear, entry in done.items() if entry.report is not None})
    return {linear: entry.weight for linear, entry in done.items()}


def _parameter(layer: DecoderLayer, name: str) -> Tensor:
    return layer.get_parameter(name).detach()


def _linears(layer: DecoderLayer, weights: Mapping[str, LinearWeight], name: str) -> dict[str, Linear]:
    """Graph linears by their name within the layer, biases included."""
    parameters = dict(layer.named_parameters())
    biases = {linear: parameters.get(f"{linear}.bias") for linear in weights}
    return {
        linear: Linear(f"{name}.{linear}", weight, None if (bias := biases[linear]) is None else bias.detach())
        for linear, weight in weights.items()
    }


def _gains(layer: DecoderLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """Text and image gain of both norms."""
    return {
        norm: (_parameter(layer, f"{norm}.multiway.0.weight"), _parameter(layer, f"{norm}.multiway.1.weight"))
        for norm in NORMS
    }


@torch.no_grad()
def _finish(checkpoint: Checkpoint, writer: DecoderGraph, config: ExportConfig) -> tuple[RmsNorm, Tensor, Tensor]:
    """Write norm and head; returns the norm, and the head as stored and as it was."""
    decoder = checkpoint.config.decoder
    norm = RmsNorm(decoder.hidden_size, decoder.rms_norm_eps)
    checkpoint.load_into(norm, "model.norm.")
    original = checkpoint.tensor("model.embed_tokens.weight" if decoder.tie_word_embeddings else "lm_head.weight")
    head = _store_head(original, config)
    writer.finish(norm.weight.detach(), head)
    return norm, head.dequantize(), original


def _store_head(weight: Tensor, config: ExportConfig) -> LinearWeight:
    if config.head == "int8":
        # Eight bits leave rounding nothing to gain from a Hessian.
        return rtn(weight, QuantConfig(bits=8, group_size=config.group_size, method="rtn"))
    return DenseWeight(weight, "fp32" if config.head == "fp32" else "fp16")
