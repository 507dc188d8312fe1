"""Exporting the decoder, layer by layer: in memory are one layer and the hidden rows of the prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.source import remaining
from owl2.export.config import ExportConfig
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.dialect import DIALECTS
from owl2.export.graph.weights import DenseWeight, IntegerWeight, Linear, LinearWeight, dequantized_blocks
from owl2.export.job.journal import Journal
from owl2.export.job.progress import Reporter
from owl2.quant.config import QuantConfig
from owl2.quant.grid import QuantizedWeight, rtn
from owl2.quant.kv import RoundedStream, watched
from owl2.quant.layer import LINEARS, ModuleReport, quantize_layer
from owl2.quant.models.mplug_owl2 import DecoderLayer, RmsNorm
from owl2.quant.stream import Calibration, HiddenStates, Stream
from owl2.runtime import spec
from owl2.runtime.engine import Floats
from owl2.runtime.errors import QuantizationError

# Rows of the head converted to float32 at a time: 64 MiB at a width of 4096.
HEAD_BLOCK = 4096
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Streams:
    """Prompts on their way through the layers.

    Attributes:
        calibration: for GPTQ; None where it is not used.
        stored: the measured prompts, through the stored weights.
        reference: the measured prompts, through the original weights.
        kv_int8: the probes, through the stored weights with keys and values as an int8 cache holds them.
    """

    calibration: Calibration | None
    stored: Stream
    reference: Stream
    kv_int8: RoundedStream

    def arrays(self) -> list[NDArray[Any]]:
        """All that changes from layer to layer; :meth:`restore` takes it."""
        return [sequence.rows.numpy() for sequence in self._sequences()] + self.kv_int8.arrays()

    def restore(self, arrays: list[NDArray[Any]]) -> None:
        """Bring streams before the first layer to where :meth:`arrays` was asked."""
        sequences = self._sequences()
        for sequence, rows in zip(sequences, arrays):
            sequence.rows = torch.from_numpy(rows)
        self.kv_int8.restore(arrays[len(sequences) :])

    def _sequences(self) -> list[HiddenStates]:
        calibration = [] if self.calibration is None else [self.calibration.quantized, self.calibration.original]
        streams = [*calibration, self.stored, self.reference]
        return [sequence for stream in streams for sequence in stream.sequences]


@dataclass(frozen=True)
class ExportedDecoder:
    """What the export of the decoder yields.

    Attributes:
        modules: what GPTQ cost, by name of the linear layer; empty for other methods.
        stored: rows [T, C] of each measured prompt behind the final norm, from torch on the stored weights.
        reference: the same on the original weights.
        kv_int8: the same of each probe on the stored weights, with keys and values as an int8 cache holds them.
        stored_head: the head's weight as the bundle has it.
        reference_head: the checkpoint's own tensor [V, C], as it lies in its file.
    """

    modules: dict[str, ModuleReport]
    stored: list[Tensor]
    reference: list[Tensor]
    kv_int8: list[Tensor]
    stored_head: LinearWeight
    reference_head: Tensor

    def stored_logits(self, index: int) -> Floats:
        """Logits [T, V] of one measured prompt on the stored weights."""
        return _logits(self.stored[index], dequantized_blocks(self.stored_head, HEAD_BLOCK))

    def kv_int8_logits(self, index: int) -> Floats:
        """Logits [T, V] of one probe on the stored weights, with an int8 K/V cache."""
        return _logits(self.kv_int8[index], dequantized_blocks(self.stored_head, HEAD_BLOCK))

    def reference_logits(self, index: int) -> Floats:
        """The same on the original weights."""
        return _logits(self.reference[index], (block.float() for block in torch.split(self.reference_head, HEAD_BLOCK)))


def _logits(rows: Tensor, head: Iterable[Tensor]) -> Floats:
    """rows [T, C], the head in blocks of its rows -> [T, V]."""
    return torch.cat([rows @ block.T for block in head], dim=1).numpy()


class LayerWriter(Protocol):
    """Where finished layers go."""

    def layer(self, linears: Mapping[str, Linear], gains: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """The next layer: linear layers by their name within it, text and image gain (float32 [C]) of both norms."""

    def finish(self, norm: Tensor, head: LinearWeight) -> None:
        """After the last one: the final norm's gain (float32 [C]) and the output head."""


