"""The vision graph: pixels through tower and abstractor to the rows that enter the decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx import TensorProto
from torch import Tensor, nn

from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.dialect import Dialect, Linear
from owl2.export.graph.weights import LinearWeight
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor
from owl2.quant.models.mplug_owl2.abstractor import CrossAttentionBlock
from owl2.quant.models.mplug_owl2.vision import Layer
from owl2.runtime import spec
from owl2.runtime.config import ModelConfig

MakeWeight = Callable[[nn.Linear, Tensor], LinearWeight]
"""A linear layer and its weight float32 [N, K], rows perhaps reordered -> the stored form of that weight."""


class VisionGraph:
    """Writes the vision graph from the two torch modules."""

    def __init__(self, graph: GraphBuilder, dialect: Dialect, config: ModelConfig, make_weight: MakeWeight) -> None:
        self.graph, self.dialect, self.config, self.make_weight = graph, dialect, config, make_weight

    def write(self, tower: VisionModel, abstractor: VisualAbstractor) -> None:
        """Append all nodes and write the graph file."""
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

    def _module(self, x: str, module: nn.Linear, name: str) -> str:
        made = self.make_weight(module, module.weight.detach())
        return self.dialect.linear(self.graph, x, Linear(name, made, module.bias.detach()))

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
        graph, heads = self.graph, self.config.vision.num_attention_heads
        width = self.config.vision.hidden_size
        normed = self._layer_norm(x, layer.input_layernorm, name + ".input_layernorm")
        weight, bias = split_heads_first(layer.self_attn.query_key_value, heads)
        made = self.make_weight(layer.self_attn.query_key_value, weight.detach())
        fused = self.dialect.linear(graph, normed, Linear(name + ".query_key_value", made, bias.detach()))
        q, k, v = graph.node("Split", [fused, graph.indices(width, width, width)], outputs=3, axis=-1)
        attention = self.dialect.full_attention(graph, (q, k, v), heads, width)
        x = graph.op("Add", x, self._module(attention, layer.self_attn.dense, name + ".dense"))
        normed = self._layer_norm(x, layer.post_attention_layernorm, name + ".post_attention_layernorm")
        hidden = self._module(normed, layer.mlp.fc1, name + ".fc1")
        hidden = self.dialect.activation(graph, hidden, self.config.vision.hidden_act)
        return graph.op("Add", x, self._module(hidden, layer.mlp.fc2, name + ".fc2"))

    def _abstract(self, patches: str, abstractor: VisualAbstractor) -> str:
        queries = self._batched(abstractor.query_embeds, "abstractor.query_embeds")
        for index in range(self.config.abstractor.num_hidden_layers):
            queries = self._cross_attend(queries, patches, abstractor.encoder.block(index), f"abstractor.{index}")
        rows = self._module(queries, abstractor.visual_fc, "abstractor.visual_fc")
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
        q = self._module(placed_queries, attention.query, name + ".query")
        k = self._module(placed_context, attention.key, name + ".key")
        v = self._module(context, attention.value, name + ".value")
        heads, width = self.config.abstractor.num_attention_heads, self.config.abstractor.hidden_size
        joined = self.dialect.full_attention(graph, (q, k, v), heads, width)
        x = graph.op("Add", queries, self._module(joined, output.out_proj, name + ".out_proj"))
        normed = self._layer_norm(x, output.norm2, name + ".norm2")
        gate = self.dialect.silu(graph, self._module(normed, output.mlp.w1, name + ".w1"))
        hidden = graph.op("Mul", gate, self._module(normed, output.mlp.w3, name + ".w3"))
        hidden = self._layer_norm(hidden, output.mlp.ffn_ln, name + ".ffn_ln")
        return graph.op("Add", x, self._module(hidden, output.mlp.w2, name + ".w2"))


def split_heads_first(fused: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Reorder a fused projection from [heads, 3, head_dim] to [3, heads, head_dim] output channels."""
    order = torch.arange(fused.out_features).view(heads, 3, -1).transpose(0, 1).reshape(-1)
    return fused.weight[order], fused.bias[order]
