"""A picture of a benchmark: speed and memory against the context."""

from __future__ import annotations

from pathlib import Path

from owl2.runtime.bench.result import BenchResult
from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.fit.products import GIB


def plot(result: BenchResult, path: Path) -> None:
    """Write tokens per second, and private and mapped memory, against the context.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(f"a plot needs matplotlib: {error}; pip install 'owl2[plot]'") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    contexts = [step.context for step in result.decode]
    speed.plot(contexts, [1 / step.step.median for step in result.decode], marker="o", label="measured")
    if result.roof is not None:
        roof = [result.roof.bandwidth / step.bytes_read for step in result.decode]
        speed.plot(contexts, roof, linestyle="--", label="memory bandwidth allows")
    speed.set(xlabel="context, positions", ylabel="tokens/s", ylim=(0, None), title=f"decode, {result.kv_cache} K/V")
    speed.legend()
    told = [step for step in result.decode if step.memory is not None]
    for name, label in (("private", "private"), ("kv_cache", "of it K/V"), ("mapped", "mapped")):
        figures = [getattr(step.memory, name) / GIB for step in told]
        memory.plot([step.context for step in told], figures, marker="o", label=label)
    memory.set(xlabel="context, positions", ylabel="GiB", ylim=(0, None), title="memory of the process")
    if told:
        memory.legend()
    runner = result.backend if result.kernels is None else f"{result.backend} ({result.kernels})"
    threads = "" if result.threads is None else f", {result.threads} threads"
    figure.suptitle(f"{Path(result.bundle).name}: {runner}{threads}")
    figure.savefig(path)
