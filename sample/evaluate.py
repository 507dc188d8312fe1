"""Ask the held-out questions of the sample checkpoint, or of a bundle exported from it.

The questions depend on the seed only, so both get the same ones. An answer is right if greedy decoding gives the one
accepted answer, word by word. The four main skills (colour, shape, count, relation) share ``count`` questions; every
other skill gets as many as each of these.
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
from probes import MAIN_SKILLS, SKILLS, Probe, as_example, probes

from owl2 import Owl2
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.spec import KvType

MAX_NEW_TOKENS = 64
OPEN = 0  # an id that no answer contains
Answerer = Callable[[list[Probe]], list[str]]


@dataclass(frozen=True, slots=True)
class SkillResult:
    """Results of one skill; ``guess`` is the share of right answers of always giving the most common one."""

    asked: int
    right: int
    guess: float

    @property
    def share(self) -> float:
        """Right answers, 0..1."""
        return self.right / self.asked


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results by skill; ``main`` sums the four main skills."""

    skills: dict[str, SkillResult]
    main_asked: int
    main_right: int
    seconds: float


def evaluate(answer: Answerer, *, count: int = 500, seed: int = 0, skills: Sequence[str] = SKILLS) -> Evaluation:
    """Ask ``count`` questions of the main skills, and as many of each other one of ``skills`` as of each of these."""
    began = time.perf_counter()
    results = {}
    for skill in skills:
        asked = probes(skill, count // len(MAIN_SKILLS), seed)
        right = sum(given.strip() == probe.answer for given, probe in zip(answer(asked), asked))
        commonest = Counter(probe.answer for probe in asked).most_common(1)[0][1]
        results[skill] = SkillResult(len(asked), right, commonest / len(asked))
    main = [results[skill] for skill in MAIN_SKILLS]
    return Evaluation(results, sum(r.asked for r in main), sum(r.right for r in main), time.perf_counter() - began)


@torch.no_grad()
def torch_answers(model: Owl2Model, encoder: Encoder, asked: list[Probe]) -> list[str]:
    """Greedy answers of the torch model, all questions in one batch that is recomputed for every new token."""
    examples = [as_example(encoder, probe, with_answer=False) for probe in asked]
    given: list[list[int]] = [[] for _ in asked]
    for _ in range(MAX_NEW_TOKENS):
        unfinished = [i for i, ids in enumerate(given) if EOS not in ids]
        if not unfinished:
            break
        batch = collate([extended(examples[i], given[i]) for i in unfinished], model.config.rows_per_image)
        hidden = hidden_rows(model, batch).view(*batch.ids.shape, -1)
        last = batch.weights.nonzero()[:, 1] - 1
        tokens = model.head(hidden[torch.arange(len(unfinished)), last]).argmax(-1).tolist()
        for i, token in zip(unfinished, tokens):
            given[i].append(token)
    return [encoder.decode(ids) for ids in given]


def extended(example: Example, given: list[int]) -> Example:
    """The prompt, the tokens given so far and a marker where the next one goes."""
    ids = [*example.ids, *given, OPEN]
    return Example(ids, [0.0] * (len(ids) - 1) + [1.0], example.pixels)


def checkpoint_answerer(folder: Path) -> Answerer:
    """Answers of a checkpoint folder through torch, in float32 on the stored weights."""
    with Checkpoint(folder) as checkpoint:
        model = Owl2Model(checkpoint.config)
        checkpoint.load_into(model, "")
    encoder = Encoder(folder / "tokenizer.model")
    return lambda asked: torch_answers(model, encoder, asked)


def bundle_answerer(folder: Path, kv_cache: KvType | None) -> Answerer:
    """Answers of an exported bundle through the runtime, one question at a time."""
    owl = Owl2.load(folder, kv_cache=kv_cache)

    def answer(asked: list[Probe]) -> list[str]:
        images = [None if probe.pixels is None else Image.fromarray(probe.pixels) for probe in asked]
        answers = [
            owl.generate(probe.prompt, images=image, max_new_tokens=MAX_NEW_TOKENS)
            for probe, image in zip(asked, images)
        ]
        return [answer.text for answer in answers]

    return answer


def table(result: Evaluation) -> str:
    """Plain text, one line per skill."""
    lines = [f"{'skill':10}{'asked':>7}{'right':>7}{'share':>8}{'guess':>8}"]
    for skill, r in result.skills.items():
        lines.append(f"{skill:10}{r.asked:7}{r.right:7}{r.share:8.1%}{r.guess:8.1%}")
    lines.append(
        f"{'main four':10}{result.main_asked:7}{result.main_right:7}{result.main_right / result.main_asked:8.1%}"
    )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="checkpoint folder (default) or bundle folder (--bundle)")
    parser.add_argument("--bundle", action="store_true", help="the folder is a bundle; ask through the runtime")
    parser.add_argument("--kv-cache", choices=get_args(KvType), help="type of the K/V cache of a bundle")
    parser.add_argument("--count", type=int, default=500, help="questions of the main skills (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    answer = bundle_answerer(options.model, options.kv_cache) if options.bundle else checkpoint_answerer(options.model)
    result = evaluate(answer, count=options.count, seed=options.seed)
    print(json.dumps(asdict(result), indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
