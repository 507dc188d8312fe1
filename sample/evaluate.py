"""Ask the held-out questions of the sample checkpoint, or of a bundle exported from it.

The questions depend on the seed alone, so both see the same ones. An answer is right if it equals the one
accepted answer, word by word, in greedy decoding. The four main kinds (colour, shape, count, relation) share
``count`` questions among them; every other kind gets as many as each of these.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from batches import Example, collate
from encoder import EOS, Encoder
from network import hidden_rows
from PIL import Image
from probes import KINDS, MAIN_KINDS, Probe, as_example, probes

from owl2 import Owl2
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.spec import KvType

LONGEST_ANSWER = 64
OPEN = 0  # an id that no answer holds
Answerer = Callable[[list[Probe]], list[str]]


@dataclass(frozen=True, slots=True)
class KindResult:
    """How one kind went: ``guess`` is the share that always giving the most common answer would get right."""

    asked: int
    right: int
    guess: float

    @property
    def share(self) -> float:
        """Right answers, 0..1."""
        return self.right / self.asked


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results by kind; ``main`` sums the four main kinds."""

    kinds: dict[str, KindResult]
    main_asked: int
    main_right: int
    seconds: float


def evaluate(answer: Answerer, *, count: int = 500, seed: int = 0, kinds: Sequence[str] = KINDS) -> Evaluation:
    """Ask ``count`` questions of the main kinds and as many of each other one of ``kinds`` as of each of these."""
    began = time.perf_counter()
    results = {}
    for kind in kinds:
        asked = probes(kind, count // len(MAIN_KINDS), seed)
        right = sum(given.strip() == probe.answer for given, probe in zip(answer(asked), asked))
        commonest = Counter(probe.answer for probe in asked).most_common(1)[0][1]
        results[kind] = KindResult(len(asked), right, commonest / len(asked))
    main = [results[kind] for kind in MAIN_KINDS]
    return Evaluation(results, sum(r.asked for r in main), sum(r.right for r in main), time.perf_counter() - began)


@torch.no_grad()
def torch_answers(model: Owl2Model, encoder: Encoder, asked: list[Probe]) -> list[str]:
    """Greedy answers of the torch model, all questions in one batch that is recomputed for every new word."""
    examples = [as_example(encoder, probe, with_answer=False) for probe in asked]
    given: list[list[int]] = [[] for _ in asked]
    for _ in range(LONGEST_ANSWER):
        still = [i for i, ids in enumerate(given) if EOS not in ids]
        if not still:
            break
        batch = collate([extended(examples[i], given[i]) for i in still], model.config.rows_per_image)
        hidden = hidden_rows(model, batch).view(*batch.ids.shape, -1)
        last = batch.weights.nonzero()[:, 1] - 1
        words = model.head(hidden[torch.arange(len(still)), last]).argmax(-1).tolist()
        for i, word in zip(still, words):
            given[i].append(word)
    return [encoder.decode(ids) for ids in given]


def extended(example: Example, given: list[int]) -> Example:
    """The prompt, the words given so far and a marker where the next one goes."""
    ids = [*example.ids, *given, OPEN]
    return Example(example.kind, ids, [0.0] * (len(ids) - 1) + [1.0], example.pixels)


def checkpoint_answerer(folder: Path) -> Answerer:
    """Answers of a checkpoint folder through torch, in float32 on the stored weights."""
    with Checkpoint(folder) as checkpoint:
        model = Owl2Model(checkpoint.config)
        checkpoint.load_into(model, "")
    encoder = Encoder(folder / "tokenizer.model")
    return lambda asked: torch_answers(model, encoder, asked)


def bundle_answerer(folder: Path, kv_cache: KvType) -> Answerer:
    """Answers of an exported bundle through the runtime, one question at a time."""
    owl = Owl2.load(folder, kv_cache=kv_cache)

    def answer(asked: list[Probe]) -> list[str]:
        texts = []
        for probe in asked:
            images = [] if probe.pixels is None else [Image.fromarray(probe.pixels)]
            made = owl.generate(probe.prompt, images=images, max_new_tokens=LONGEST_ANSWER, temperature=0)
            texts.append(made.text)
        return texts

    return answer


def table(result: Evaluation) -> str:
    """Plain text, one line per kind."""
    lines = [f"{'kind':10}{'asked':>7}{'right':>7}{'share':>8}{'guess':>8}"]
    for kind, r in result.kinds.items():
        lines.append(f"{kind:10}{r.asked:7}{r.right:7}{r.share:8.1%}{r.guess:8.1%}")
    lines.append(
        f"{'main four':10}{result.main_asked:7}{result.main_right:7}{result.main_right / result.main_asked:8.1%}"
    )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="checkpoint folder (default) or bundle folder (--bundle)")
    parser.add_argument("--bundle", action="store_true", help="the folder is a bundle: ask through owl2.runtime")
    parser.add_argument("--kv-cache", choices=get_args(KvType), help="of a bundle")
    parser.add_argument("--count", type=int, default=500, help="questions of the main kinds (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    answer = bundle_answerer(options.model, options.kv_cache) if options.bundle else checkpoint_answerer(options.model)
    result = evaluate(answer, count=options.count, seed=options.seed)
    print(json.dumps(asdict(result), indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
