"""Building one engine from one graph, with the TensorRT module that is handed in.

``tensorrt`` (on a Jetson or a server) and ``tensorrt_rtx`` (elsewhere) have the same interface; what differs is that
TensorRT-RTX builds for GPUs that are not there.
"""

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
from owl2.runtime.errors import BackendUnavailableError, ExportError

STOPPING = (signal.SIGINT, signal.SIGTERM)
MOST_LINES = 5
"""Of TensorRT's own messages in an error."""


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        graph: ONNX file of the dialect onnx; its external data lies beside it.
        engine: file to write.
        profiles: one or more; the runtime chooses by their order.
        compute: capability to build for, times ten; None for the GPU of this machine.
        workspace: most bytes of scratch memory on the GPU; None for all.
    """

    graph: Path
    engine: Path
    profiles: Sequence[Profile]
    compute: int | None
    workspace: int | None


@dataclass(frozen=True, slots=True)
class Built:
    """What building took.

    Attributes:
        parse_seconds, build_seconds: of the two steps.
        size: bytes of the engine.
    """

    parse_seconds: float
    build_seconds: float
    size: int


def build_engine(trt: ModuleType, job: Job, reporter: Reporter) -> Built:
    """Write ``job.engine``.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        job: what to build.
        reporter: is told of TensorRT's phases.

    Raises:
        BackendUnavailableError: this TensorRT cannot build here.
        ExportError: TensorRT does not take the graph, with its words; or building failed.
    """
    logger = _logger(trt)
    with _held_signals() as held:
        builder = _builder(trt, logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        began = time.perf_counter()
        parser = _parse(trt, network, logger, job.graph)
        parsed = time.perf_counter()
        config = _config(trt, builder, network, job)
        config.progress_monitor = _monitor(trt, reporter, job.graph.name, held)
        engine = builder.build_serialized_network(network, config)
    del parser  # the network's weights are its own until here
    if engine is None:
        raise ExportError(f"TensorRT could not build an engine of {job.graph}: {_words(logger.messages)}")
    job.engine.write_bytes(memoryview(engine))
    return Built(parsed - began, time.perf_counter() - parsed, job.engine.stat().st_size)


@contextlib.contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, and let them act afterwards: an exception must not pass through TensorRT's frames."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held  # signals go to the main thread
        return
    heeded = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    usual = {number: signal.signal(number, lambda number, _: held.append(number)) for number in heeded}
    try:
        yield held
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _builder(trt: ModuleType, logger: Any) -> Any:  # noqa: ANN401 - TensorRT's classes have no stubs
    try:
        return trt.Builder(logger)
    except (RuntimeError, TypeError) as error:
        raise BackendUnavailableError(
            f"{trt.__name__} {trt.__version__} cannot build engines here: {_words([*logger.messages, str(error)])}; it "
            "needs an NVIDIA GPU with its driver"
        ) from error


def _parse(trt: ModuleType, network: Any, logger: Any, graph: Path) -> Any:  # noqa: ANN401
    """Fill the network; the parser that is returned has to live as long as that."""
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = [_parser_error(error) for error in errors] or logger.messages
    raise ExportError(f"{trt.__name__} {trt.__version__} does not take {graph}: {_words(said)}")


def _parser_error(error: Any) -> str:  # noqa: ANN401
    where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{error.desc()}"


def _config(trt: ModuleType, builder: Any, network: Any, job: Job) -> Any:  # noqa: ANN401
    config = builder.create_builder_config()
    if job.compute is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job.compute}"), 0)
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    for shapes in job.profiles:
        config.add_optimization_profile(_profile(builder, inputs, shapes, job.graph))
    return config


def _profile(builder: Any, inputs: set[str], shapes: Profile, graph: Path) -> Any:  # noqa: ANN401
    if inputs != set(shapes):
        different = ", ".join(sorted(inputs ^ set(shapes)))
        raise ExportError(f"{graph} has other inputs than this version exports ({different}); export the bundle again")
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    return profile


def _words(messages: Sequence[str]) -> str:
    """What TensorRT said, on one line."""
    lines = [" ".join(message.split()) for message in messages]
    more = f" (and {len(lines) - MOST_LINES} more)" if len(lines) > MOST_LINES else ""
    return ("; ".join(lines[:MOST_LINES]) or "it gives no reason") + more


def _logger(trt: ModuleType) -> Any:  # noqa: ANN401
    """Keeps errors; a class of its own for each module, since it must derive from the module's."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)

    return Logger()


def _monitor(trt: ModuleType, reporter: Reporter, graph: str, held: Sequence[int]) -> Any:  # noqa: ANN401
    """Tells the reporter of TensorRT's outermost phase with steps, and stops the build once a signal is ``held``."""

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
