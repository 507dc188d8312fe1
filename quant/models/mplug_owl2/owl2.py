"""The whole model: images and ids in, logits out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from owl2.quant.models.mplug_owl2.abstractor import VisualAbstractor
from owl2.quant.models.mplug_owl2.decoder import DecoderLayer, KeyValue, RmsNorm, Routing, rotary_tables
from owl2.quant.models.mplug_owl2.vision import VisionModel
from owl2.runtime.config import IMAGE_TOKEN_ID, DecoderConfig, ModelConfig

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Merged:
    """A batch after its placeholders were replaced by image rows; short rows are right padded.

    Attributes:
        embeds: [B, L, C]; zero at padding.
        modality: int64 [B, L]; 1 at image rows, 0 at text and padding.
        mask: bool [B, L]; False at padding.
        labels: int64 [B, L]; -100 at image rows and padding. None when no labels were given.
        lengths: int64 [B], positions of each row before it was padded to the longest; padding ids inside it count.
    """

    embeds: Tensor
    modality: Tensor
    mask: Tensor
    labels: Tensor | None
    lengths: Tensor


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
    """mPLUG-Owl2 for inference, calibration and training."""

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
        """ids: int64 [...] -> [..., C]."""
        return self.model.embed_tokens(ids)  # type: ignore[no-any-return]

    def decode(self, embeds: Tensor, modality: Tensor) -> Tensor:
        """embeds: [B, T, C], modality: [B, T] -> hidden rows after the final norm, [B, T, C]."""
        hidden, _ = self.decode_cached(embeds, modality, None)
        return hidden

    def decode_cached(
        self, embeds: Tensor, modality: Tensor, past: list[KeyValue] | None
    ) -> tuple[Tensor, list[KeyValue]]:
        """As :meth:`decode`, continuing from ``past`` (one entry per layer); returns the longer cache too."""
        batch, tokens, width = embeds.shape
        start = 0 if past is None else past[0][0].shape[2]
        rotary = rotary_slice(self.config.decoder, start, tokens)
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

    def merge(
        self,
        ids: Tensor,
        image_blocks: list[Tensor],
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Merged:
        """Replace each placeholder by the next block of image rows.

        Args:
            ids: int64 [B, T]; -200 where a block goes.
            image_blocks: one [rows, C] per placeholder in order of appearance over the batch. A row without
                any placeholder still uses up one block, as upstream.
            labels: int64 [B, T], -100 where no loss is wanted.
            mask: [B, T], 0 at padding ids; None keeps padding ids as ordinary text.
        """
        blocks = iter(image_blocks)
        rows = []
        for index, row in enumerate(ids):
            row_labels = torch.full_like(row, IGNORED_LABEL) if labels is None else labels[index]
            row_mask = torch.ones_like(row, dtype=torch.bool) if mask is None else mask[index].bool()
            if image_blocks and not (row == IMAGE_TOKEN_ID).any():
                next(blocks)
            pieces = []
            for position, token in enumerate(row.tolist()):
                if token == IMAGE_TOKEN_ID:
                    block = next(blocks)
                    size = len(block)
                    pieces.append(
                        (
                            block,
                            torch.ones(size, dtype=torch.int64),
                            torch.full((size,), IGNORED_LABEL),
                            torch.ones(size, dtype=torch.bool),
                        )
                    )
                else:
                    here = slice(position, position + 1)
                    pieces.append(
                        (
                            self.embed(row[here]),
                            torch.zeros(1, dtype=torch.int64),
                            row_labels[here],
                            row_mask[here],
                        )
                    )
            rows.append([torch.cat(column) for column in zip(*pieces)])
        embeds, modality, out_labels, out_mask = zip(*rows)
        pad = torch.nn.utils.rnn.pad_sequence
        return Merged(
            embeds=pad(list(embeds), batch_first=True),
            modality=pad(list(modality), batch_first=True),
            mask=pad(list(out_mask), batch_first=True),
            labels=None if labels is None else pad(list(out_labels), batch_first=True, padding_value=IGNORED_LABEL),
            lengths=torch.tensor([len(row) for row in embeds]),
        )

    def forward(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """ids: int64 [B, T] with -200 per image, pixels: [N, 3, R, R] -> logits [B, L, V]."""
        blocks = [] if pixels is None else list(self.encode_images(pixels))
        merged = self.merge(ids, blocks)
        return self.head(self.decode(merged.embeds, merged.modality))


def rotary_slice(config: DecoderConfig, start: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Rotary tables of positions start..start+tokens-1: each [tokens, D/2]."""
    cos, sin = rotary_tables(config, start + tokens, start + tokens)
    return cos[start:], sin[start:]
