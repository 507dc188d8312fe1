"""Running a model, and perhaps a second one, on items: its answers, and the likelihood of given ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import numpy as np

from owl2.runtime.engine import Ints
from owl2.runtime.errors import DataError, ImageError, ReferenceModelError
from owl2.runtime.evaluation.conversations import image_problems
from owl2.runtime.evaluation.data import (
    Caption,
    Choice,
    Conversation,
    Item,
    Question,
    Task,
    Text,
    messages,
    placed_images,
    raise_problems,
)
from owl2.runtime.evaluation.divergence import Divergence, divergence, modality_of
from owl2.runtime.evaluation.item_run import ItemRun
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.template import Message, render
from owl2.runtime.kv_cache import KvCache, common_prefix
from owl2.runtime.likelihood import ChoiceLikelihoods, choice_likelihoods, text_ids, token_logprobs
from owl2.runtime.load import Loaded
from owl2.runtime.preprocess import UPRIGHT, ImageReading, check_image, read_image


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated answer, and why it ended: ``stop``, ``length`` or ``context``."""

    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Likelihood of given text. Add two to join them.

    Attributes:
        nats: minus the sum of log-probabilities.
        tokens: predicted.
        bytes: of a plain text in UTF-8; 0 for anything else.
    """

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


Output = Generation | ChoiceLikelihoods | Likelihood


@dataclass(frozen=True, slots=True)
class ItemResult:
    """Result of one item.

    Attributes:
        reference: output of the model that it is compared with; None without one.
        divergence: from the reference, over the prompt with its expected answer; None without a reference.
    """

    item: Item
    output: Output
    reference: Output | None = None
    divergence: Divergence | None = None


def measure(
    model: Loaded,
    items: Sequence[Item],
    reference: Loaded | None = None,
    *,
    max_new_tokens: int,
    preprocess: str | None = None,
    reading: ImageReading = UPRIGHT,
) -> Iterator[ItemResult]:
    """Measure item after item, greedily, so that results are reproducible. Only the results stay in memory.

    Args:
        reference: a second model, with the same vocabulary and context.
        max_new_tokens: of an answer.
        preprocess: ``resize``, ``pad`` or ``crop`` instead of each model's own mode.
        reading: what to make of EXIF orientation and transparency.

    Raises:
        DataError: before anything runs: items that do not fit the context, or whose images the mode of preprocessing
            cannot take; names all of them. While running: an image that can no longer be read.
        ReferenceModelError: the two models split a prompt into different tokens.
    """
    models = [model] if reference is None else [model, reference]
    raise_problems(model.name, context_problems(model, items))
    for each in models:
        check = partial(check_image, config=each.config.preprocess, mode=preprocess)
        raise_problems(each.name, image_problems(placed_images(items), check))
    caches = [each.new_cache() for each in models]
    return (_measure(item, models, caches, max_new_tokens, preprocess, reading) for item in items)


def context_problems(model: Loaded, items: Sequence[Item]) -> list[str]:
    """A sentence for each item that the context cannot hold together with its longest given answer."""
    problems = []
    for item in items:
        if isinstance(item.task, Text):
            continue
        answers = item.task.choices if isinstance(item.task, Choice) else [expected_answer(item.task)]
        prompts = [model.tokenizer.encode_prompt(render(messages(item.task, answer))) for answer in answers]
        # A placeholder's own id is one of the positions of its image.
        length = max(map(len, prompts)) + (model.config.rows_per_image - 1) * len(item.images)
        if length > model.context:
            problems.append(f"{item.where}: takes {length} positions, the context holds {model.context}")
    return problems


def expected_answer(task: Task) -> str:
    """The most frequent answer, the first of several, as two models are compared with it; empty if nothing is asked."""
    match task:
        case Question(_, answers) | Caption(_, answers):
            return Counter(answers).most_common(1)[0][0]
        case Choice(_, choices, answer):
            return choices[answer]
        case _:
            return ""


def _measure(
    item: Item,
    models: Sequence[Loaded],
    caches: Sequence[KvCache],
    max_new_tokens: int,
    preprocess: str | None,
    reading: ImageReading,
) -> ItemResult:
    for cache in caches:
        cache.claim().truncate(0)  # an item's figures must not depend on the items before it
    try:
        images = [read_image(path, reading) for path in item.images]
        runs = [ItemRun(model, cache, model.prepare(images, preprocess)) for model, cache in zip(models, caches)]
    except ImageError as error:
        raise DataError(f"{item.where}: {error}") from error
    total = Divergence()
    outputs: Sequence[Output]
    match item.task:
        case Text(text):
            outputs, total = _text_likelihoods(runs, item, text)
        case Conversation():
            outputs, total = _answer_likelihoods(runs, item)
        case task:
            if len(runs) == 2:
                _, total = _answer_likelihoods(runs, item)
            outputs = [_respond(run, task, max_new_tokens) for run in runs]
    return ItemResult(item, outputs[0], outputs[1], total) if len(runs) == 2 else ItemResult(item, outputs[0])


def _respond(run: ItemRun, task: Task, max_new_tokens: int) -> Output:
    prompt = run.encode(messages(task, None))
    if isinstance(task, Choice):
        return choice_likelihoods(run.encode, run.logits, run.model.tokenizer.eos_id, task.question, task.choices)
    answer = run.answer(prompt, max_new_tokens)
    return Generation(answer.text, answer.finish_reason)


def _text_likelihoods(runs: Sequence[ItemRun], item: Item, text: str) -> tuple[list[Likelihood], Divergence]:
    parts = [
        _likelihoods(runs, item, prompts, _predicting(prompts[0], [(1, len(prompts[0].keys))]))
        for prompts in zip(*(run.windows(text) for run in runs))
    ]
    likelihoods, divergences = zip(*parts)
    size = Likelihood(0.0, 0, len(text.encode()))
    return [reduce(add, windows, size) for windows in zip(*likelihoods)], reduce(add, divergences)


def _answer_likelihoods(runs: Sequence[ItemRun], item: Item) -> tuple[list[Likelihood], Divergence]:
    """Likelihood of the assistant's turns with their ends of sequence, the expected answer among them."""
    turns = messages(item.task, expected_answer(item.task))
    prompts = [run.encode(turns) for run in runs]
    spans = []
    for index, turn in enumerate(turns):
        if turn.role == "ASSISTANT" and turn.text:
            ends = [*turns[:index], Message("ASSISTANT")], turns[: index + 1]
            first, end = (common_prefix(runs[0].encode(end).keys, prompts[0].keys) for end in ends)
            spans.append((first, end))
    return _likelihoods(runs, item, prompts, _predicting(prompts[0], spans))


