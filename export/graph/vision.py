"""The vision graph: pixels through tower and abstractor to the rows that enter the decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx import TensorProto
from torch import Tensor, nn

from owl2.export.graph.dialect import Dialect
from owl2.export.graph.weights import Linear, LinearWeight
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor
from owl2.quant.models.mplug_owl2.abstractor import CrossAttentionBlock
from owl2.quant.models.mplug_owl2.vision import Layer
from owl2.runtime import spec
from owl2.runtime.config import ModelConfig

MakeWeight = Callable[[nn.Linear, Tensor], LinearWeight]
"""A linear layer and its weight float32 [N, K], whose rows may be reordered -> the form to store that weight in."""


class VisionGraph:
    """Writes the vision graph from the two torch modules."""

    def __init__(self, ops: Dialect, config: ModelConfig, make_weight: MakeWeight) -> None:
        self.ops, self.graph, self.config, self.make_weight = ops, ops.graph, config, make_weight

    def write(self, tower: VisionModel, abstractor: VisualAbstractor) -> None:
        size = self.config.vision.image_size
        self.graph.input(spec.PIXELS, TensorProto.FLOAT, ["N", 3, size, size])
        x = self._embed(tower, self.graph.from_float32(spec.PIXELS))
        for index in range(self.config.vision.num_hidden_layers):
            x = self._layer(x, tower.encoder.layer(index), f"vision.{index}")
        if tower.post_layernorm is not None:
            x = self._layer_norm(x, tower.post_layernorm, "vision.post_layernorm")
        rows = self._abstract(x, abstractor)
        self.graph.node("Identity", [self.graph.cast(rows, TensorProto.FLOAT)], outputs=[spec.IMAGE_ROWS])
        shape: list[int | str] = ["N", self.config.rows_per_image, self.config.decoder.hidden_size]
        self.graph.output(spec.IMAGE_ROWS, TensorProto.FLOAT, shape)
        self.graph.save()

    def _constant(self, name: str, tensor: Tensor) -> str:
        return self.graph.floats(name, tensor.detach().numpy())

    def _linear(self, x: str, module: nn.Linear, name: str, order: Tensor | slice = slice(None)) -> str:
        """A linear layer with its outputs in ``order``."""
        weight = self.make_weight(module, module.weight.detach()[order])
        return Linear(name, weight, module.bias.detach()[order]).apply(self.ops, x)

    def _layer_norm(self, x: str, norm: nn.LayerNorm, name: str) -> str:
        weight = self._constant(name + ".weight", norm.weight)
        bias = self._constant(name + ".bias", norm.bias)
        return self.graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)

    def _batched(self, rows: Tensor, name: str) -> str:
        """One copy of constant rows [1, S, C] per image: -> [N, S, C]."""
        batch = self.graph.op("Shape", spec.PIXELS, start=0, end=1)
        shape = self.graph.node("Concat", [batch, self.graph.indices(*rows.shape[1:])], axis=0)[0]
        return self.graph.op("Expand", self._constant(name, rows), shape)

    def _embed(self, tower: VisionModel, pixels: str) -> str:
        graph, embeddings, config = self.graph, tower.embeddings, self.config.vision
        kernel = self._constant("vision.patch_embed.weight", embeddings.patch_embed.weight)
        side = [config.patch_size] * 2
        patches = graph.op("Conv", pixels, kernel, kernel_shape=side, strides=side)
        flat = graph.op("Reshape", patches, graph.indices(0, config.hidden_size, -1))
        x = graph.op("Transpose", flat, perm=[0, 2, 1])
        if config.use_cls_token:
            cls = self._batched(embeddings.cls_token, "vision.cls_token")
            x = graph.node("Concat", [cls, x], axis=1)[0]
        positions = self._constant("vision.position_embedding", embeddings.positions())
        return self._layer_norm(graph.op("Add", x, positions), embeddings.pre_layernorm, "vision.pre_layernorm")

    def _layer(self, x: str, layer: Layer, name: str) -> str:
        graph, heads, width = self.graph, self.config.vision.num_attention_heads, self.config.vision.hidden_size
        normed = self._layer_norm(x, layer.input_layernorm, name + ".input_layernorm")
        # The fused projection's outputs are [heads, 3, head_dim]; to be split they have to be [3, heads, head_dim].
        order = torch.arange(3 * width).view(heads, 3, -1).transpose(0, 1).reshape(-1)
        fused = self._linear(normed, layer.self_attn.query_key_value, name + ".query_key_value", order)
        q, k, v = graph.node("Split", [fused, graph.indices(width, width, width)], outputs=3, axis=-1)
        attention = self.ops.full_attention((q, k, v), heads, width)
        x = graph.op("Add", x, self._linear(attention, layer.self_attn.dense, name + ".dense"))
        normed = self._layer_norm(x, layer.post_attention_layernorm, name + ".post_attention_layernorm")
        hidden = self._linear(normed, layer.mlp.fc1, name + ".fc1")
        hidden = self.ops.activation(hidden, self.config.vision.hidden_act)
        return graph.op("Add", x, self._linear(hidden, layer.mlp.fc2, name + ".fc2"))

    def _abstract(self, patches: str, abstractor: VisualAbstractor) -> str:
        queries = self._batched(abstractor.query_embeds, "abstractor.query_embeds")
        for index in range(self.config.abstractor.num_hidden_layers):
            queries = self._cross_attend(queries, patches, abstractor.encoder.block(index), f"abstractor.{index}")
        rows = self._linear(queries, abstractor.visual_fc, "abstractor.visual_fc")
        end = self._batched(abstractor.vit_eos, "abstractor.vit_eos")
        return self.graph.node("Concat", [rows, end], axis=1)[0]

    def _cross_attend(self, queries: str, patches: str, block: CrossAttentionBlock, name: str) -> str:
        graph, attention, output = self.graph, block.attention, block.output
        queries = self._layer_norm(queries, block.norm1, name + ".norm1")
        keys = self._layer_norm(patches, block.normk, name + ".normk")
        context = graph.node("Concat", [queries, keys], axis=1)[0]
        positions = torch.cat([attention.q_pos_embed, attention.k_pos_embed])
        placed_queries = graph.op("Add", queries, self._constant(name + ".q_pos", attention.q_pos_embed))
        placed_context = graph.op("Add", context, self._constant(name + ".k_pos", positions))
        q = self._linear(placed_queries, attention.query, name + ".query")
        k = self._linear(placed_context, attention.key, name + ".key")
        v = self._linear(context, attention.value, name + ".value")
        heads, width = self.config.abstractor.num_attention_heads, self.config.abstractor.hidden_size
        joined = self.ops.full_attention((q, k, v), heads, width)
        x = graph.op("Add", queries, self._linear(joined, output.out_proj, name + ".out_proj"))
        normed = self._layer_norm(x, output.norm2, name + ".norm2")
        gate = self.ops.silu(self._linear(normed, output.mlp.w1, name + ".w1"))
        hidden = graph.op("Mul", gate, self._linear(normed, output.mlp.w3, name + ".w3"))
        hidden = self._layer_norm(hidden, output.mlp.ffn_ln, name + ".ffn_ln")
        return graph.op("Add", x, self._linear(hidden, output.mlp.w2, name + ".w2"))
