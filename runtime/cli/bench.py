"""``owl2 bench``: speed and memory of a bundle on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from owl2.runtime.bench.bench import ROUNDS, BenchProgress, OnBenchProgress, bench
from owl2.runtime.bench.plot import check_plot, plot
from owl2.runtime.bench.result import BenchResult, Memory, Spread
from owl2.runtime.bench.shapes import SHAPES, shape_bundle
from owl2.runtime.cli.console import duration, load_progress, notice, reports_errors, say, say_json, size
from owl2.runtime.cli.options import backend_option, kv_cache_option, threads_option
from owl2.runtime.cli.table import section, table
from owl2.runtime.cli.types import PATH, integer
from owl2.runtime.config import require
from owl2.runtime.engine import BackendName
from owl2.runtime.owl import Owl2
from owl2.runtime.scoring.speed import ScoreSpeed, measure_speed
from owl2.runtime.spec import KvType


@click.command("bench")
@click.argument("bundle", type=PATH, required=False)
@click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    help="Instead of a bundle: random weights of these shapes, made once. Needs owl2[export]; 7b takes 5 GB of disk.",
)
@click.option("--scratch", type=PATH, show_default="the user's cache folder", help="Where --shape keeps its weights.")
@click.option("--rounds", type=integer, default=ROUNDS, show_default=True, help="Measurements of everything.")
@threads_option
@kv_cache_option
@backend_option
@click.option("--score", "scoring", is_flag=True, help="Measure scores of images instead, by stage and batch.")
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@click.option("--plot", "picture", type=PATH, help="Also draw speed and memory against context. Needs owl2[plot].")
@reports_errors
def bench_command(  # noqa: PLR0913 - one parameter per option
    *,
    bundle: Path | None,
    shape: str | None,
    scratch: Path | None,
    rounds: int,
    threads: int | None,
    kv_cache: KvType | None,
    backend: BackendName | None,
    scoring: bool,
    as_json: bool,
    picture: Path | None,
) -> None:
    """Measure speed and memory of a bundle on the CPU of this machine.

    Prompts of 32, 128 and 512 random tokens; decoding after 128, 1024 and 2048 positions, as far as the model allows;
    an image and two questions; loads in new processes. Times are medians with quartiles, after a round that does not
    count. What the machine can do at most (bandwidth of its memory, int8 arithmetic) is measured in the same run with
    the same threads, and shares of it are given. Close other programs first.

    \b
    Examples:
      owl2 bench bundle/
      owl2 bench bundle/ --threads 2 --kv-cache int8 --plot speed.png
      owl2 bench --shape 7b --json > today.json
      owl2 bench bundle/ --score
    """
    if (bundle is None) == (shape is None):
        raise click.UsageError("give a bundle, or --shape for random weights")
    if picture is not None:
        check_plot(picture)
    folder = bundle or _made(str(shape), scratch)
    if scoring:
        require(picture is None, "--plot is not for --score")
        with (
            load_progress() as show_load,
            Owl2.load(
                folder, threads=threads, kv_cache=kv_cache, backend=backend, warm=True, progress=show_load
            ) as owl,
        ):
            speed = measure_speed(owl, rounds=rounds)
        if as_json:
            say_json(asdict(speed))
        else:
            say(_score_table(speed))
        return
    with load_progress() as show_load, _progress() as show:
        result = bench(
            folder,
            backend=backend,
            threads=threads,
            kv_cache=kv_cache,
            rounds=rounds,
            progress=show,
            load_progress=show_load,
        )
    if picture is not None:
        plot(result, picture)
    if as_json:
        say_json(result.to_json())
    else:
        say(_table(result))


def _made(shape: str, scratch: Path | None) -> Path:
    """The bundle of a shape, with a bar while it is written."""
    with ExitStack() as bars:
        bar: Any = None

        def show(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                notice(f"writing random weights of the shape {shape}, once")
                bar = bars.enter_context(click.progressbar(length=total, label="writing", file=sys.stderr))
            bar.update(done - bar.pos)

        return shape_bundle(shape, scratch, show)


@contextmanager
def _progress() -> Iterator[OnBenchProgress | None]:
    """A bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with ExitStack() as bars:
        bar: Any = None

        def show(progress: BenchProgress) -> None:
            nonlocal bar
            if bar is None:
                bar = bars.enter_context(
                    click.progressbar(length=progress.total, item_show_func=lambda part: part or "", file=sys.stderr)
                )
            bar.update(progress.done - bar.pos, progress.part)

        yield show


def _score_table(speed: ScoreSpeed) -> str:
    rows: list[tuple[str, ...]] = [("images that share a step", "decoder", "with the tower", "images a second")]
    for batch, seconds in speed.decoder.items():
        whole = duration(speed.vision + seconds)
        rows.append((str(batch), duration(seconds), whole, f"{speed.per_second(batch):.2f}"))
    head = f"prompts of {speed.positions} positions; an image takes"
    stages = [("to read a JPEG of 1024 x 768", duration(speed.read)), ("in the vision tower", duration(speed.vision))]
    return "\n\n".join((section(head, table(stages, "<>")), table(rows, "<>>>")))


def _table(result: BenchResult) -> str:
    runner = result.backend if result.kernels is None else f"{result.backend} ({result.kernels})"
    threads = "" if result.threads is None else f", {result.threads} threads"
    head = f"{result.bundle} on {runner}{threads}, {result.kv_cache} K/V cache"
    times = [
        ("load", *_times(result.load)),
        ("load and first token", *_times(result.load_to_first_token)),
        ("vision, an image", *_times(result.vision)),
        ("image and question, to the first token", *_times(result.first_question)),
        ("second question, to the first token", *_times(result.second_question)),
    ]
    prefill = [("prompt", "", "", "tokens/s", f"of the {result.arithmetic} peak")]
    prefill += [
        (
            f"{one.tokens} tokens",
            *_times(one.whole),
            f"{one.tokens / one.whole.median:.1f}",
            _percent(result.peak_share(one)),
        )
        for one in result.prefill
    ]
    decode = [("context", "a token", "", "tokens/s", "reads", "of the bandwidth", "private", "of it K/V", "mapped")]
    decode += [
        (
            str(step.context),
            *_times(step.step),
            f"{1 / step.step.median:.2f}",
            size(step.bytes_read),
            _percent(result.bandwidth_share(step)),
            *_sizes(step.memory),
        )
        for step in result.decode
    ]
    blocks = [head, section("times", table(times, "<>>")), section("prefill", table(prefill, "<>>>>"))]
    blocks.append(section("decode", table(decode, ">>>>>>>>>")))
    if (roof := result.roof) is not None:
        at_most = f"{roof.bandwidth / 1e9:.1f} GB/s read", f"{roof.int8 / 1e9:.0f} int8 and {roof.fp32 / 1e9:.0f} fp32"
        blocks.append(f"this machine at most: {', '.join(at_most)} GMAC/s")
    return "\n\n".join(blocks)


def _times(spread: Spread) -> tuple[str, str]:
    return _fine(spread.median), f"({_fine(spread.low)} to {_fine(spread.high)})"


def _fine(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 0.01 else duration(seconds) if seconds < 1 else f"{seconds:.2f} s"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _sizes(memory: Memory | None) -> tuple[str, str, str]:
    return ("", "", "") if memory is None else (size(memory.private), size(memory.kv_cache), size(memory.mapped))
