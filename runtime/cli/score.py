"""``owl2 score``: scores of images, one or a million."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from owl2.runtime.bundle import read_manifest
from owl2.runtime.cli.console import duration, load_progress, notice, notice_interrupt, reports_errors, say
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
    verify_option,
)
from owl2.runtime.cli.signals import stop_code
from owl2.runtime.cli.types import PATH, integer
from owl2.runtime.config import IMAGE_TOKEN, require
from owl2.runtime.engine import BackendName
from owl2.runtime.errors import ConfigError, Owl2Error
from owl2.runtime.harmless import harmless
from owl2.runtime.owl import Owl2
from owl2.runtime.preprocess import Orientation
from owl2.runtime.scoring.files import IMAGES, VIDEOS, find_files
from owl2.runtime.scoring.report import report_page
from owl2.runtime.scoring.results import ResultFile
from owl2.runtime.scoring.scale import PRESETS, make_scale, preset_for
from owl2.runtime.scoring.score import Score
from owl2.runtime.scoring.summary import Summary
from owl2.runtime.scoring.video import (
    MOST_FRAMES,
    PER_SECOND,
    WINDOW,
    VideoScore,
    check_video_settings,
    load_av,
    read_frames,
    score_video,
    scores_of,
)
from owl2.runtime.spec import KvType
from owl2.runtime.stored import write_whole

Outcome = tuple[Score, ...] | list[VideoScore] | Owl2Error


def _batch(_context: click.Context, _option: click.Parameter, text: str) -> int | None:
    return None if text == "auto" else integer(text)


@click.command()
@bundle_argument
@click.argument("paths", type=PATH, nargs=-1, required=True)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=("quality",),
    show_default=True,
    help="What to score: quality, aesthetics; repeatable, the work of the vision tower is shared.",
)
@click.option("--recursive", "-r", is_flag=True, help="Look for images in folders within folders, too.")
@click.option("--video", is_flag=True, help="Score videos; needs owl2[video].")
@click.option("--per-second", type=float, default=PER_SECOND, show_default=True, help="Frames of a video.")
@click.option("--window", type=integer, default=WINDOW, show_default=True, help="Frames that are scored together.")
@click.option("--max-frames", type=integer, default=MOST_FRAMES, show_default=True, help="Refuse longer videos.")
@click.option("--out", type=PATH, help="Write a table: .csv, .jsonl or .parquet, each row as soon as it is known.")
@click.option("--resume", is_flag=True, help="Go on with the table of a run that was stopped.")
@click.option("--retry", is_flag=True, help="With --resume: score again what could not be scored.")
@click.option("--overwrite", is_flag=True, help="Replace an older table.")
@click.option("--report", type=PATH, help="Write an HTML page: a histogram, the best and the worst images.")
@click.option("--json", "as_json", is_flag=True, help="Write each score as a line of JSON.")
@click.option(
    "--preset",
    show_default="that of the bundle, or q-align",
    metavar=f"[{'|'.join(PRESETS)}|FILE.json]",
    help="How the model is asked: the one that fits it.",
)
@click.option("--prompt", help="Ask this instead: raw, with <|image|> where the image goes.")
@click.option("--level", "levels", multiple=True, help="A word of your own, from the best to the worst; repeatable.")
@click.option("--weight", "weights", type=float, multiple=True, help="What each level is worth; repeatable.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Threads that read images.")
@click.option("--batch", default="auto", show_default=True, callback=_batch, help="Images that share a step.")
@preprocess_option
@orientation_option
@background_option
@threads_option
@context_option
@device_option
@kv_cache_option
@backend_option
@memory_option
@verify_option
@reports_errors
def score(  # noqa: PLR0913, PLR0917 - one parameter per option
    bundle: Path,
    paths: tuple[Path, ...],
    tasks: tuple[str, ...],
    recursive: bool,
    video: bool,
    per_second: float,
    window: int,
    max_frames: int,
    out: Path | None,
    resume: bool,
    retry: bool,
    overwrite: bool,
    report: Path | None,
    as_json: bool,
    preset: str | None,
    prompt: str | None,
    levels: tuple[str, ...],
    weights: tuple[float, ...],
    workers: int,
    batch: int | None,
    preprocess: str | None,
    orientation: Orientation,
    background: str,
    threads: int | None,
    context: int | None,
    device: str,
    kv_cache: KvType | None,
    backend: BackendName | None,
    check_memory: bool,
    verify: bool,
) -> None:
    """Score images as Q-Align, OneAlign and their relatives do: 1 (bad) to 5 (excellent).

    PATHS are images, and folders of images. The same image gets the same number, to the last bit, whatever is scored
    beside it. One that is broken is a row with its error; the exit code is 1 if none could be scored.

    With --video, PATHS are videos, and folders of videos. The score is that of the whole, or the mean of its windows
    where it does not fit the context; --json has the curve.

    \b
    Examples:
      owl2 score bundle/ cat.jpg dog.jpg
      owl2 score bundle/ photos/ -r --out scores.csv --report scores.html
      owl2 score bundle/ photos/ -r --out scores.csv --resume
      owl2 score bundle/ photos/ --task quality --task aesthetics --json
      owl2 score bundle/ cat.jpg --level sharp --level blurred --weight 1 --weight 0 \\
        --prompt "USER: <|image|>Is the image sharp or blurred? ASSISTANT: It is"
    """
    require(not (resume and overwrite), "--resume and --overwrite exclude each other")
    require(out is not None or not (resume or overwrite), "--resume and --overwrite are about a table; give --out")
    require(resume or not retry, "--retry goes with --resume")
    for path in (out, report):  # not after hours of work
        require(path is None or path.parent.is_dir(), f"the folder of {path} does not exist; make it first")
        require(path is None or not path.is_dir(), f"{path} is a folder; give the name of a file")
    require(report is None or out is None or report != out, f"--out and --report are the same file, {out}")
    if video:
        load_av()
        check_video_settings(per_second=per_second, window=window, most=max_frames)
    settings: dict[str, Any] = {"video": video, "prompt": prompt, "preprocess": preprocess}
    settings |= {"levels": list(levels) or None, "weights": list(weights) or None}
    chosen = preset_for(preset, read_manifest(bundle).preset)
    for task in tasks:  # before the model, which may take long to load
        scale = make_scale(chosen, task, **settings)
        require(
            scale.prompt.count(IMAGE_TOKEN) == 1,
            f"the prompt of preset {chosen.name} compares several images, which this command does not; "
            "docs/scoring.md shows how to compare from Python",
        )
    images = find_files(paths, VIDEOS if video else IMAGES, recursive=recursive)
    reading = image_reading(orientation, background)
    with load_progress() as progress:
        owl = Owl2.load(
            bundle,
            device=device,
            threads=threads,
            context=context,
            kv_cache=kv_cache,
            backend=backend,
            check_memory=check_memory,
            verify=verify,
            progress=progress,
        )
    with owl, ExitStack() as closing:
        scorer = owl.scorer(list(tasks), preset=preset, **settings)
        table, todo, summary = None, images, Summary()
        if out is not None:
            transfer = owl.model.engine.kv_transfer
            how = {
                "reading": asdict(reading),
                "video": [per_second, window, scorer.frames_that_fit] if video else None,
                "engine": [type(owl.model.engine).__name__, None if transfer is None else transfer.form],
            }
            table = ResultFile.open(
                out,
                scorer.scales,
                owl.model.fingerprint,
                how,
                summary,
                resume=resume,
                retry=retry,
                overwrite=overwrite,
            )
            closing.callback(table.close)
            todo = [image for image in images if not table.has(image)]

        def read_video(path: str) -> list[VideoScore]:
            read = read_frames(path, per_second, max_frames, orientation=orientation)
            frames = (scorer.prepare(frame, reading) for frame in read)
            return score_video(scorer, frames, path, per_second=per_second, window=window)

        outcomes: Iterable[tuple[str, Outcome]]
        if video:
            outcomes = ((path, _or_error(read_video, path)) for path in todo)
        else:
            outcomes = scorer.stream(
                todo, lambda path: scorer.prepare(Path(path), reading), batch=batch, workers=workers
            )
        began = time.perf_counter()
        with _progress(len(images), len(images) - len(todo)) as advance:
            _collect(outcomes, summary, table, advance, tell=table is None or as_json, as_json=as_json)
        if table is not None:
            table.finish()
    count = len(todo)
    if report is not None:
        write_whole(report, [report_page(f"Scores of {len(images):,} images", summary)])
    _tell(summary, count, time.perf_counter() - began, [str(path) for path in (out, report) if path is not None])
    if not summary.tasks:
        sys.exit(1)


def _collect(
    outcomes: Iterable[tuple[str, Outcome]],
    summary: Summary,
    table: ResultFile | None,
    advance: Callable[[], None],
    *,
    tell: bool,
    as_json: bool,
) -> None:
    """Write and count what comes; ends the process where a signal does."""
    count = 0
    try:
        for image, outcome in outcomes:
            if table is not None:
                table.add(image, outcome if isinstance(outcome, Owl2Error) else scores_of(outcome))
            if isinstance(outcome, Owl2Error):
                summary.add(image, str(outcome), ())
            else:
                summary.add(image, None, ((one.task, one.value) for one in outcome))
            if tell:
                _say(image, outcome, as_json=as_json)
            advance()
            count += 1
    except KeyboardInterrupt:
        notice_interrupt(f"stopped after {count}{'' if table is None else '; --resume goes on'}")
        sys.exit(stop_code())


def _or_error(score: Callable[[str], list[VideoScore]], path: str) -> Outcome:
    try:
        return score(path)
    except ConfigError:  # a setting that spoils every video
        raise
    except Owl2Error as error:
        return error


def _say(image: str, outcome: Outcome, *, as_json: bool) -> None:
    if isinstance(outcome, Owl2Error):
        if as_json:
            say(json.dumps({"image": image, "error": str(outcome)}))
        else:
            notice(f"{harmless(image)}: {outcome}")
        return
    for one in outcome:
        named = f"  {one.task}" if len(outcome) > 1 else ""
        say(json.dumps(one.to_json()) if as_json else f"{one.value:.4f}{named}  {image}")


def _tell(summary: Summary, count: int, seconds: float, written: Sequence[str]) -> None:
    means = ", ".join(f"{task} {statistics.fmean(found.values):.3f}" for task, found in summary.tasks.items())
    broken = f", {summary.broken} could not be scored" if summary.broken else ""
    files = f"; {', '.join(written)}" if written else ""
    rate = f", {count / seconds:.2f} a second" if count > 1 else ""
    mean = f"; mean {means}" if means else ""
    plural = "s" * (count != 1)
    notice(f"{count} file{plural} in {duration(seconds)}{rate}{broken}{mean}{files}")


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A bar on stderr, if that is a terminal and there is more than one file."""
    if not sys.stderr.isatty() or total < 2:
        yield lambda: None
        return
    began, count = time.monotonic(), 0

    def rate(_item: object) -> str:
        return f"{count / (time.monotonic() - began):.2f} a second" if count else ""

    with click.progressbar(length=total, label="scoring", show_pos=True, item_show_func=rate, file=sys.stderr) as bar:
        bar.update(done)

        def advance() -> None:
            nonlocal count
            count += 1
            bar.update(1, bar.pos)

        yield advance
