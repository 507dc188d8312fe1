"""``owl2 eval``: how good a bundle is on the user's own data, by itself or next to the model it came from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from owl2.runtime.backends.choose import resolve_options
from owl2.runtime.bundle import read_manifest
from owl2.runtime.cli.console import duration, load_progress, notice, notice_interrupt, reports_errors, say, say_json
from owl2.runtime.cli.options import (
    backend_option,
    background_option,
    bundle_argument,
    context_option,
    device_option,
    image_reading,
    kv_cache_option,
    memory_option,
    orientation_option,
    preprocess_option,
    threads_option,
)
from owl2.runtime.cli.signals import stop_code
from owl2.runtime.cli.table import section, table
from owl2.runtime.cli.types import PATH, integer
from owl2.runtime.config import require
from owl2.runtime.engine import BackendName, EngineOptions
from owl2.runtime.evaluation.divergence import IMAGE, TEXT
from owl2.runtime.evaluation.evaluate import (
    MAX_NEW_TOKENS,
    Evaluation,
    EvaluationProgress,
    OnEvaluationProgress,
    evaluate,
)
from owl2.runtime.evaluation.summary import Figure
from owl2.runtime.foreign import cut
from owl2.runtime.harmless import harmless
from owl2.runtime.placement import Placement
from owl2.runtime.preprocess import Orientation
from owl2.runtime.spec import KvType
from owl2.runtime.verification import LoadProgress
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


@click.command("eval")
@bundle_argument
@click.option("--data", type=PATH, required=True, help="JSON lines or one JSON array; see above.")
@click.option(
    "--against",
    type=PATH,
    help="A checkpoint (needs the export extra) or another bundle to compare with.",
)
@click.option("--limit", type=integer, help="Measure at most this many items, spread evenly over the file.")
@click.option(
    "--max-new-tokens", type=integer, default=MAX_NEW_TOKENS, show_default=True, help="Most tokens of an answer."
)
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@click.option("--items", "with_items", is_flag=True, help="With --json: the outputs of every item, too.")
@preprocess_option
@orientation_option
@background_option
@threads_option
@context_option
@device_option
@kv_cache_option
@backend_option
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
    orientation: Orientation,
    background: str,
    threads: int | None,
    context: int | None,
    device: str,
    kv_cache: KvType | None,
    backend: BackendName | None,
    check_memory: bool,
) -> None:
    """Measure a bundle on your own data, by itself or against the checkpoint it came from.

    The data has one JSON object per line, or all of them in one JSON array; their fields say what is measured. Images
    are named relative to the file. <|image|>, or LLaVA's <image>, says where an image goes; else it goes first.

    \b
      {"image": "a.jpg", "question": "…", "answers": ["red", …]}         VQA accuracy; exact match for one answer
      {"image": "a.jpg", "question": "…", "choices": ["…", …],
       "answer": 0}                                                      the most likely choice
      {"image": "a.jpg", "captions": ["…", …]}                           ROUGE-L and CIDEr-D
      {"image": "a.jpg", "conversations": [{"from": "human", "value": …},
       {"from": "gpt", "value": …}]}                                     perplexity of the assistant's turns
      {"text": "…"}                                                      perplexity, bits per byte

    Optional: "category" (results by category, too), "id". Questions are asked as they are: for short answers end them
    as the model was trained, with "Answer the question using a single word or phrase."

    --against adds the other model's scores, the number of answers that changed, and the KL divergence and agreement of
    the two models' next-token distributions, over the prompts with their expected answers. Answers are greedy, so
    results are reproducible. The other model has the K/V cache of its own activations, never int8. Ctrl-C ends the run
    and shows what was measured until then; so does an image that disappears while it runs.

    \b
    Examples:
      owl2 eval bundle/ --data vqa.jsonl
      owl2 eval bundle/ --data talks.jsonl --against mplug-owl2-llama2-7b/ --limit 50
      owl2 eval int4/ --data vqa.jsonl --against int8/ --json --items > result.json
      owl2 eval int4/ --data talks.jsonl --kv-cache int8 --against int4/
    """
    require(as_json or not with_items, "--items adds to the JSON; give --json as well")
    with _progress() as progress:
        evaluation = evaluate(
            bundle,
            data,
            against=against,
            limit=limit,
            max_new_tokens=max_new_tokens,
            device=device,
            threads=threads,
            context=context,
            kv_cache=kv_cache,
            backend=backend,
            preprocess=preprocess,
            reading=image_reading(orientation, background),
            check_memory=check_memory,
            progress=progress,
        )
    if as_json:
        options = EngineOptions(Placement.parse(device), kv_cache=kv_cache, backend=backend)
        used = resolve_options(read_manifest(bundle), options)
        settings = {
            "owl2": __version__,
            "bundle": str(bundle),
            "data": str(data),
            "against": None if against is None else str(against),
            "kv_cache": used.kv_cache,
            "backend": used.backend,
            "max_new_tokens": max_new_tokens,
            "device": device,
        }
        say_json(settings | evaluation.to_json(items=with_items))
    elif evaluation.results:
        say(_table(evaluation, against))
    done = f"{len(evaluation.results)} of {evaluation.total} items"
    if evaluation.failure is not None:
        notice(f"error: {evaluation.failure}; the results are those of {done}")
        sys.exit(1)
    if not evaluation.complete:
        notice_interrupt(f"stopped after {done}")
        sys.exit(stop_code())


@contextmanager
def _progress() -> Iterator[OnEvaluationProgress | None]:
    """Bars on stderr, if that is a terminal: while files are hashed, then while items are measured."""
    with load_progress() as show_load, ExitStack() as bars:
        if show_load is None:
            yield None
            return
        bar: Any = None

        def show(progress: LoadProgress | EvaluationProgress) -> None:
            nonlocal bar
            if isinstance(progress, LoadProgress):
                show_load(progress)
                return
            if bar is None:
                length = progress.total
                bar = bars.enter_context(
                    click.progressbar(length=length, label="measuring", show_pos=True, file=sys.stderr)
                )
            bar.update(progress.done - bar.pos)

        yield show


def _table(evaluation: Evaluation, against: Path | None) -> str:
    summary = evaluation.summary
    rows: list[tuple[str, ...]] = [("", "items", "bundle", "" if against is None else "reference")]
    for task in summary.tasks:
        rows.append((TITLES[task.task], str(task.whole.items), "", ""))
        rows += [
            (f"  {MEASURES[name]}", "", _shown(name, figure), _shown(name, task.whole.reference.get(name)))
            for name, figure in task.whole.scores.items()
        ]
        for category, group in task.categories.items():
            name, figure = next(iter(group.scores.items()))  # the main measure; the others are in the JSON
            shown = _shown(name, figure), _shown(name, group.reference.get(name))
            rows.append((f"    {cut(harmless(category))}", str(group.items), *shown))
        if (changes := task.whole.changes) is not None:
            better_or_worse = f"{changes.better} better, {changes.worse} worse"
            rows.append(("  answers changed", "", str(changes.changed), better_or_worse))
    blocks = [table(rows, "<>>>")]
    if (divergence := summary.divergence) is not None:
        positions, kl, same = divergence.positions, divergence.mean_kl, divergence.agreement
        rows = [
            ("", "text", "image"),
            ("positions", *(str(int(positions[modality])) for modality in (TEXT, IMAGE))),
            ("KL (nats)", *(f"{kl(modality):.3g}" for modality in (TEXT, IMAGE))),
            ("same best token", *(f"{same(modality):.1%}" for modality in (TEXT, IMAGE))),
        ]
        blocks.append(section(f"against {against}", table(rows, "<>>")))
    per_item = evaluation.seconds / max(summary.items, 1)
    count = "1 item" if summary.items == 1 else f"{summary.items} items"
    blocks.append(f"{count} in {duration(evaluation.seconds)}, {duration(per_item)} each; ± is the standard error")
    return "\n\n".join(blocks)


def _shown(name: str, figure: Figure | None) -> str:
    if figure is None:
        return ""
    error = figure.standard_error
    if name in SHARES:
        return f"{100 * figure.value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"
    return f"{figure.value:.4g}" + ("" if error is None else f" ± {error:.2f}")
