"""The contract between exporter and runtime: file names, tensor names, the format version.

This is the only place that spells a tensor name. Axes: B batch, T new positions, M = B·T rows, R requested
logit rows, P rotary positions, S cache capacity, H heads, D head dim, N pictures, C hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from owl2.runtime.config import DecoderConfig

FORMAT_VERSION = 2

MANIFEST = "owl2.json"
VISION_GRAPH = "vision.onnx"
DECODER_GRAPH = "decoder.onnx"
KvType = Literal["fp32", "int8"]
DECODER_GRAPHS: dict[KvType, str] = {"fp32": DECODER_GRAPH, "int8": "decoder.kv_int8.onnx"}
"""One graph per type of K/V cache; all use the weights in ``decoder.onnx.data``."""
DEFAULT_KV_CACHE: KvType = "fp32"
KV_WIDTHS: dict[KvType, int] = {"fp32": 4, "int8": 1}
"""Bytes of an element."""
EMBEDDINGS = "embeddings.bin"
REPORT = "report.json"
GOLDENS = "goldens.npz"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
BUNDLE_FILES = (
    VISION_GRAPH,
    VISION_GRAPH + ".data",
    DECODER_GRAPH,
    DECODER_GRAPH + ".data",
    EMBEDDINGS,
    *TOKENIZER_FILES,
    GOLDENS,
    REPORT,
)
"""Everything beside the manifest and the graphs of narrower K/V caches."""

# vision.onnx
PIXELS = "pixel_values"  # float32 [N, 3, R, R]
IMAGE_ROWS = "image_rows"  # float32 [N, queries + 1, C]

# decoder.onnx, inputs
EMBEDS = "inputs_embeds"  # float32 [B, T, C]
MODALITY = "modality"  # int64 [M], 0 text, 1 image
TEXT_ROWS = "text_rows"  # int64 [text rows], indices into M
IMAGE_ROW_INDEX = "image_row_index"  # int64 [image rows], indices into M; empty while decoding
ROW_ORDER = "row_order"  # int64 [M]; concat(text, image)[row_order] restores the sequence
LOGIT_ROWS = "logit_rows"  # int64 [R], the rows whose logits are wanted
LENGTHS = "lengths"  # int32 [B], cached + new positions - 1
TOTAL_LENGTH = "total_length"  # int32 scalar, cached + new positions
ROTARY_COS = "rotary_cos"  # float32 [P, padded D / 2]
ROTARY_SIN = "rotary_sin"  # float32 [P, padded D / 2]

# decoder.onnx, output
LOGITS = "logits"  # float32 [R, V]


def past_names(layer: int) -> tuple[str, str]:
    """Key and value inputs of a layer: float32 or int8 [B, H, S, padded D]."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Key and value outputs of a layer; bound to the same buffers as the inputs."""
    return f"present.{layer}.key", f"present.{layer}.value"


def padded_head_dim(config: DecoderConfig) -> int:
    """Head width in the K/V buffers: ONNX Runtime's rotary attention wants multiples of 16.

    Each rotary half is padded with zeros, which changes no score.
    """
    return -(-config.head_dim // 16) * 16


def kv_bytes(config: DecoderConfig, width: int) -> int:
    """Bytes that keys and values of one position take in all layers, ``width`` bytes each."""
    return 2 * config.num_hidden_layers * config.num_attention_heads * padded_head_dim(config) * width
