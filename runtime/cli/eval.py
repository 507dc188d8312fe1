"""``owl2 eval``: how good a bundle is on the user's own data, alone or beside what it came from."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from owl2.runtime.cli.console import STOPPED, duration, notice, notice_interrupt, reports_errors
from owl2.runtime.cli.options import (
    bundle_argument,
    context_option,
    device_option,
    kv_cache_option,
    memory_option,
    preprocess_option,
    threads_option,
)
from owl2.runtime.config import require
from owl2.runtime.evaluation.data import Item, read_items
from owl2.runtime.evaluation.divergence import Divergence
from owl2.runtime.evaluation.measure import MAX_NEW_TOKENS, Measured, measure
from owl2.runtime.evaluation.subject import Subject, is_bundle, open_reference
from owl2.runtime.evaluation.summary import Figure, Group, Summary, item_json, summarise
from owl2.runtime.owl import Owl2
from owl2.runtime.spec import KvType
from owl2.runtime.version import __version__

TITLES = {
    "vqa": "short answers, several people",
    "exact": "short answers",
    "choice": "multiple choice",
    "caption": "captions",
    "conversation": "assistant turns",
    "text": "text",
}
MEASURES = {
    "vqa_accuracy": "VQA accuracy",
    "exact_match_normalised": "exact match",
    "exact_match": "letter by letter",
    "accuracy": "accuracy",
    "accuracy_per_token": "per token",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "perplexity": "perplexity",
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
    "tokens": "tokens",
}
SHARES = ("vqa_accuracy", "exact_match_normalised", "exact_match", "accuracy", "accuracy_per_token", "rouge_l")

Cells = tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run yielded, complete or not.

    Attributes:
        measured: the items that were reached.
        items: all that were asked for.
        seconds: in the models, loading apart.
    """

    measured: Sequence[Measured]
    items: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether no Ctrl-C came before the end."""
        return len(self.measured) == self.items


@click.command("eval")
@bundle_argument
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSON lines; see above.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="A checkpoint (needs the export extra) or another bundle to compare with.",
)
@click.option("--limit", type=int, help="Most items, spread evenly over the file.")
@click.option("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, show_default=True, help="Most tokens of an answer.")
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@click.option("--items", "with_items", is_flag=True, help="With --json: every item's answer too.")
@preprocess_option
@threads_option
@context_option
@device_option
@kv_cache_option
@memory_option
@reports_errors
def eval_command(  # noqa: PLR0913 - one parameter per option
    *,
    bundle: Path,
    data: Path,
    against: Path | None,
    limit: int | None,
    max_new_tokens: int,
    as_json: bool,
    with_items: bool,
    preprocess: str | None,
    threads: int | None,
    context: int | None,
    device: str,
    kv_cache: KvType | None,
    check_memory: bool,
) -> None:
    """Measure a bundle on your own data, alone or against the checkpoint it came from.

    The data has one JSON object per line; its fields say what is measured. Images are named relative to the file.

    \b
      {"image": "a.jpg", "question": "…", "answers": ["red", …]}         VQA accuracy; exact match for one answer
      {"image": "a.jpg", "question": "…", "choices": ["…", …],
       "answer": 0}                                                      the likeliest choice
      {"image": "a.jpg", "captions": ["…", …]}                           ROUGE-L and CIDEr-D
      {"image": "a.jpg", "conversations": [{"from": "human", "value": …},
       {"from": "gpt", "value": …}]}                                     perplexity of the assistant's turns
      {"text": "…"}                                                      perplexity, bits per byte

    Optional: "kind" (results by kind too), "id". Questions are asked as they stand: for short answers end them as the
    model was trained, with "Answer the question using a single word or phrase."

    --against adds the other model's scores, how many answers changed, and the KL divergence and the agreement of the
    two models' next-token distributions, over the prompts with their right answers. Answers are greedy: the same
    every time. The other model has the K/V cache of its own activations, never int8. Ctrl-C ends the run and shows
    what was measured until then.

    \b
    Examples:
      owl2 eval bundle/ --data vqa.jsonl
      owl2 eval bundle/ --data talks.jsonl --against mplug-owl2-llama2-7b/ --limit 50
      owl2 eval int4/ --data vqa.jsonl --against int8/ --json --items > result.json
      owl2 eval int4/ --data talks.jsonl --kv-cache int8 --against int4/
    """
    require(max_new_tokens > 0, f"max_new_tokens {max_new_tokens} must be at least 1")
    require(as_json or not with_items, "--items writes into the JSON; give --json too")
    # Before the model, which may take long to load.
    items = read_items(data, limit)
    if against is not None:
        is_bundle(against)
    owl = Owl2.load(
        bundle,
        threads=threads,
        device=device,
        context=context,
        kv_cache=kv_cache,
        check_memory=check_memory,
    )
    subject = Subject.of(owl, str(bundle), preprocess)
    reference = None
    if against is not None:
        reference = open_reference(against, subject, threads=threads, device=device, check_memory=check_memory)
    outcome = _run(measure(subject, items, reference, max_new_tokens=max_new_tokens), items)
    summary = summarise(outcome.measured)
    if as_json:
        record = {
            "owl2": __version__,
            "bundle": str(bundle),
            "data": str(data),
            "against": str(against or "") or None,
            "kv_cache": owl.manifest.kv_type(kv_cache),
            "preprocess": preprocess or owl.config.preprocess.mode,
            "context": owl.context,
            "max_new_tokens": max_new_tokens,
            "device": device,
        }
        click.echo(json.dumps(record | _record(outcome, summary, with_items), indent=2))
    elif outcome.measured:
        click.echo(_table(outcome, summary, against))
    if not outcome.complete:
        notice(f"stopped after {len(outcome.measured)} of {outcome.items} items")
        sys.exit(STOPPED)


def _run(measuring: Iterator[Measured], items: Sequence[Item]) -> Outcome:
    """Measure item after item, with progress on a terminal; Ctrl-C ends it early."""
    measured = []
    began = time.perf_counter()
    try:
        with _progress(measuring, len(items)) as steps:
            for one in steps:
                measured.append(one)
    except KeyboardInterrupt:
        notice_interrupt("stopping")
    return Outcome(measured, len(items), time.perf_counter() - began)


@contextmanager
def _progress(measuring: Iterator[Measured], total: int) -> Iterator[Iterator[Measured]]:
    """A bar with the time left, on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield measuring
        return
    with click.progressbar(measuring, length=total, label="measuring", show_pos=True, file=sys.stderr) as bar:
        yield iter(bar)


