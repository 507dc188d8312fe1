"""Exporting the decoder, layer by layer: in memory are one layer and the hidden rows of the prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from owl2.export.checkpoint.modules import head_name, load_layer, load_norm
from owl2.export.checkpoint.source import remaining
from owl2.export.config import ExportConfig
from owl2.export.graph.weights import (
    DenseWeight,
    IntegerWeight,
    Linear,
    LinearWeight,
    check_float16,
    dequantized_blocks,
)
from owl2.export.job.device import device_memory_errors
from owl2.export.job.job import ExportJob
from owl2.export.streams import Streams
from owl2.quant.config import QuantConfig
from owl2.quant.grid import QuantizedWeight, rtn
from owl2.quant.kv import KvScales
from owl2.quant.layer import LINEARS, ModuleReport, quantize_layer
from owl2.quant.models.mplug_owl2 import DecoderLayer
from owl2.quant.models.mplug_owl2.decoder import KeyValue
from owl2.runtime.engine import Floats
from owl2.runtime.errors import QuantizationError

# Rows of the head converted to float32 at a time: 64 MiB at a width of 4096.
HEAD_BLOCK = 4096
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class ExportedDecoder:
    """Torch's results on the way through the decoder.

    Attributes:
        modules: cost of GPTQ by linear layer; empty for other methods.
        quantized: rows [T, C] of each measured prompt after the final norm, from torch on the stored weights.
        original: the same on the checkpoint's weights.
        kv_int8: the same of each probe on the stored weights, with keys and values as an int8 cache holds them.
        kv_codes: what the first layer's int8 cache holds of each probe.
        kv_scales: of the int8 cache, by layer.
        quantized_head: the head's weight as it is stored.
        original_head: the checkpoint's own tensor [V, C], as it is in its file.
    """

    modules: dict[str, ModuleReport]
    quantized: list[Tensor]
    original: list[Tensor]
    kv_int8: list[Tensor]
    kv_codes: list[KeyValue]
    kv_scales: list[KvScales]
    quantized_head: LinearWeight
    original_head: Tensor

    def quantized_logits(self, index: int) -> Floats:
        """Logits [T, V] of one prompt on the stored weights."""
        return _logits(self.quantized[index], dequantized_blocks(self.quantized_head, HEAD_BLOCK))

    def kv_int8_logits(self, index: int) -> Floats:
        return _logits(self.kv_int8[index], dequantized_blocks(self.quantized_head, HEAD_BLOCK))

    def original_logits(self, index: int) -> Floats:
        return _logits(self.original[index], (block.float() for block in torch.split(self.original_head, HEAD_BLOCK)))


def _logits(rows: Tensor, head: Iterable[Tensor]) -> Floats:
    """rows [T, C], the head in blocks of its rows -> [T, V]."""
    return torch.cat([rows @ block.T for block in head], dim=1).numpy()


class LayerWriter(Protocol):
    """Takes finished layers."""

    def layer(self, linears: Mapping[str, Linear], gains: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """The next layer: linear layers by their name within it, text and image gain (float32 [C]) of both norms."""

    def finish(self, norm: Tensor, head: LinearWeight) -> None:
        """After the last one: the final norm's gain (float32 [C]) and the output head."""


@torch.no_grad()
def export_layers(
    job: ExportJob,
    writer: LayerWriter,
    streams: Streams,
    modules: dict[str, ModuleReport],
    *,
    first: int = 0,
    keep: Callable[[], None] | None = None,
) -> ExportedDecoder:
    """Quantize and write the layers from ``first`` on, then the norm and the head.

    Args:
        streams: at layer ``first``; they end after the last layer.
        modules: reports of the earlier layers; those of the others are added.
        keep: is called after each layer.
    """
    config, usage, reporter = job.config, job.usage, job.reporter
    method = f", {config.method.upper()}" if config.quant is not None and remaining(job.checkpoint) else ""
    reporter.stage(f"decoder layers, {config.weights}{method}", job.layers + 1, done=first)
    usage.begin_layers()
    for index in range(first, job.layers):
        with device_memory_errors(config.device):
            modules |= export_layer(job, writer, streams, index)
        usage.end_layer()
        if keep is not None:
            keep()
        reporter.advance()
    checkpoint, norm = job.checkpoint, load_norm(job.checkpoint)
    _round_floats(norm, config, "norm.")
    head = _store_head(checkpoint.tensor(head_name(checkpoint)), config)
    writer.finish(norm.weight.detach(), head)
    reporter.advance()
    return ExportedDecoder(
        modules=modules,
        quantized=[norm(sequence.rows) for sequence in streams.quantized.sequences],
        original=[norm(sequence.rows) for sequence in streams.original.sequences],
        kv_int8=[norm(sequence.rows) for sequence in streams.kv_int8.stream.sequences],
        kv_codes=streams.kv_int8.codes,
        kv_scales=streams.kv_int8.scales,
        quantized_head=head,
        original_head=checkpoint.stored(head_name(checkpoint)),
    )


