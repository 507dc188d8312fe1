"""Options shared by the commands that run a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import click

from owl2.runtime.cli.console import load_progress
from owl2.runtime.cli.types import PATH, integer
from owl2.runtime.engine import BackendName
from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import read_json, reading
from owl2.runtime.owl import Owl2
from owl2.runtime.placement import CPU, KINDS, Placement
from owl2.runtime.preprocess import MODES, UPRIGHT, ImageReading, Orientation
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.spec import KvType

DEFAULTS = GenerationConfig()
Command = Callable[..., None]

bundle_argument = click.argument("bundle", type=PATH)
preprocess_option = click.option(
    "--preprocess",
    type=click.Choice(tuple(MODES)),
    show_default="the bundle's own mode",
    help="How images are made square.",
)
orientation_option = click.option(
    "--orientation",
    type=click.Choice(get_args(Orientation)),
    default=UPRIGHT.orientation,
    show_default=True,
    help="Turn images as their EXIF data say, or leave them as they are stored, like the original.",
)
background_option = click.option(
    "--background",
    default=UPRIGHT.background,
    show_default=True,
    metavar="COLOUR",
    help="Colour to lay under transparent images: a name or #rrggbb; none drops transparency, like the original.",
)
threads_option = click.option(
    "--threads", type=integer, show_default="chosen by the backend", help="Threads that share a step on the CPU."
)
context_option = click.option(
    "--context", type=integer, show_default="the model's own limit", help="Positions that a conversation may take."
)


def _check_device(_context: click.Context, _option: click.Parameter, device: str) -> str:
    try:
        Placement.parse(device)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error
    return device


device_option = click.option(
    "--device",
    default=CPU,
    show_default=True,
    callback=_check_device,
    metavar=f"[{'|'.join(kind if kind == CPU else f'{kind}[:N]' for kind in KINDS)}]",
    help="Device that runs the model; N counts GPUs from 0. There is no fallback: a graph that the device cannot run "
    "is an error.",
)
kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(get_args(KvType)),
    show_default="fp16 in the native core, or that of the bundle's activations",
    help="Type of cached keys and values; int8 takes half of fp16's memory, at a small loss.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(get_args(BackendName)),
    show_default="the native core where it can run the bundle",
    help="What runs the model on the CPU; owl2 info says what can.",
)
memory_option = click.option(
    "--memory-check/--no-memory-check",
    "check_memory",
    default=True,
    show_default=True,
    help="Refuse to load a model that cannot fit the free memory of the device; owl2 plan shows the estimate.",
)
verify_option = click.option(
    "--verify", is_flag=True, help="Hash every file again, also those that have not changed since they were verified."
)


@dataclass(frozen=True)
class Options:
    """Options of the commands that answer."""

    threads: int | None
    context: int | None
    device: str
    kv_cache: KvType | None
    backend: BackendName | None
    check_memory: bool
    verify: bool
    preprocess: str | None
    reading: ImageReading
    generation: GenerationConfig
    stats: bool

    def load(self, bundle: Path) -> Owl2:
        with load_progress() as progress:
            return Owl2.load(
                bundle,
                threads=self.threads,
                device=self.device,
                context=self.context,
                kv_cache=self.kv_cache,
                backend=self.backend,
                check_memory=self.check_memory,
                verify=self.verify,
                progress=progress,
            )


def image_reading(orientation: Orientation, background: str) -> ImageReading:
    """How images are read, from the two options about it."""
    return ImageReading(orientation, None if background == "none" else background)


def model_options(command: Command) -> Command:
    """Add the shared options to a command, which gets them as one ``options`` argument.

    An option out of its range raises ConfigError in the call, before anything is loaded.
    """

    @functools.wraps(command)
    def gathered(**given: Any) -> None:  # noqa: ANN401 - click's parameters
        names = [field.name for field in fields(GenerationConfig) if field.name in given]
        generation = GenerationConfig(**{name: given.pop(name) for name in names})
        reading = image_reading(given.pop("orientation"), given.pop("background"))
        others = {field.name: given.pop(field.name) for field in fields(Options) if field.name in given}
        command(options=Options(generation=generation, reading=reading, **others), **given)

    with_options: Command = gathered
    for add in reversed(_OPTIONS):
        with_options = add(with_options)
    return with_options


def _read_schema(_context: click.Context, _option: click.Parameter, path: str | None) -> Any:  # noqa: ANN401 - JSON
    if path is None:
        return None
    try:
        with reading(path, ConfigError, "give a file with a JSON schema"):
            return read_json(Path(path))
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


def _generation(name: str, value_type: Callable[[str], object], text: str) -> Callable[[Command], Command]:
    default = getattr(DEFAULTS, name)
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, type=value_type, default=default, show_default=default is not None, help=text)


_OPTIONS = (
    preprocess_option,
    orientation_option,
    background_option,
    _generation("max_new_tokens", integer, "Tokens of an answer, at most."),
    _generation("temperature", float, "0 takes the likeliest token; larger values vary more."),
    _generation("top_k", integer, "Sample from this many candidates; 0 for all."),
    _generation("top_p", float, "Sample from the likeliest candidates that add up to this probability; 1 for all."),
    _generation("min_p", float, "Smallest probability of a candidate, relative to the likeliest; 0 for all."),
    _generation("repetition_penalty", float, "Above 1 discourages repetition; 1 is off."),
    _generation("seed", integer, "Make sampling reproducible."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable."),
    click.option(
        "--lookup/--no-lookup",
        default=None,
        help="Draft tokens that followed the same words before, and check several at once: faster where an answer "
        "quotes. By default where it changes no answer.",
    ),
    click.option(
        "--schema",
        callback=_read_schema,
        metavar="FILE",
        help="Answer in JSON that follows this JSON schema; needs owl2[grammar], as the next two do.",
    ),
    click.option("--regex", metavar="EXPRESSION", help="Answer with a text that matches this as a whole."),
    click.option("--choice", "choices", multiple=True, metavar="TEXT", help="Answer with one of these; repeatable."),
    threads_option,
    context_option,
    device_option,
    kv_cache_option,
    backend_option,
    memory_option,
    verify_option,
    click.option("--stats", is_flag=True, help="Write token counts and timings to stderr after an answer."),
)