def _likelihoods(
    runs: Sequence[ItemRun], item: Item, prompts: Sequence[Prompt], predicting: Ints
) -> tuple[list[Likelihood], Divergence]:
    """Likelihood of some tokens of a prompt under each model, and the divergence of two models at all positions.

    Args:
        runs: of the model, and of its reference if there is one.
        prompts: the same one, as each model merges it.
        predicting: int64 [T], 1 at the positions whose next token counts.
    """
    tokens = [[key if isinstance(key, int) else None for key in prompt.keys] for prompt in prompts]
    if tokens.count(tokens[0]) != len(tokens):
        raise ReferenceModelError(
            f"{item.where}: {' and '.join(run.model.name for run in runs)} split the prompt into "
            "different tokens; only models with the same tokenizer can be compared"
        )
    nats, total, modality = [0.0] * len(runs), Divergence(), modality_of(prompts[0])
    streams = [run.logits(prompt) for run, prompt in zip(runs, prompts)]
    for blocks in zip(*streams, strict=True):
        start, actual = blocks[0]
        counted = np.flatnonzero(predicting[start : start + len(actual)])
        ids = text_ids([prompts[0].keys[start + row + 1] for row in counted])
        for index, (_, logits) in enumerate(blocks):
            nats[index] -= math.fsum(token_logprobs(logits[counted], ids))
        if len(blocks) == 2:
            total += divergence(blocks[1][1], actual, modality[start : start + len(actual)])
    count = int(predicting.sum())
    return [Likelihood(value, count, 0) for value in nats], total


def _predicting(prompt: Prompt, spans: Sequence[tuple[int, int]]) -> Ints:
    """1 at each position whose next one is a token of a span (first, end)."""
    predicting = np.zeros(len(prompt.keys), dtype=np.int64)
    for first, end in spans:
        for position in range(first, end):
            predicting[position - 1] = isinstance(prompt.keys[position], int)
    return predicting
