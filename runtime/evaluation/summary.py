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
from owl2.runtime.evaluation.measure import Generation, ItemResult, Likelihood, Output
from owl2.runtime.evaluation.vqa import exact_match, vqa_accuracy
from owl2.runtime.likelihood import ChoiceLikelihoods

Score = Mapping[str, float]
"""Measures of one item, by name; empty where only sums over items mean something."""

_Scored = tuple[ItemResult, Score, Score | None]
"""A result, and the scores of the model and of its reference."""


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
    """Number of answers that are not the reference's, and of those among them that score better or worse."""

    changed: int
    better: int
    worse: int


@dataclass(frozen=True, slots=True)
class Group:
    """Items that are scored alike.

    Attributes:
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
    """Results of one task, named by :func:`task_name`: of all its items, and by category where an item has one."""

    task: str
    whole: Group
    categories: Mapping[str, Group]


@dataclass(frozen=True, slots=True)
class Summary:
    """Results of all items, tasks in the order of the data; the divergence from the reference is None without one."""

    items: int
    tasks: tuple[TaskSummary, ...]
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        return {
            "items": self.items,
            "tasks": {
                task.task: _group_json(task.whole)
                | {"categories": {name: _group_json(group) for name, group in task.categories.items()}}
                for task in self.tasks
            },
            "divergence": None if self.divergence is None else divergence_json(self.divergence),
        }


def summarise(results: Sequence[ItemResult]) -> Summary:
    """Score results, of all items or of those measured so far."""
    tasks = []
    for name in dict.fromkeys(task_name(result.item.task) for result in results):
        chosen = [result for result in results if task_name(result.item.task) == name]
        items = [result.item for result in chosen]
        references = [result.reference for result in chosen if result.reference is not None]
        scores = _scores(name, items, [result.output for result in chosen])
        reference_scores = _scores(name, items, references) if references else [None] * len(chosen)
        scored = list(zip(chosen, scores, reference_scores))
        categories: dict[str, list[_Scored]] = {}
        if any(item.category for item in items):
            for entry, item in zip(scored, items):
                categories.setdefault(item.category or "other", []).append(entry)
        groups = {category: _group(entries) for category, entries in categories.items()}
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
    item = result.item
    record: dict[str, Any] = {"line": item.line, "id": item.id, "category": item.category, "task": task_name(item.task)}
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


def _group(scored: Sequence[_Scored]) -> Group:
    scores = [score for _, score, _ in scored]
    references = [reference for _, _, reference in scored if reference is not None]
    figures = _figures(scores, [result.output for result, _, _ in scored])
    if not references:
        return Group(len(scored), figures, {}, None)
    changes = None
    if scores[0]:
        main = next(iter(scores[0]))
        pairs = [
            (score[main], reference[main])
            for (result, score, _), reference in zip(scored, references)
            if _answer(result.output) != _answer(result.reference)
        ]
        better, worse = sum(ours > theirs for ours, theirs in pairs), sum(ours < theirs for ours, theirs in pairs)
        changes = Changes(len(pairs), better, worse)
    outputs = [result.reference for result, _, _ in scored if result.reference is not None]
    return Group(len(scored), figures, _figures(references, outputs), changes)


def _figures(scores: Sequence[Score], outputs: Sequence[Output]) -> Figures:
    likelihoods = [output for output in outputs if isinstance(output, Likelihood)]
    if likelihoods:
        total = reduce(add, likelihoods)
        mean = total.nats / max(total.tokens, 1)
        figures = {"perplexity": Figure(math.exp(min(mean, 700.0))), "nats_per_token": Figure(mean)}
        if total.bytes:
            figures["bits_per_byte"] = Figure(total.nats / math.log(2) / total.bytes)
        return figures | {"tokens": Figure(total.tokens)}
    figures, count = {}, len(scores)
    for name in scores[0]:
        values = [score[name] for score in scores]
        mean = math.fsum(values) / count
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / count)
        figures[name] = Figure(mean, deviation / math.sqrt(count) if count > 1 else None)
    return figures


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
