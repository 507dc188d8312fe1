"""An official checkpoint as a backend of the runtime, in torch and float32, to compare bundles with.

The runtime, which never imports torch itself, finds it through the entry point ``owl2.references``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.modules import head_name, load_layer, load_norm, load_vision
from owl2.export.checkpoint.naming import TABLE
from owl2.quant.models.mplug_owl2 import DecoderLayer, Routing
from owl2.quant.models.mplug_owl2.decoder import KeyValue, rotary_slice
from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.engine import PREFILL_BLOCK, Floats, Ints, KvBuffers, own
from owl2.runtime.errors import Owl2Warning
from owl2.runtime.images import ImageEncoder
from owl2.runtime.load import Loaded
from owl2.runtime.token_table import ArrayTable

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
        return sum(tensor.nbytes for pair in self.presents for tensor in pair)


class TorchEngine:
    """See :class:`owl2.runtime.engine.Engine`."""

    rows_are_independent = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Load the vision side, the last norm and the head; the checkpoint must stay open."""
        self._config = checkpoint.config.decoder
        self._tower, self._abstractor = load_vision(checkpoint)
        self._norm = load_norm(checkpoint)
        self._head = checkpoint.tensor(head_name(checkpoint))
        self._layer = _layers(checkpoint)
        self.context = None
        self.block = PREFILL_BLOCK

    def close(self) -> None: ...

    @torch.no_grad()
    def encode_images(self, pixels: Floats, cancellation: Cancellation = NEVER) -> Floats:
        cancellation.check()
        rows: Floats = self._abstractor(self._tower(torch.from_numpy(pixels))).numpy()
        return rows

    def allocate(self, capacity: int, previous: KvBuffers | None) -> TorchBuffers:
        return TorchBuffers(capacity, list(previous.presents) if isinstance(previous, TorchBuffers) else [])

    stepping = None
    kv_transfer = None

    @torch.no_grad()
    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        tokens = len(embeds)
        cache = own(buffers, TorchBuffers, past + tokens)
        rotary = rotary_slice(self._config, past, tokens)
        routing = Routing.of(torch.from_numpy(modality)[None])
        rows = torch.from_numpy(embeds)
        presents = []
        for index in range(self._config.num_hidden_layers):
            cancellation.check()
            cached = None
            if past:
                keys, values = cache.presents[index]
                cached = keys[:, :, :past], values[:, :, :past]
            rows, present = self._layer(index)(rows, routing, (1, tokens), rotary, cached)
            presents.append(present)
        cache.presents = presents
        logits: Floats = (self._norm(rows[torch.from_numpy(logit_rows)]) @ self._head.T).numpy()
        return logits

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        zero = np.zeros(1, dtype=np.int64)
        logits: Floats = self.prefill(embeds, zero, past, buffers, zero, cancellation)[0]
        return logits


def open_checkpoint(folder: Path) -> Loaded:
    """Load an official checkpoint as the runtime loads a bundle; it stays open while the model lives.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
    """
    checkpoint = Checkpoint(folder)
    for note in checkpoint.notes:
        warnings.warn(f"{folder}: {note}", Owl2Warning, stacklevel=2)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer.tokenizer
    engine = TorchEngine(checkpoint)
    table = ArrayTable(checkpoint.tensor(TABLE).numpy())
    context = config.decoder.max_position_embeddings
    return Loaded(str(folder), config, engine, tokenizer, table, ImageEncoder(engine), context, "", "")


def _layers(checkpoint: Checkpoint) -> Callable[[int], DecoderLayer]:
    """A function that gives a layer by its number, from memory where all of them fit."""
    config = checkpoint.config.decoder

    def load(index: int) -> DecoderLayer:
        return load_layer(checkpoint, index, "cpu")[0]

    with torch.device("meta"):
        layer_bytes = sum(parameter.nbytes for parameter in DecoderLayer(config).parameters())
    if layer_bytes * config.num_hidden_layers > RESIDENT_SHARE * psutil.virtual_memory().total:
        return load
    return [load(index) for index in range(config.num_hidden_layers)].__getitem__
