"""What a benchmark runs on a loaded model."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from owl2.runtime.bench.result import Memory
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import Floats, KvBuffers
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.generate import Answer
from owl2.runtime.kv_cache import Key, KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.memory import ROOT, read_state
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.stream import stream_answer

QUESTION = 20
"""Tokens of a question."""
ONE_TOKEN = GenerationConfig(max_new_tokens=1, lookup=False)


class Workload:
    """Steps and questions of random tokens, each timed by itself."""

    def __init__(self, model: Loaded, seed: int = 0) -> None:
        self._model, self._random = model, np.random.default_rng(seed)

    @property
    def positions(self) -> int:
        """Positions that :meth:`conversation` caches."""
        return self._model.config.rows_per_image + 2 * QUESTION + 1

    def prefill(self, tokens: int) -> float:
        """Seconds of a prompt of text, to the logits of its last position."""
        model = self._model
        buffers, embeds = model.engine.allocate(tokens, None), self._embeds(tokens)
        began = time.perf_counter()
        self._fill(buffers, embeds)
        return time.perf_counter() - began

    def filled(self, positions: int) -> KvBuffers:
        """K/V buffers with so many positions cached, and room for one more."""
        buffers = self._model.engine.allocate(positions + 1, None)
        self._fill(buffers, self._embeds(positions))
        return buffers

    def step(self, buffers: KvBuffers, positions: int) -> float:
        """Seconds of a token after ``positions``."""
        embeds = self._embeds(1)
        began = time.perf_counter()
        self._model.engine.decode(embeds, positions, buffers)
        return time.perf_counter() - began

    def rows(self, buffers: KvBuffers, positions: int, count: int) -> float:
        """Seconds of a step of ``count`` rows that end at ``positions`` + 1, with the logits of each."""
        embeds, modality = self._embeds(count), np.zeros(count, np.int64)
        past = positions + 1 - count
        began = time.perf_counter()
        self._model.engine.prefill(embeds, modality, past, buffers, np.arange(count))
        return time.perf_counter() - began

    def conversation(self) -> tuple[Answer, Answer]:
        """Answers, of one token, to a question about a new image, and to a second one after it."""
        model, cache = self._model, self._model.new_cache()
        size = model.config.vision.image_size
        image = self._random.integers(0, 256, (size, size, 3), np.uint8)
        began = time.perf_counter()
        prepared = model.prepare(image)
        preparing = time.perf_counter() - began
        shown = model.encode("<|image|>", prepared)
        first = Prompt([*shown.keys, *self._ids(QUESTION)], shown.images)
        one = self._ask(cache, first, preparing)
        return one, self._ask(cache, Prompt([*first.keys, *one.ids, *self._ids(QUESTION)], shown.images))

    def question(self) -> None:
        """Answer a question of text with one token."""
        self._ask(self._model.new_cache(), Prompt(list(self._ids(QUESTION)), {}))

    def _ask(self, cache: KvCache, prompt: Prompt, preparing: float = 0.0) -> Answer:
        return stream_answer(self._model, cache, prompt, ONE_TOKEN, preprocess_seconds=preparing).read()

    def _ids(self, count: int) -> list[Key]:
        return [int(key) for key in self._random.integers(3, self._model.config.decoder.vocab_size, count)]

    def _embeds(self, count: int) -> Floats:
        ids = self._random.integers(3, self._model.config.decoder.vocab_size, count)
        return self._model.table.rows([int(key) for key in ids])

    def _fill(self, buffers: KvBuffers, embeds: Floats) -> None:
        """Run positions from the first on, in the blocks that a prompt is run in."""
        block = self._model.engine.block
        for start in range(0, len(embeds), block):
            rows = embeds[start : start + block]
            last = np.array([len(rows) - 1])
            self._model.engine.prefill(rows, np.zeros(len(rows), np.int64), start, buffers, last)


def timed(work: Callable[[], float], rounds: int) -> list[float]:
    """Seconds of each round, after one that does not count."""
    work()
    return [work() for _ in range(rounds)]


def multiply_adds(decoder: DecoderConfig, tokens: int) -> int:
    """Of the decoder's matrices for a prompt of text, the head for its last position."""
    width = decoder.hidden_size
    layer = 4 * width**2 + 3 * width * decoder.intermediate_size
    return tokens * decoder.num_hidden_layers * layer + width * decoder.vocab_size


def process_memory(kv_cache: int, root: Path = ROOT) -> Memory | None:
    """Memory of this process now; None where the system does not tell."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read_state(root / "proc/self/smaps_rollup"), re.MULTILINE))
    if not {"Rss", "Anonymous"} <= found.keys():
        return None
    private = int(found["Anonymous"]) * 1024
    return Memory(private, int(found["Rss"]) * 1024 - private, kv_cache)