def export_decoder(
    checkpoint: Checkpoint, folder: Path, config: ExportConfig, streams: Streams, journal: Journal, reporter: Reporter
) -> ExportedDecoder:
    """Write ``decoder.onnx``, from where ``journal`` has it.

    Raises:
        CalibrationError, QuantizationError: a weight cannot be quantized.
    """
    decoder = checkpoint.config.decoder
    layers = decoder.num_hidden_layers
    reporter.stage(stage_name(config, checkpoint), layers + 1, done=journal.layers)
    modules: dict[str, ModuleReport] = {}
    path, resume = folder / spec.DECODER_GRAPH, journal.layers > 0
    with GraphBuilder(path, config.activation_type, resume=resume) as graph:
        writer = DecoderGraph(DIALECTS[config.dialect](graph), decoder)
        if journal.layers:
            modules = journal.restore_layers(writer, streams.restore)
        journal.usage.begin_layers()
        for index in range(journal.layers, layers):
            export_layer(checkpoint, writer, config, index, streams, modules)
            journal.keep_layer(writer, streams.arrays(), modules)
            reporter.advance()
        made = finish_decoder(checkpoint, writer, config, streams, modules)
        reporter.advance()
    return made


def finish_decoder(
    checkpoint: Checkpoint,
    writer: LayerWriter,
    config: ExportConfig,
    streams: Streams,
    modules: dict[str, ModuleReport],
) -> ExportedDecoder:
    """Write what comes after the last layer."""
    norm, head, reference_head = _finish(checkpoint, writer, config)
    with torch.no_grad():
        stored = [norm(sequence.rows) for sequence in streams.stored.sequences]
        reference = [norm(sequence.rows) for sequence in streams.reference.sequences]
        kv_int8 = [norm(sequence.rows) for sequence in streams.kv_int8.stream.sequences]
    return ExportedDecoder(modules, stored, reference, kv_int8, head, reference_head)


def export_layer(
    checkpoint: Checkpoint,
    writer: LayerWriter,
    config: ExportConfig,
    index: int,
    streams: Streams,
    modules: dict[str, ModuleReport],
) -> None:
    """Quantize and write one layer, and move all streams behind it; nothing of it stays in memory."""
    name = f"layers.{index}"
    layer = load_layer(checkpoint, index, config.device)
    streams.reference.advance(layer)
    original = None if streams.calibration is None else copy.deepcopy(layer)
    kept = _kept_weights(checkpoint, f"model.{name}.")
    if config.activation_type == "fp16":
        kept = {linear: _with_half_scales(weight, f"{name}.{linear}") for linear, weight in kept.items()}
        for linear, weight in kept.items():
            _parameter(layer, f"{linear}.weight").copy_(weight.dequantize())
    weights = _store_layer(layer, original, kept, streams.calibration, config, name, modules)
    _store_floats(layer, config)
    _advance_stored(streams, layer, original)
    writer.layer(_linears(layer, weights, name), _gains(layer))


def _advance_stored(streams: Streams, layer: DecoderLayer, original: DecoderLayer | None) -> None:
    """Move what passes through the stored weights behind ``layer``, and the calibration prompts behind both."""
    with watched(layer) as seen:
        if streams.calibration is None or original is None:
            streams.stored.advance(layer)
        else:
            streams.calibration.advance(layer, original)
    if streams.calibration is not None:
        streams.stored.advance(layer)
    streams.kv_int8.advance(layer, seen.scales())


def load_layer(checkpoint: Checkpoint, index: int, device: str) -> DecoderLayer:
    """One layer on the checkpoint's weights, float32."""
    with torch.device("meta"):  # no time for random weights that are replaced at once
        layer = DecoderLayer(checkpoint.config.decoder).eval()
    layer.to_empty(device=device)
    checkpoint.load_into(layer, f"model.layers.{index}.")
    return layer


def stage_name(config: ExportConfig, checkpoint: Checkpoint) -> str:
    """What the reporter is told."""
    method = f", {config.method.upper()}" if config.quant is not None and remaining(checkpoint) else ""
    return f"decoder layers, {config.weights}{method}"


def _kept_weights(checkpoint: Checkpoint, prefix: str) -> dict[str, QuantizedWeight]:
    """Integers that the checkpoint itself holds, by name within the layer."""
    return {
        linear: checkpoint.quantized_weight(prefix + linear)
        for linear in LINEARS
        if prefix + linear in checkpoint.quantized
    }


