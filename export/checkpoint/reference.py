"""An official checkpoint as a backend of the runtime, in torch and float32: what a bundle is compared with.

Found by the runtime through the entry point ``owl2.references``, which never imports torch itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.decoder import load_layer
from owl2.quant.models.mplug_owl2 import DecoderLayer, RmsNorm, Routing, VisionModel, VisualAbstractor
from owl2.quant.models.mplug_owl2.decoder import KeyValue
from owl2.quant.models.mplug_owl2.owl2 import rotary_slice
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import PREFILL_BLOCK, Floats, Ints, KvBuffers
from owl2.runtime.errors import BackendError, BundleError, CheckpointError
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import ImageEncoder
from owl2.runtime.load import Loaded

# Layers are kept in memory if all of them in float32 take at most this share of the machine's; otherwise each
# step reads them from the mapped checkpoint again, which is slow but needs the memory of one.
RESIDENT_SHARE = 0.5


class TorchBuffers:
    """Keys and values of all layers, float32 [1, H, S, D]; empty before the first step."""

    def __init__(self, capacity: int, presents: list[KeyValue]) -> None:
        self.capacity = capacity
        self.presents = presents

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for pair in self.presents for tensor in pair)


class TorchEngine:
    """See :class:`owl2.runtime.engine.Engine`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Load the vision side and what surrounds the layers; the checkpoint must stay open."""
        config = checkpoint.config
        self._config = config.decoder
        self._tower = VisionModel(config.vision).eval()
        self._abstractor = VisualAbstractor(config.abstractor, config.decoder.hidden_size).eval()
        self._norm = RmsNorm(config.decoder.hidden_size, config.decoder.rms_norm_eps)
        checkpoint.load_into(self._tower, "model.vision_model.")
        checkpoint.load_into(self._abstractor, "model.visual_abstractor.")
        checkpoint.load_into(self._norm, "model.norm.")
        tied = config.decoder.tie_word_embeddings
        self._head = checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
        self._layer = _layers(checkpoint)

    @property
    def context(self) -> None:
        """Only the model limits it."""
        return None

    @property
    def block(self) -> int:
        """New positions of a prefill step."""
        return PREFILL_BLOCK

    def close(self) -> None:
        """Nothing to give back that the garbage collector does not."""

    @torch.no_grad()
    def encode_images(self, pixels: Floats) -> Floats:
        """pixels: [N, 3, R, R] -> image rows [N, queries + 1, C]."""
        rows: Floats = self._abstractor(self._tower(torch.from_numpy(pixels))).numpy()
        return rows

    def allocate(self, capacity: int, previous: KvBuffers | None) -> TorchBuffers:
        """Buffers for ``capacity`` positions that begin with the content of ``previous``."""
        return TorchBuffers(capacity, list(previous.presents) if isinstance(previous, TorchBuffers) else [])

    @torch.no_grad()
    def prefill(self, embeds: Floats, modality: Ints, past: int, buffers: KvBuffers, logit_rows: Ints) -> Floats:
        """Run T mixed positions after ``past`` cached ones -> logits [R, V]."""
        if not isinstance(buffers, TorchBuffers):
            raise BackendError(f"these K/V buffers belong to another backend: {type(buffers).__name__}")
        tokens = len(embeds)
        rotary = rotary_slice(self._config, past, tokens)
        routing = Routing.of(torch.from_numpy(modality)[None])
        rows = torch.from_numpy(embeds)
        presents = []
        for index in range(self._config.num_hidden_layers):
            cached = _cut(buffers.presents[index], past) if past else None
            rows, present = self._layer(index)(rows, routing, (1, tokens), rotary, cached)
            presents.append(present)
        buffers.presents = presents
        logits: Floats = (self._norm(rows[torch.from_numpy(logit_rows)]) @ self._head.T).numpy()
        return logits

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers) -> Floats:
        """Run one text position after ``past`` cached ones: embeds [1, C] -> logits [V]."""
        zero = np.zeros(1, dtype=np.int64)
        logits: Floats = self.prefill(embeds, zero, past, buffers, zero)[0]
        return logits


def open_checkpoint(folder: Path) -> Loaded:
    """Load an official checkpoint as the runtime loads a bundle; it stays open while the model lives.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
    """
    checkpoint = Checkpoint(folder)
    try:
        tokenizer = Tokenizer.load(folder)
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    config = checkpoint.config
    engine = TorchEngine(checkpoint)
    table = checkpoint.tensor("model.embed_tokens.weight").numpy()
    context = config.decoder.max_position_embeddings
    return Loaded(str(folder), config, engine, tokenizer, table, ImageEncoder(engine), context)


def _cut(pair: KeyValue, length: int) -> KeyValue:
    keys, values = pair
    return keys[:, :, :length], values[:, :, :length]


def _layers(checkpoint: Checkpoint) -> Callable[[int], DecoderLayer]:
    """Gives a layer by its number, from memory where all of them fit."""
    config = checkpoint.config.decoder

    def load(index: int) -> DecoderLayer:
        return load_layer(checkpoint, index, "cpu")

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _layer_bytes(config) * config.num_hidden_layers > RESIDENT_SHARE * memory:
        return load
    return [load(index) for index in range(config.num_hidden_layers)].__getitem__


def _layer_bytes(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return sum(_bytes(parameter) for parameter in DecoderLayer(config).parameters())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * 4
