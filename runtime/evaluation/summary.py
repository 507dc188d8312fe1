"""From measured items to figures: scores per task and kind, and how two models compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from owl2.runtime.evaluation.captions import cider_d, rouge_l
from owl2.runtime.evaluation.data import Caption, Choice, Conversation, Item, Question, Task
from owl2.runtime.evaluation.divergence import Divergence
from owl2.runtime.evaluation.measure import Answered, Likelihood, Measured, Output, Ranked
from owl2.runtime.evaluation.vqa import exact_match, vqa_accuracy

TEXT, IMAGE = 0, 1


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
    """How a model's answers differ from those of the one it is compared with.

    Attributes:
        changed: answers that are not the same.
        better, worse: of these, how many score higher or lower.
    """

    changed: int
    better: int
    worse: int


@dataclass(frozen=True, slots=True)
class Group:
    """Items that are measured alike.

    Attributes:
        items: how many.
        scores: of the model, by name of the measure; the first is the one that counts.
        reference: the same of the second model; empty without one.
        changes: None without a second model, and where nothing is answered.
    """

    items: int
    scores: Figures
    reference: Figures
    changes: Changes | None


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """A task over the whole data, and by kind where kinds are given."""

    task: str
    whole: Group
    kinds: Mapping[str, Group]


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything measured.

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
                task.task: _group_json(task.whole) | {"kinds": {k: _group_json(g) for k, g in task.kinds.items()}}
                for task in self.tasks
            },
            "divergence": None if self.divergence is None else divergence_json(self.divergence),
        }


def summarise(measured: Sequence[Measured]) -> Summary:
    """Score what was measured; works on a part of the data as well."""
    names = [task_name(one.item.task) for one in measured]
    tasks = []
    for name in dict.fromkeys(names):
        chosen = [one for one, other in zip(measured, names) if other == name]
        made = _scores(name, [one.item for one in chosen], [one.output for one in chosen])
        references = [one.reference for one in chosen if one.reference is not None]
        theirs = _scores(name, [one.item for one in chosen], references) if references else []
        kinds = [one.item.kind or "other" for one in chosen]
        places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
        whole = _group(chosen, made, theirs, range(len(chosen)))
        by_kind = {kind: _group(chosen, made, theirs, where) for kind, where in places.items()}
        tasks.append(TaskSummary(name, whole, by_kind if any(one.item.kind for one in chosen) else {}))
    apart = [one.divergence for one in measured if one.divergence is not None]
    return Summary(len(measured), tuple(tasks), reduce(add, apart) if apart else None)


def task_name(task: Task) -> str:
    """How a task is called in results; one given answer is matched, several make VQA accuracy."""
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


def item_json(measured: Measured) -> dict[str, Any]:
    """One item with what was answered, in plain dictionaries."""
    item = measured.item
    record: dict[str, Any] = {"line": item.line, "id": item.id, "kind": item.kind, "task": task_name(item.task)}
    record["output"] = _output_json(item, measured.output)
    if measured.reference is not None:
        record["reference"] = _output_json(item, measured.reference)
    if measured.divergence is not None:
        record["divergence"] = divergence_json(measured.divergence)
    return record


def divergence_json(apart: Divergence) -> dict[str, Any]:
    """Means by modality, nats and shares."""
    kinds = {
        name: {"positions": int(apart.positions[k]), "kl": apart.mean_kl(k), "top1_agreement": apart.agreement(k)}
        for name, k in (("text", TEXT), ("image", IMAGE))
    }
    return {**kinds, "mean_abs_logit_difference": apart.mean_difference}


Score = dict[str, float]
"""Measures of one item, by name."""


def _scores(name: str, items: Sequence[Item], outputs: Sequence[Output]) -> list[Score]:
    """The measures of each item; none where only sums over items mean something."""
    if name == "caption":
        texts = [output.text for output in outputs if isinstance(output, Answered)]
        wanted = [item.task.captions for item in items if isinstance(item.task, Caption)]
        return [
            {"rouge_l": rouge_l(text, captions), "cider_d": consensus}
            for text, captions, consensus in zip(texts, wanted, cider_d(texts, wanted))
        ]
    return [_score(item.task, output) for item, output in zip(items, outputs)]


def _score(task: Task, output: Output) -> Score:
    match task, output:
        case Question(_, answers), Answered(text):
            if len(answers) > 1:
                return {"vqa_accuracy": vqa_accuracy(text, answers)}
            strict, normalised = exact_match(text, answers[0])
            return {"exact_match_normalised": normalised, "exact_match": strict}
        case Choice(_, _, answer), Ranked():
            return {
                "accuracy": float(output.best == answer),
                "accuracy_per_token": float(output.best_per_token == answer),
            }
        case _:
            return {}


def _group(chosen: Sequence[Measured], made: Sequence[Score], theirs: Sequence[Score], where: Sequence[int]) -> Group:
    mine = _figures([made[i] for i in where], [chosen[i].output for i in where])
    if not theirs:
        return Group(len(where), mine, {}, None)
    references = [reference for i in where if (reference := chosen[i].reference) is not None]
    changes = _changes(chosen, made, theirs, where) if made[where[0]] else None
    return Group(len(where), mine, _figures([theirs[i] for i in where], references), changes)


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


def _changes(
    chosen: Sequence[Measured], made: Sequence[Score], theirs: Sequence[Score], where: Sequence[int]
) -> Changes:
    primary = next(iter(made[where[0]]))
    changed = [i for i in where if _said(chosen[i].output) != _said(chosen[i].reference)]
    return Changes(
        len(changed),
        sum(made[i][primary] > theirs[i][primary] for i in changed),
        sum(made[i][primary] < theirs[i][primary] for i in changed),
    )


def _said(output: Output | None) -> object:
    match output:
        case Answered(text):
            return text
        case Ranked():
            return output.best
        case _:
            return None


def _output_json(item: Item, output: Output) -> dict[str, Any]:
    record = asdict(output)
    if isinstance(output, Ranked):
        record |= {"best": output.best, "best_per_token": output.best_per_token}
    return record | _score(item.task, output)


def _group_json(group: Group) -> dict[str, Any]:
    def figures(given: Figures) -> dict[str, Any]:
        return {name: asdict(figure) for name, figure in given.items()}

    record: dict[str, Any] = {"items": group.items, "scores": figures(group.scores)}
    if group.reference:
        record["reference"] = figures(group.reference)
    if group.changes is not None:
        record["changes"] = asdict(group.changes)
    return record