def export_layer(job: ExportJob, writer: LayerWriter, streams: Streams, index: int) -> dict[str, ModuleReport]:
    """Quantize and write one layer, and move all streams past it; returns the cost of GPTQ by linear layer."""
    config, name = job.config, f"layers.{index}"
    layer, kept = load_layer(job.checkpoint, index, config.device)
    streams.original.advance(layer)
    original = None if streams.calibration is None else copy.deepcopy(layer)
    if config.types.activations == "fp16":
        for linear, weight in kept.items():
            kept[linear] = _with_half_scales(weight, f"{name}.{linear}")
            _parameter(layer, f"{linear}.weight").copy_(kept[linear].dequantize())
    reports = {}
    if config.quant is None:
        weights: dict[str, LinearWeight] = _store_dense(layer, name, "fp32" if config.weights == "fp32" else "fp16")
    else:
        quantized = quantize_layer(layer, original, streams.calibration, config.quant, name, kept)
        for linear, entry in quantized.items():
            codes, scales = entry.weight.codes.cpu(), entry.weight.scales.cpu()
            kept[linear] = replace(entry.weight, codes=codes, scales=scales)
            if entry.report is not None:
                reports[f"{name}.{linear}"] = entry.report
        weights = {linear: IntegerWeight(weight) for linear, weight in kept.items()}
    _round_floats(layer, config, f"{name}.")
    streams.advance(layer, original)
    biases = {key: value.detach().cpu() for key, value in layer.named_parameters() if key.endswith(".bias")}
    linears = {key: Linear(f"{name}.{key}", weight, biases.get(f"{key}.bias")) for key, weight in weights.items()}
    gains = {norm: [_parameter(layer, f"{norm}.multiway.{branch}.weight").cpu() for branch in (0, 1)] for norm in NORMS}
    writer.layer(linears, {norm: (text, image) for norm, (text, image) in gains.items()})
    return reports


def _with_half_scales(weight: QuantizedWeight, name: str) -> QuantizedWeight:
    """A kept weight with its scales as a graph with float16 activations stores them."""
    scales = weight.scales.half().float()
    if not bool(((scales != 0) == (weight.scales != 0)).all()) or not bool(scales.isfinite().all()):
        raise QuantizationError(f"{name}: float16 cannot hold every scale of this weight; use --activations fp32")
    return replace(weight, scales=scales)


def _store_dense(layer: DecoderLayer, name: str, dtype: Literal["fp32", "fp16"]) -> dict[str, LinearWeight]:
    """The weights of linear layers in floating point; ``layer`` computes with these from now on."""
    weights: dict[str, LinearWeight] = {}
    for linear in LINEARS:
        weight = _parameter(layer, f"{linear}.weight")
        weights[linear] = stored = DenseWeight.of(f"{name}.{linear}", weight.clone().cpu(), dtype)
        weight.copy_(stored.dequantize())
    return weights


@torch.no_grad()
def _round_floats(module: nn.Module, config: ExportConfig, prefix: str) -> None:
    """Let ``module`` compute with norms and biases as a graph with this type of activations stores them."""
    if config.types.activations == "fp16":
        for name, parameter in module.named_parameters():
            if name.removesuffix(".weight") not in LINEARS:
                check_float16(f"{prefix}{name}", parameter)
                parameter.copy_(parameter.half().float())


def _parameter(layer: DecoderLayer, name: str) -> Tensor:
    return layer.get_parameter(name).detach()


def _store_head(weight: Tensor, config: ExportConfig) -> LinearWeight:
    types = config.types
    if types.head == "int8":
        # Eight bits leave rounding nothing to gain from a Hessian.
        settings = QuantConfig(bits=8, group_size=config.group_size, method="rtn", scale_dtype=types.activations)
        return IntegerWeight(rtn(weight, settings))
    return DenseWeight.of("the head", weight, "fp32" if types.head == "fp32" else "fp16")
