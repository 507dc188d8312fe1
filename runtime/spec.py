"""The contract between exporter and runtime: file names, tensor names, the format version.

This is the only place that spells a tensor name. Axes: B batch, T new positions, M = B·T rows, R requested
logit rows, P rotary positions, S cache capacity, H heads, D head dim, W width of a cached row, N images, C hidden,
V vocabulary. "Floats" are of the manifest's activation type, float32 or float16.

Dialect ``ort`` is for ONNX Runtime: its attention writes keys and values in place into buffers [B, H, S, padded D].
Dialect ``onnx`` is for TensorRT and has standard operators only. Its keys and values are rows of W values; the graph
reads the cached ones and returns only those of the new positions, which the caller has written right after the
cached ones. So nothing is copied there either, and no buffer exists twice.
"""

from __future__ import annotations

from typing import Literal

from owl2.runtime.config import DecoderConfig

FORMAT_VERSION = 6

MANIFEST = "owl2.json"
VISION_GRAPH = "vision.onnx"
DECODER_GRAPH = "decoder.onnx"
DialectName = Literal["ort", "onnx"]
FloatType = Literal["fp32", "fp16"]
KvType = Literal["fp32", "fp16", "int8"]
WeightType = Literal["int4", "int8", "fp16", "fp32"]
VisionType = Literal["int8", "fp16", "fp32"]
BYTES_PER_VALUE = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
"""For every type above; scales of groups not included."""
DECODER_GRAPHS: dict[KvType, str] = {"fp32": DECODER_GRAPH, "fp16": DECODER_GRAPH, "int8": "decoder.kv_int8.onnx"}
"""The graph for each type of K/V cache; all use the weights in ``decoder.onnx.data``."""
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
"""Every file except the manifest and the graphs of narrower K/V caches."""

# vision.onnx
PIXELS = "pixel_values"  # float32 [N, 3, R, R]
IMAGE_ROWS = "image_rows"  # float32 [N, queries + 1, C]

# decoder.onnx, inputs of both dialects; B is 1 in the dialect onnx
EMBEDS = "inputs_embeds"  # floats [B, T, C]
MODALITY = "modality"  # int64 [M], 0 text, 1 image
TEXT_ROWS = "text_rows"  # int64 [text rows], indices into M
IMAGE_ROW_INDEX = "image_row_index"  # int64 [image rows], indices into M; empty while decoding
ROW_ORDER = "row_order"  # int64 [M]; concat(text, image)[row_order] restores the sequence
LOGIT_ROWS = "logit_rows"  # int64 [R], the rows whose logits are wanted
ROTARY_COS = "rotary_cos"  # floats [P, padded D / 2]; dialect onnx: [T, D / 2] of the new positions
ROTARY_SIN = "rotary_sin"

# decoder.onnx, inputs of the dialect ort
LENGTHS = "lengths"  # int32 [B], cached + new positions - 1
TOTAL_LENGTH = "total_length"  # int32 scalar, cached + new positions

# decoder.onnx, input of the dialect onnx
ATTENTION_MASK = "attention_mask"  # floats [T, S + T], added to the scores
MASKED = -65504.0
"""The least float16: what the mask has where a position must not be seen."""

# decoder.onnx, output
LOGITS = "logits"  # float32 [R, V]


def past_names(layer: int) -> tuple[str, str]:
    """Key and value inputs of a layer: floats or int8 [B, H, S, padded D]; dialect onnx: floats [S, W], S >= 1."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Key and value outputs of a layer, bound to the same buffers as the inputs; dialect onnx: floats [T, W]."""
    return f"present.{layer}.key", f"present.{layer}.value"


def padded_head_dim(config: DecoderConfig) -> int:
    """Head width in the K/V buffers: ONNX Runtime's rotary attention wants multiples of 16.

    Each rotary half is padded with zeros, which changes no score.
    """
    return -(-config.head_dim // 16) * 16


def kv_row_width(config: DecoderConfig) -> int:
    """W, the values of a cached row in the dialect onnx: all heads, filled with zeros to a multiple of 128.

    So every row begins at a multiple of 256 bytes, as TensorRT wants of an address.
    """
    return -(-config.hidden_size // 128) * 128


def kv_bytes(config: DecoderConfig, kv_type: KvType, dialect: DialectName = "ort") -> int:
    """Bytes that keys and values of one position take in all layers."""
    width = config.num_attention_heads * padded_head_dim(config) if dialect == "ort" else kv_row_width(config)
    return 2 * config.num_hidden_layers * width * int(BYTES_PER_VALUE[kv_type])
