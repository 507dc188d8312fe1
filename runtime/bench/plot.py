"""A chart of a benchmark: speed and memory against the context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from owl2.runtime.bench.result import BenchResult
from owl2.runtime.errors import BackendUnavailableError, ConfigError
from owl2.runtime.fit.products import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_plot(path: Path) -> None:
    """Refuse, before anything is measured, what :func:`plot` could not write.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        ConfigError: the name ends as no format does, or its folder does not exist.
    """
    formats = sorted(_figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ConfigError(f"plot {path}: its name must end with one of {', '.join(formats)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot {path}: its folder does not exist; make it first")


def plot(result: BenchResult, path: Path) -> None:
    """Write tokens per second, and private and mapped memory, against the context.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = _figure()
    speed, memory = figure.subplots(1, 2)
    _draw_speed(speed, result)
    _draw_memory(memory, result)
    runner = result.backend if result.kernels is None else f"{result.backend} ({result.kernels})"
    threads = "" if result.threads is None else f", {result.threads} threads"
    figure.suptitle(f"{Path(result.bundle).name}: {runner}{threads}", parse_math=False)
    figure.savefig(path)


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(f"a plot needs matplotlib: {error}; pip install 'owl2[plot]'") from error
    return Figure(figsize=(9, 3.6), layout="constrained")


def _draw_speed(axes: Axes, result: BenchResult) -> None:
    contexts = [step.context for step in result.decode]
    axes.plot(contexts, [1 / step.step.median for step in result.decode], marker="o", label="measured")
    if result.roof is not None:
        roof = [result.roof.bandwidth / step.bytes_read for step in result.decode]
        axes.plot(contexts, roof, linestyle="--", label="memory bandwidth allows")
    axes.set(xlabel="context, positions", ylabel="tokens/s", ylim=(0, None), title=f"decode, {result.kv_cache} K/V")
    axes.legend()


def _draw_memory(axes: Axes, result: BenchResult) -> None:
    told = [step for step in result.decode if step.memory is not None]
    for name, label in (("private", "private"), ("kv_cache", "of it K/V"), ("mapped", "mapped")):
        figures = [getattr(step.memory, name) / GIB for step in told]
        axes.plot([step.context for step in told], figures, marker="o", label=label)
    axes.set(xlabel="context, positions", ylabel="GiB", ylim=(0, None), title="memory of the process")
    if told:
        axes.legend()
