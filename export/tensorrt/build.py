"""Building one engine from one graph, with the TensorRT module that is handed in."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from owl2.export.job.progress import Reporter
from owl2.export.tensorrt.profiles import Profile
from owl2.runtime.backends.tensorrt.module import Messages, one_line
from owl2.runtime.cli.signals import LAST_SIGNALS
from owl2.runtime.errors import BackendUnavailableError, ExportError

STOP_SIGNALS = (signal.SIGINT, *LAST_SIGNALS)


@dataclass(frozen=True, slots=True)
class BuildStats:
    """Seconds of the two steps of a build, and the size of the engine in bytes."""

    parse_seconds: float
    build_seconds: float
    size: int


def build_engine(
    trt: ModuleType,
    graph: Path,
    engine: Path,
    profiles: Sequence[Profile],
    reporter: Reporter,
    *,
    compute: int | None = None,
    workspace: int | None = None,
) -> BuildStats:
    """Build an engine from a graph of the dialect onnx, and write it to the file ``engine``.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        graph: ONNX file, with its external data next to it.
        profiles: chosen by the runtime by their order.
        compute: capability to build for, times ten, which only TensorRT-RTX can choose; None for this machine's GPU.
        workspace: bytes of scratch memory on the GPU at most; None for all.

    Raises:
        BackendUnavailableError: this TensorRT cannot build here.
        ExportError: TensorRT does not take the graph, or cannot build the engine; quotes its reason.
    """
    messages = Messages()
    logger = messages.logger(trt)
    version = f"{trt.__name__} {trt.__version__}"
    with _held_signals() as held:
        try:
            builder = trt.Builder(logger)
        except (RuntimeError, TypeError) as error:
            messages.add(str(error))
            raise BackendUnavailableError(
                f"{version} cannot build engines here: {messages.take()}; it needs an NVIDIA GPU with its driver"
            ) from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        began = time.perf_counter()
        if not parser.parse_from_file(str(graph)):
            errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
            reason = one_line(errors) if errors else messages.take()
            raise ExportError(f"{version} does not take {graph}: {reason}")
        parsed = time.perf_counter()
        config = builder.create_builder_config()
        if compute is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute}"), 0)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        for profile in profiles:
            config.add_optimization_profile(_profile(builder, network, profile, graph))
        config.progress_monitor = _monitor(trt, reporter, graph.name, held)
        content = builder.build_serialized_network(network, config)
    del parser  # the network reads its weights until here
    if content is None:
        raise ExportError(f"TensorRT could not build an engine of {graph}: {messages.take()}")
    engine.write_bytes(memoryview(content))
    return BuildStats(parsed - began, time.perf_counter() - parsed, engine.stat().st_size)


@contextlib.contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Collect the signals that stop a command, and let them act afterwards.

    An exception must not pass through TensorRT's frames.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held  # signals go to the main thread
        return
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    usual = {number: signal.signal(number, lambda number, _: held.append(number)) for number in heeded}
    try:
        yield held
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _parser_error(error: Any) -> str:  # noqa: ANN401 - TensorRT has no types
    where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{error.desc()}"


def _profile(builder: Any, network: Any, shapes: Profile, graph: Path) -> Any:  # noqa: ANN401
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    if inputs != set(shapes):
        different = ", ".join(sorted(inputs ^ set(shapes)))
        raise ExportError(f"{graph} has other inputs than this version exports ({different}); export the bundle again")
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    return profile


def _monitor(trt: ModuleType, reporter: Reporter, graph: str, held: Sequence[int]) -> Any:  # noqa: ANN401
    """Show TensorRT's outermost phase that has steps, and stop the build once a signal is ``held``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._shown: str | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if self._shown is None and steps > 1:
                self._shown = phase
                reporter.stage(f"{graph}: {phase.lower()}", steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self._shown:
                reporter.advance()
            return not held

        def phase_finish(self, phase: str) -> None:
            if phase == self._shown:
                self._shown = None

    return Monitor()
