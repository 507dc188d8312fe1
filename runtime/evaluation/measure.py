"""Running a model, and perhaps a second one, on items: what it answers and how likely it finds what others answered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from owl2.runtime.engine import Ints
from owl2.runtime.errors import ReferenceModelError
from owl2.runtime.evaluation.data import (
    Caption,
    Choice,
    Conversation,
    Item,
    Question,
    Text,
    messages,
    raise_problems,
)
from owl2.runtime.evaluation.divergence import Divergence, divergence, token_logprobs
from owl2.runtime.evaluation.subject import Subject, modality_of
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.template import Message, render
from owl2.runtime.images import PreparedImage
from owl2.runtime.kv_cache import Key
from owl2.runtime.preprocess import load_image

MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model said, and why it ended: ``stop``, ``length`` or ``context``."""

    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """How likely each choice is.

    Attributes:
        logprobs: sum over the choice's tokens, nats.
        tokens: how many they are.
    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def best(self) -> int:
        """Place of the likeliest choice."""
        return int(np.argmax(self.logprobs))

    @property
    def best_per_token(self) -> int:
        """Place of the choice whose tokens are likeliest on average, which does not favour short ones."""
        return int(np.argmax(np.divide(self.logprobs, self.tokens)))


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely given text is.

    Attributes:
        nats: minus the sum of log-probabilities.
        tokens: how many were predicted.
        bytes: of a plain text in UTF-8; 0 for anything else.
    """

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


Output = Answered | Ranked | Likelihood


@dataclass(frozen=True, slots=True)
class Measured:
    """One item, done.

    Attributes:
        item: what was asked.
        output: of the model.
        reference: of the one it is compared with; None without one.
        divergence: between the two, over the prompt with its first right answer; None without a reference.
    """

    item: Item
    output: Output
    reference: Output | None = None
    divergence: Divergence | None = None


@dataclass(frozen=True)
class _Forced:
    """A prompt whose tokens are all given, and which of them count: token ``i + 1`` where ``predicted[i]``."""

    prompt: Prompt
    predicted: Ints