def _with_half_scales(weight: QuantizedWeight, name: str) -> QuantizedWeight:
    """A kept weight with its scales as a graph with float16 activations stores them.

    Raises:
        QuantizationError: float16 cannot hold a scale.
    """
    scales = weight.scales.half().float()
    if not bool(((scales != 0) == (weight.scales != 0)).all()) or not bool(scales.isfinite().all()):
        raise QuantizationError(f"{name}: float16 cannot hold every scale of this weight; use --activations fp32")
    return replace(weight, scales=scales)


def _store_layer(
    layer: DecoderLayer,
    original: DecoderLayer | None,
    kept: dict[str, QuantizedWeight],
    calibration: Calibration | None,
    config: ExportConfig,
    name: str,
    modules: dict[str, ModuleReport],
) -> dict[str, LinearWeight]:
    """The stored form of each linear layer's weight; ``layer`` computes with these from now on."""
    if config.quant is None:
        dtype: Literal["fp32", "fp16"] = "fp32" if config.weights == "fp32" else "fp16"
        weights: dict[str, LinearWeight] = {}
        for linear in LINEARS:
            weight = _parameter(layer, f"{linear}.weight")
            weights[linear] = stored = DenseWeight(weight.clone().cpu(), dtype)
            weight.copy_(stored.dequantize())
        return weights
    done = quantize_layer(layer, original, calibration, config.quant, name, kept)
    modules.update({f"{name}.{linear}": entry.report for linear, entry in done.items() if entry.report is not None})
    quantized = kept | {
        linear: replace(entry.weight, codes=entry.weight.codes.cpu(), scales=entry.weight.scales.cpu())
        for linear, entry in done.items()
    }
    return {linear: IntegerWeight(weight) for linear, weight in quantized.items()}


@torch.no_grad()
def _store_floats(module: nn.Module, config: ExportConfig) -> None:
    """Let ``module`` compute with norms and biases as a graph with this type of activations stores them."""
    if config.activation_type == "fp16":
        for name, parameter in module.named_parameters():
            if name.removesuffix(".weight") not in LINEARS:
                parameter.copy_(parameter.half().float())


def _parameter(layer: DecoderLayer, name: str) -> Tensor:
    return layer.get_parameter(name).detach()


def _linears(layer: DecoderLayer, weights: Mapping[str, LinearWeight], name: str) -> dict[str, Linear]:
    """Graph linears by their name within the layer, biases included."""
    parameters = dict(layer.named_parameters())
    biases = {linear: parameters.get(f"{linear}.bias") for linear in weights}
    return {
        linear: Linear(f"{name}.{linear}", weight, None if (bias := biases[linear]) is None else bias.detach().cpu())
        for linear, weight in weights.items()
    }


def _gains(layer: DecoderLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """Text and image gain of both norms, on the CPU."""

    def gain(norm: str, branch: int) -> Tensor:
        return _parameter(layer, f"{norm}.multiway.{branch}.weight").cpu()

    return {norm: (gain(norm, 0), gain(norm, 1)) for norm in NORMS}


@torch.no_grad()
def _finish(checkpoint: Checkpoint, writer: LayerWriter, config: ExportConfig) -> tuple[RmsNorm, LinearWeight, Tensor]:
    """Write norm and head; returns the norm, and the head as stored and as it was."""
    decoder = checkpoint.config.decoder
    norm = RmsNorm(decoder.hidden_size, decoder.rms_norm_eps)
    checkpoint.load_into(norm, "model.norm.")
    _store_floats(norm, config)
    name = "model.embed_tokens.weight" if decoder.tie_word_embeddings else "lm_head.weight"
    head = _store_head(checkpoint.tensor(name), config)
    writer.finish(norm.weight.detach(), head)
    return norm, head, checkpoint.stored(name)


def _store_head(weight: Tensor, config: ExportConfig) -> LinearWeight:
    if config.head == "int8":
        # Eight bits leave rounding nothing to gain from a Hessian.
        scales = config.activation_type
        settings = QuantConfig(bits=8, group_size=config.group_size, method="rtn", scale_dtype=scales)
        return IntegerWeight(rtn(weight, settings))
    return DenseWeight(weight, "fp32" if config.head == "fp32" else "fp16")
