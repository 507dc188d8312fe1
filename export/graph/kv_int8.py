"""The decoder graph with an int8 K/V cache, derived from the finished one of the dialect ort.

Weights stay in the external data of the first graph; only the types of the cache and its scales are new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from owl2.quant.kv import KvScales
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig

# The lowest version whose CPU GroupQueryAttention takes int8 K/V; 1.25 and 1.26 know the types but fail in the kernel.
MINIMUM_ONNXRUNTIME = "1.27"
FIRST_SCALES_INPUT = 12  # of GroupQueryAttention; 8 to 11 are optional inputs that stay empty


def write_int8_kv_graph(source: Path, target: Path, config: DecoderConfig, scales: Sequence[KvScales]) -> None:
    """Write ``target``.

    Args:
        source: decoder graph with float32 K/V.
        target: the file to write, in the same folder; it reads the external data of ``source``.
        config: of the model.
        scales: one entry per layer.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    attention = {node.input[3]: node for node in graph.node if node.op_type == "GroupQueryAttention"}
    values = {value.name: value for value in (*graph.input, *graph.output)}
    for layer, entry in enumerate(scales):
        past, present = spec.past_names(layer), spec.present_names(layer)
        for name in (*past, *present):
            values[name].type.tensor_type.elem_type = TensorProto.INT8
        names = [f"layers.{layer}.{which}.cache_scales" for which in ("k", "v")]
        for name, steps in zip(names, (entry.keys, entry.values)):
            graph.initializer.append(numpy_helper.from_array(padded_scales(steps.numpy(), config), name))
        node = attention[past[0]]
        node.input.extend([""] * (FIRST_SCALES_INPUT - len(node.input)) + names)
        settings = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in settings.items())
    target.write_bytes(model.SerializeToString())


def padded_scales(steps: NDArray[np.float32], config: DecoderConfig) -> NDArray[np.float32]:
    """Scales [H, D] as the graph takes them: [1, H, 1, padded D], with padding after each rotary half.

    Padded channels hold zeros, whose scale may be any positive number.
    """
    heads, width = config.num_attention_heads, spec.padded_head_dim(config)
    halves = steps.reshape(heads, 2, config.head_dim // 2)
    filled = np.pad(halves, ((0, 0), (0, 0), (0, (width - config.head_dim) // 2)), constant_values=1)
    return filled.reshape(1, heads, 1, width).astype(np.float32)
