"""From the results of items to figures: scores by task and category, and how two models compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from owl2.runtime.evaluation.captions import cider_d, rouge_l
from owl2.runtime.evaluation.data import Caption, Choice, Conversation, Item, Question, Task
from owl2.runtime.evaluation.divergence import IMAGE, TEXT, Divergence
from owl2.runtime.evaluation.measure import ChoiceLikelihoods, Generation, ItemResult, Likelihood, Output
from owl2.runtime.evaluation.vqa import exact_match, vqa_accuracy

Score = Mapping[str, float]
"""Measures of one item, by name; empty where only sums over items mean something."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and, where it is a mean over items, its standard error.

    The error of a mean of n scores is their standard deviation over √n, for 0/1 scores the binomial √(p(1-p)/n).
    """

    value: float
    standard_error: float | None = None


Figures = Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Changes:
    """Differences between the answers of a model and those of its reference.

    Attributes:
        changed: answers that are not the same.
        better, worse: of these, how many score higher or lower.
    """

    changed: int
    better: int
    worse: int


@dataclass(frozen=True, slots=True)
class Group:
    """Items that are scored alike.

    Attributes:
        items: how many.
        scores: of the model, by name of the measure; the first is the main one.
        reference: the same of the reference; empty without one.
        changes: None without a reference, and for tasks without answers.
    """

    items: int
    scores: Figures
    reference: Figures
    changes: Changes | None


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """Results of one task.

    Attributes:
        task: its name, see :func:`task_name`.
        whole: all its items.
        categories: the same by category; empty where no item has one.
    """

    task: str
    whole: Group
    categories: Mapping[str, Group]


@dataclass(frozen=True, slots=True)
class Summary:
    """Results of all items.

    Attributes:
        items: how many.
        tasks: in the order of the data.
        divergence: from the reference; None without one.
    """

    items: int
    tasks: tuple[TaskSummary, ...]
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return {
            "items": self.items,
            "tasks": {
                task.task: _group_json(task.whole)
                | {"kinds": {name: _group_json(group) for name, group in task.categories.items()}}
                for task in self.tasks
            },
            "divergence": None if self.divergence is None else divergence_json(self.divergence),
        }


@dataclass(frozen=True)
class _ScoredItem:
    result: ItemResult
    score: Score
    reference: Score | None

    @property
    def category(self) -> str:
        return self.result.item.category or "other"


def summarise(results: Sequence[ItemResult]) -> Summary:
    """Score results; part of the data will do."""
    tasks = []
    for name in dict.fromkeys(task_name(result.item.task) for result in results):
        scored = _scored(name, [result for result in results if task_name(result.item.task) == name])
        categories = dict.fromkeys(entry.category for entry in scored)
        if not any(entry.result.item.category for entry in scored):
            categories = {}
        groups = {key: _group([entry for entry in scored if entry.category == key]) for key in categories}
        tasks.append(TaskSummary(name, _group(scored), groups))
    divergences = [result.divergence for result in results if result.divergence is not None]
    return Summary(len(results), tuple(tasks), reduce(add, divergences) if divergences else None)


def task_name(task: Task) -> str:
    """Name of a task in results; a single given answer is matched, several make VQA accuracy."""
    match task:
        case Question(_, answers):
            return "vqa" if len(answers) > 1 else "exact"
        case Choice():
            return "choice"
        case Caption():
            return "caption"
        case Conversation():
            return "conversation"
        case _:
            return "text"


def item_json(result: ItemResult) -> dict[str, Any]:
    """One item with its outputs, in plain dictionaries."""
    item = result.item
    record: dict[str, Any] = {"line": item.line, "id": item.id, "kind": item.category, "task": task_name(item.task)}
    record["output"] = _output_json(item.task, result.output)
    if result.reference is not None:
        record["reference"] = _output_json(item.task, result.reference)
    if result.divergence is not None:
        record["divergence"] = divergence_json(result.divergence)
    return record


def divergence_json(divergence: Divergence) -> dict[str, Any]:
    """Means by modality, nats and shares."""
    modalities = {
        name: {
            "positions": int(divergence.positions[modality]),
            "kl": divergence.mean_kl(modality),
            "top1_agreement": divergence.agreement(modality),
        }
        for name, modality in (("text", TEXT), ("image", IMAGE))
    }
    return {**modalities, "mean_abs_logit_difference": divergence.mean_difference}


def _scored(name: str, results: Sequence[ItemResult]) -> list[_ScoredItem]:
    items = [result.item for result in results]
    scores = _scores(name, items, [result.output for result in results])
    references = [result.reference for result in results if result.reference is not None]
    reference_scores = _scores(name, items, references) if references else [None] * len(results)
    return [_ScoredItem(*entry) for entry in zip(results, scores, reference_scores)]


def _scores(name: str, items: Sequence[Item], outputs: Sequence[Output]) -> Sequence[Score]:
    """The measures of each item; those of captions depend on all of them."""
    if name != "caption":
        return [_score(item.task, output) for item, output in zip(items, outputs)]
    texts = [output.text for output in outputs if isinstance(output, Generation)]
    references = [item.task.captions for item in items if isinstance(item.task, Caption)]
    return [
        {"rouge_l": rouge_l(text, captions), "cider_d": consensus}
        for text, captions, consensus in zip(texts, references, cider_d(texts, references))
    ]


def _score(task: Task, output: Output) -> Score:
    match task, output:
        case Question(_, answers), Generation(text):
            if len(answers) > 1:
                return {"vqa_accuracy": vqa_accuracy(text, answers)}
            strict, normalised = exact_match(text, answers[0])
            return {"exact_match_normalised": normalised, "exact_match": strict}
        case Choice(_, _, answer), ChoiceLikelihoods():
            return {
                "accuracy": float(output.best == answer),
                "accuracy_per_token": float(output.best_per_token == answer),
            }
        case _:
            return {}


def _group(scored: Sequence[_ScoredItem]) -> Group:
    scores = _figures([entry.score for entry in scored], [entry.result.output for entry in scored])
    references = [entry.reference for entry in scored if entry.reference is not None]
    if not references:
        return Group(len(scored), scores, {}, None)
    outputs = [entry.result.reference for entry in scored if entry.result.reference is not None]
    changes = _changes(scored, references) if scored[0].score else None
    return Group(len(scored), scores, _figures(references, outputs), changes)


def _figures(scores: Sequence[Score], outputs: Sequence[Output]) -> Figures:
    likelihoods = [output for output in outputs if isinstance(output, Likelihood)]
    if likelihoods:
        return _likelihood_figures(reduce(add, likelihoods))
    return {name: _mean([score[name] for score in scores]) for name in scores[0]}


def _mean(values: Sequence[float]) -> Figure:
    count = len(values)
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / count)
    return Figure(mean, deviation / math.sqrt(count) if count > 1 else None)


def _likelihood_figures(total: Likelihood) -> Figures:
    mean = total.nats / max(total.tokens, 1)
    figures = {"perplexity": Figure(math.exp(min(mean, 700.0))), "nats_per_token": Figure(mean)}
    if total.bytes:
        figures["bits_per_byte"] = Figure(total.nats / math.log(2) / total.bytes)
    return figures | {"tokens": Figure(total.tokens)}


def _changes(scored: Sequence[_ScoredItem], references: Sequence[Score]) -> Changes:
    main = next(iter(scored[0].score))
    pairs = [
        (entry.score[main], reference[main])
        for entry, reference in zip(scored, references)
        if _answer(entry.result.output) != _answer(entry.result.reference)
    ]
    return Changes(
        len(pairs), sum(ours > theirs for ours, theirs in pairs), sum(ours < theirs for ours, theirs in pairs)
    )


def _answer(output: Output | None) -> object:
    match output:
        case Generation(text):
            return text
        case ChoiceLikelihoods():
            return output.best
        case _:
            return None


def _output_json(task: Task, output: Output) -> dict[str, Any]:
    record = asdict(output)
    if isinstance(output, ChoiceLikelihoods):
        record |= {"best": output.best, "best_per_token": output.best_per_token}
    return record | dict(_score(task, output))


def _group_json(group: Group) -> dict[str, Any]:
    def figures(given: Figures) -> dict[str, Any]:
        return {name: asdict(figure) for name, figure in given.items()}

    record: dict[str, Any] = {"items": group.items, "scores": figures(group.scores)}
    if group.reference:
        record["reference"] = figures(group.reference)
    if group.changes is not None:
        record["changes"] = asdict(group.changes)
    return record