def measure(
    subject: Subject,
    items: Sequence[Item],
    reference: Subject | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Iterator[Measured]:
    """Measure item after item; greedy, so the same every time. Nothing of an item stays in memory but its record.

    Args:
        subject: the model.
        items: what :func:`owl2.runtime.evaluation.read_items` returns.
        reference: a second model, of the same vocabulary.
        max_new_tokens: most tokens of an answer.

    Raises:
        DataError: before anything runs: items that do not fit the context; all are named.
        ReferenceModelError: the two models divide a prompt into different tokens.
    """
    raise_problems(subject.name, context_problems(subject, items))
    return (_measure(subject, item, reference, max_new_tokens) for item in items)


def context_problems(subject: Subject, items: Sequence[Item]) -> list[str]:
    """A sentence for each item that the context cannot hold together with its longest given answer."""
    problems = []
    rows = subject.config.rows_per_image - 1  # the placeholder's own id is one
    for item in items:
        if isinstance(item.task, Text):
            continue
        counts = [len(subject.model.tokenizer.encode_prompt(render(turns))) for turns in _all_forced(item)]
        longest = max(counts) + rows * len(item.images)
        if longest > subject.context:
            problems.append(f"line {item.line}: takes {longest} positions, the context holds {subject.context}")
    return problems


def _all_forced(item: Item) -> list[tuple[Message, ...]]:
    """Every conversation that is run with a given answer."""
    match item.task:
        case Choice(_, choices):
            return [messages(item.task, choice) for choice in choices]
        case _:
            return [messages(item.task, _right_answer(item))]


def _right_answer(item: Item) -> str:
    """The answer under which a prompt's likelihoods are compared: the most frequent one, the first of several."""
    match item.task:
        case Question(_, answers) | Caption(_, answers):
            return Counter(answers).most_common(1)[0][0]
        case Choice(_, choices, answer):
            return choices[answer]
        case _:
            return ""


def _measure(subject: Subject, item: Item, reference: Subject | None, max_new_tokens: int) -> Measured:
    images = [load_image(path) for path in item.images]
    models = [subject] if reference is None else [subject, reference]
    for model in models:
        model.cache.truncate(0)  # an item's figures must not depend on the items before it
    prepared = [model.open(images) for model in models]
    outputs: list[Output]
    apart: Divergence | None = None
    if isinstance(item.task, Text):
        outputs, apart = _likelihoods(models, [_windows(model, item.task.text) for model in models], item)
    elif isinstance(item.task, Conversation):
        outputs, apart = _likelihoods(models, [[_turns(m, item, p)] for m, p in zip(models, prepared)], item)
    else:
        if reference is not None:
            _, apart = _likelihoods(models, [[_turns(m, item, p)] for m, p in zip(models, prepared)], item)
        outputs = [_respond(model, item, given, max_new_tokens) for model, given in zip(models, prepared)]
    return Measured(item, outputs[0], outputs[1] if reference is not None else None, apart)


def _respond(model: Subject, item: Item, images: Sequence[PreparedImage], max_new_tokens: int) -> Output:
    prompt = model.encode(messages(item.task, None), images)
    if isinstance(item.task, Choice):
        return _rank(model, item.task, prompt, images)
    return Answered(*model.answer(prompt, max_new_tokens))


def _rank(model: Subject, task: Choice, prompt: Prompt, images: Sequence[PreparedImage]) -> Ranked:
    """Log-probability of each choice after the prompt, which runs once: a choice starts from its cached positions."""
    sums, counts = [], []
    for choice in task.choices:
        whole = model.encode(messages(task, choice), images)
        if whole.keys[-1] == model.config.decoder.eos_token_id:
            whole = Prompt(whole.keys[:-1], whole.images)
        start = _shared(prompt.keys, whole.keys)
        ids = _ids(whole.keys[start:])
        # The last token predicts nothing; the one before the choice predicts its first.
        asked = Prompt(whole.keys[:-1], whole.images)
        logprobs = [
            token_logprobs(logits, ids[at - start + 1 : at - start + 1 + len(logits)])
            for at, logits in model.logit_blocks(asked, start - 1)
        ]
        sums.append(math.fsum(np.concatenate(logprobs)))
        counts.append(len(ids))
    return Ranked(tuple(sums), tuple(counts))


def _likelihoods(
    models: Sequence[Subject], forced: Sequence[Sequence[_Forced]], item: Item
) -> tuple[list[Output], Divergence | None]:
    """Likelihood of the counted tokens under each model, and how far two models lie apart at all positions."""
    nats = [0.0] * len(models)
    apart = Divergence()
    for each in zip(*forced):
        _check_same(each, models, item)
        modality = modality_of(each[0].prompt)
        for blocks in zip(*(model.logit_blocks(one.prompt) for model, one in zip(models, each)), strict=True):
            at, made = blocks[0]
            rows = slice(at, at + len(made))
            for index, (_, logits) in enumerate(blocks):
                counted = np.flatnonzero(each[index].predicted[rows])
                ids = _ids([each[index].prompt.keys[at + row + 1] for row in counted])
                nats[index] -= math.fsum(token_logprobs(logits[counted], ids))
            if len(models) == 2:
                apart += divergence(blocks[1][1], made, modality[rows])
    tokens = [sum(int(one.predicted.sum()) for one in each) for each in forced]
    size = _bytes(item)
    return [Likelihood(n, t, size) for n, t in zip(nats, tokens)], apart if len(models) == 2 else None


def _check_same(forced: Sequence[_Forced], models: Sequence[Subject], item: Item) -> None:
    """Two models must divide a prompt alike, or their positions mean different things."""
    kinds = [[key if isinstance(key, int) else None for key in one.prompt.keys] for one in forced]
    if any(kind != kinds[0] for kind in kinds):
        raise ReferenceModelError(
            f"line {item.line}: {models[0].name} and {models[1].name} divide the prompt into different tokens; "
            "only models with the same tokenizer can be compared"
        )


def _windows(model: Subject, text: str) -> list[_Forced]:
    return [_Forced(prompt, _until(prompt, [(1, len(prompt.keys))])) for prompt in model.windows(text)]


def _turns(model: Subject, item: Item, images: Sequence[PreparedImage]) -> _Forced:
    """The item's conversation with its right answer; the assistant's turns count, their end of sequence too."""
    turns = messages(item.task, _right_answer(item))
    whole = model.encode(turns, images)
    spans = []
    for index, turn in enumerate(turns):
        if turn.role == "ASSISTANT" and turn.text:
            before = model.encode([*turns[:index], Message("ASSISTANT")], images)
            through = model.encode(turns[: index + 1], images)
            spans.append((_shared(before.keys, whole.keys), _shared(through.keys, whole.keys)))
    return _Forced(whole, _until(whole, spans))


def _until(prompt: Prompt, spans: Sequence[tuple[int, int]]) -> Ints:
    """1 at each position whose next one is a token of a span (first, end)."""
    predicted = np.zeros(len(prompt.keys), dtype=np.int64)
    for first, end in spans:
        for position in range(first, end):
            predicted[position - 1] = isinstance(prompt.keys[position], int)
    return predicted


def _shared(one: Sequence[Key], other: Sequence[Key]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _ids(keys: Sequence[Key]) -> Ints:
    return np.array([key for key in keys if isinstance(key, int)], dtype=np.int64)


def _bytes(item: Item) -> int:
    """Size of a plain text; turns of a conversation are not all of their prompt, and end with a special token."""
    return len(item.task.text.encode()) if isinstance(item.task, Text) else 0