def _record(outcome: Outcome, summary: Summary, with_items: bool) -> dict[str, Any]:
    record = {
        "complete": outcome.complete,
        "asked": outcome.items,
        "seconds": round(outcome.seconds, 3),
        **summary.to_json(),
    }
    return record | ({"predictions": [item_json(one) for one in outcome.measured]} if with_items else {})


def _table(outcome: Outcome, summary: Summary, against: Path | None) -> str:
    rows: list[Cells] = [("", "items", "bundle", "" if against is None else "reference")]
    for task in summary.tasks:
        rows.append((TITLES[task.task], str(task.whole.items), "", ""))
        rows += _score_rows(task.whole, "  ")
        for kind, group in task.kinds.items():
            rows += _kind_rows(kind, group)
        if task.whole.changes is not None:
            changes = task.whole.changes
            rows.append(
                ("  answers changed", "", str(changes.changed), f"{changes.better} better, {changes.worse} worse")
            )
    blocks = [_aligned(rows)]
    if summary.divergence is not None:
        blocks.append(f"against {against}\n" + _aligned(_divergence_rows(summary.divergence)))
    per_item = outcome.seconds / max(len(outcome.measured), 1)
    count = "1 item" if summary.items == 1 else f"{summary.items} items"
    blocks.append(f"{count} in {duration(outcome.seconds)}, {duration(per_item)} each; ± is the standard error")
    return "\n\n".join(blocks)


def _score_rows(group: Group, indent: str) -> list[Cells]:
    return [
        (indent + MEASURES[name], "", _shown(name, figure), _shown(name, group.reference.get(name)))
        for name, figure in group.scores.items()
    ]


def _kind_rows(kind: str, group: Group) -> list[Cells]:
    """The measure that counts; the others are in the JSON."""
    name, figure = next(iter(group.scores.items()))
    return [(f"    {kind}", str(group.items), _shown(name, figure), _shown(name, group.reference.get(name)))]


def _shown(name: str, figure: Figure | None) -> str:
    if figure is None:
        return ""
    error = figure.standard_error
    if name in SHARES:
        return f"{100 * figure.value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"
    return f"{figure.value:.4g}" + ("" if error is None else f" ± {error:.2f}")


def _divergence_rows(apart: Divergence) -> list[Cells]:
    kinds = (0, 1)
    return [
        ("", "text", "image"),
        ("  positions", *(str(int(apart.positions[k])) for k in kinds)),
        ("  KL (nats)", *(f"{apart.mean_kl(k):.3g}" for k in kinds)),
        ("  same best token", *(f"{apart.agreement(k):.1%}" for k in kinds)),
    ]


def _aligned(rows: Sequence[Cells]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join([f"{row[0]:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
