"""Whether an answer depends on what the K/V cache already held: logits after reuse against those of a cold start.

In conversations of several turns about the pictures of a folder, every step of every answer after the first is computed
twice with the same tokens: in the chat's own cache, and in an empty one that the whole conversation is read into at
once. ``--accuracy-level`` computes with another one in every MatMulNBits: 0 and 1 keep activations in float32, 4 (as
exported) rounds them to int8. ``--even-rows`` gives the graphs an even number of rows in every step, which keeps to one
kind of kernel.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtEngine
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.engine import EngineOptions, Floats, Ints, KvBuffers
from owl2.runtime.evaluation.divergence import row_kl
from owl2.runtime.families.mplug_owl2.template import Message, render, with_images
from owl2.runtime.generate import prompt_logits
from owl2.runtime.images import ImageEncoder
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.steps import Steps

KV_TYPES = tuple(spec.DECODER_GRAPHS)
QUESTIONS = (
    "Describe the picture.", "What shapes are there?", "Which of them is the largest?", "What colour is it?",
    "How many shapes are there?", "Is the picture sharp?", "What is at the bottom?", "How good is the quality?",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Logits [V] for the same position, after reuse and after a cold start."""

    warm: Floats
    cold: Floats

    @property
    def gap(self) -> float:
        """Lead of the most likely token over the second, in logits, where it is smaller."""
        return min(float(np.diff(np.sort(row)[-2:])[0]) for row in (self.warm, self.cold))


def conversation(model: Loaded, pictures: list[Path], turns: int, tokens: int, rng: random.Random) -> Iterator[Step]:
    """The steps of one conversation from its second turn on; about every other turn shows a picture."""
    warm, history, images = model.new_cache(), list[Message](), []
    for turn in range(turns):
        shown = model.prepare(rng.choice(pictures)) if turn == 0 or rng.random() < 0.4 else []
        images += shown
        history.append(Message("USER", with_images(rng.choice(QUESTIONS), len(shown))))
        prompt, cold, answer = model.encode(render([*history, Message("ASSISTANT")]), images), model.new_cache(), []
        step = Step(
            *(list(prompt_logits(model, cache, prompt, len(prompt.keys) - 1))[-1][1][-1] for cache in (warm, cold))
        )
        while True:
            if turn:
                yield step
            answer.append(int(step.warm.argmax()))
            if answer[-1] in model.tokenizer.special_ids or len(answer) >= tokens:
                break
            steps = (Steps(model, cache.claim(), prompt, lookup=False) for cache in (warm, cold))
            step = Step(*(one.feed(answer[-1], 0, NEVER) for one in steps))
        history.append(Message("ASSISTANT", model.tokenizer.decode(answer)))


class EvenRows:
    """An engine that gives the graphs an even number of text rows, of image rows and of logits: it repeats the last.

    Rows are added after those of the step, so that they write to positions which the next step overwrites.
    """

    def __init__(self, engine: OrtEngine) -> None:
        self._engine = engine
        self.context, self.block, self.rows_are_independent = None, engine.block, False
        self.encode_images, self.close = engine.encode_images, engine.close

    def allocate(self, capacity: int, previous: KvBuffers | None) -> KvBuffers:
        """Room for two more positions."""
        return self._engine.allocate(capacity + 2, previous)

    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        """As that of an engine."""
        odd = np.array([kind for kind in (0, 1) if (modality == kind).sum() % 2], dtype=np.int64)
        rows, kinds = np.concatenate([embeds, *(embeds[-1:] for _ in odd)]), np.concatenate([modality, odd])
        asked = np.concatenate([logit_rows, logit_rows[-1:]]) if len(logit_rows) % 2 else logit_rows
        return self._engine.prefill(rows, kinds, past, buffers, asked, cancellation)[: len(logit_rows)]

    stepping = kv_transfer = None

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        """As that of an engine."""
        zeros = np.zeros(1, dtype=np.int64)
        logits: Floats = self.prefill(embeds, zeros, past, buffers, zeros, cancellation)[0]
        return logits


def with_level(bundle: Bundle, level: int, folder: Path) -> Bundle:
    """A bundle in ``folder`` that has another accuracy level in every MatMulNBits of its decoder."""
    for path in bundle.folder.iterdir():
        if path.is_file() and path.name != spec.DECODER_GRAPH:
            (folder / path.name).symlink_to(path.resolve())
    graph = onnx.load(bundle.path(spec.DECODER_GRAPH))
    for node in graph.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    onnx.save(graph, folder / spec.DECODER_GRAPH)
    return Bundle(folder, bundle.manifest)


def open_model(folder: Path, level: int | None, even: bool, options: OrtOptions, stack: ExitStack) -> Loaded:
    """The model of a bundle; its decoder with another accuracy level if one is given, or in even rows."""
    bundle, loaded = open_bundle(folder, EngineOptions(kv_cache=options.kv_cache))
    stack.callback(loaded.close)
    if level is not None:
        bundle = with_level(bundle, level, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    engine = OrtEngine(bundle, options)
    return replace(loaded, engine=EvenRows(engine) if even else engine, encoder=ImageEncoder(engine))


def record(steps: list[Step], seconds: float) -> dict[str, float]:
    """Figures for people."""
    other = [step for step in steps if step.warm.argmax() != step.cold.argmax()]
    largest = max(float(np.abs(step.warm - step.cold).max()) for step in steps)
    kl = [float(row_kl(step.cold[None], step.warm[None])[0]) for step in steps]
    return {
        "steps": len(steps),
        "other_tokens": len(other),
        "largest_gap_at_these": round(max((step.gap for step in other), default=0.0), 4),
        "median_gap": round(float(np.median([step.gap for step in steps])), 2),
        "equal_logits": sum(bool((step.warm == step.cold).all()) for step in steps),
        "largest_difference": largest,
        "median_difference": float(np.median([np.abs(step.warm - step.cold).max() for step in steps])),
        "mean_kl": float(np.mean(kl)),
        "largest_kl": max(kl),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="folder of .png images")
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer, at most")
    parser.add_argument("--kv-cache", choices=KV_TYPES)
    parser.add_argument("--accuracy-level", type=int)
    parser.add_argument("--even-rows", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pictures = sorted(options.pictures.glob("*.png"))
    with ExitStack() as stack:
        model = open_model(
            options.bundle, options.accuracy_level, options.even_rows, OrtOptions(kv_cache=options.kv_cache), stack
        )
        began = time.perf_counter()
        steps: list[Step] = []
        for index in range(options.conversations):
            steps += conversation(model, pictures, options.turns, options.tokens, random.Random(index))
        figures = record(steps, time.perf_counter() - began)
    print(json.dumps(figures) if options.json else "\n".join(f"{name:24}{value:g}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
