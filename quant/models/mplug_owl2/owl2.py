"""The whole model: images and embeddings in, logits out."""

from __future__ import annotations

from torch import Tensor, nn

from owl2.quant.models.mplug_owl2.abstractor import VisualAbstractor
from owl2.quant.models.mplug_owl2.decoder import DecoderLayer, KeyValue, RmsNorm, Routing, rotary_slice
from owl2.quant.models.mplug_owl2.vision import VisionModel
from owl2.runtime.config import ModelConfig


class Decoder(nn.Module):
    """Everything under the checkpoint's prefix ``model.``; the vision parts live there too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.decoder
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(decoder) for _ in range(decoder.num_hidden_layers))
        self.norm = RmsNorm(decoder.hidden_size, decoder.rms_norm_eps)
        self.vision_model = VisionModel(config.vision)
        self.visual_abstractor = VisualAbstractor(config.abstractor, decoder.hidden_size)


class Owl2Model(nn.Module):
    """mPLUG-Owl2. Text and image rows are merged by the caller (:mod:`owl2.runtime.families.mplug_owl2.positions`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)
        if config.decoder.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels: [N, 3, R, R] -> [N, queries + 1, C]."""
        return self.model.visual_abstractor(self.model.vision_model(pixels))  # type: ignore[no-any-return]

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed_tokens(ids)  # type: ignore[no-any-return]

    def decode(
        self, embeds: Tensor, modality: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run T new positions after those of ``past``: embeds [B, T, C], modality int64 [B, T], 1 at image positions.

        Returns:
            Hidden rows after the final norm, [B, T, C], and each layer's keys and values of all positions.
        """
        batch, tokens, width = embeds.shape
        rotary = rotary_slice(self.config.decoder, 0 if past is None else past[0][0].shape[2], tokens)
        routing, rows = Routing.of(modality), embeds.reshape(batch * tokens, width)
        presents = []
        for index, layer in enumerate(self.model.layers):
            layer_past = None if past is None else past[index]
            rows, present = layer(rows, routing, (batch, tokens), rotary, layer_past)
            presents.append(present)
        return self.model.norm(rows).view(batch, tokens, width), presents

    def head(self, hidden: Tensor) -> Tensor:
        """hidden: [..., C] -> logits [..., V]."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]
