"""Measuring a bundle: the public function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from owl2.runtime.arguments import checked
from owl2.runtime.backends.choose import resolve_options
from owl2.runtime.backends.native.support import is_installed, native_kernels
from owl2.runtime.bench.process import ProcessError, lines_of
from owl2.runtime.bench.result import BenchResult, DecodeSpeed, PrefillSpeed, Roof, Spread
from owl2.runtime.bench.workload import Workload, multiply_adds, process_memory, timed
from owl2.runtime.bundle import Manifest, read_manifest
from owl2.runtime.config import require
from owl2.runtime.engine import BackendName, EngineOptions
from owl2.runtime.errors import BackendError
from owl2.runtime.fit.footprint import Runner, kv_position, weights_per_token
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.spec import KvType
from owl2.runtime.verification import OnProgress

PREFILLS = (32, 128, 512)
CONTEXTS = (128, 1024, 2048)
ROUNDS = 5
STEPS_PER_ROUND = 8
ROOF_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """What is measured next: part ``done`` + 1 of ``total``."""

    part: str
    done: int
    total: int


OnBenchProgress = Callable[[BenchProgress], object]


@checked
def bench(
    bundle: str | os.PathLike[str],
    *,
    backend: BackendName | None = None,
    threads: int | None = None,
    kv_cache: KvType | None = None,
    rounds: int = ROUNDS,
    progress: OnBenchProgress | None = None,
    load_progress: OnProgress | None = None,
) -> BenchResult:
    """Measure speed and memory of a bundle on the CPU of this machine.

    Prompts are random tokens; what they say does not matter for speed. Lengths beyond the context are left out.

    Example::

        result = owl2.bench("bundle/", threads=2)
        print([1 / speed.step.median for speed in result.decode], "tokens/s")

    Args:
        bundle: folder written by ``owl2-export``.
        backend, threads, kv_cache: as :meth:`Owl2.load`.
        rounds: measurements of everything, after one that does not count; decoding takes eight steps a round.
        progress: told before each part.
        load_progress: told while files are verified.

    Raises:
        BundleError, BackendError, InsufficientMemoryError: it cannot be loaded.
        ConfigError: a setting that cannot work, ``rounds`` that is not positive, or a context too short to ask twice.
    """
    require(rounds > 0, f"rounds must be positive, got {rounds}")
    folder = Path(bundle)
    options = resolve_options(read_manifest(folder), EngineOptions(threads=threads, kv_cache=kv_cache, backend=backend))
    opened, model = open_bundle(folder, options, on_progress=load_progress)
    with closing(model):
        least = Workload(model).positions
        require(
            model.context >= least,
            f"{folder}: a benchmark asks two questions about an image, {least} positions, and this model allows "
            f"{model.context}; give a bundle of a longer context",
        )
        run = _Bench(folder, opened.manifest, model, options, rounds, progress or (lambda _: None))
        return run.whole()


class _Bench:
    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        model: Loaded,
        options: EngineOptions,
        rounds: int,
        progress: OnBenchProgress,
    ) -> None:
        self._folder, self._manifest, self._model, self._options = folder, manifest, model, options
        self._rounds, self._progress, self._work = rounds, progress, Workload(model)
        self._prefills = [count for count in PREFILLS if count <= model.context]
        # The longest a model allows stands for one that it would allow with a position more.
        self._contexts = sorted({min(count, model.context - 1) for count in CONTEXTS})
        self._roofs: list[Roof] = []
        self._done, self._total = 0, 5 + len(self._prefills) + len(self._contexts)

    def whole(self) -> BenchResult:
        native = self._options.backend == "native"
        # Other programs slow down short measurements most: the roof is the best of several moments.
        self._measure_roof()
        prefill = tuple(self._prefill(count) for count in self._prefills)
        self._measure_roof()
        decode = tuple(self._decode(count) for count in self._contexts)
        self._measure_roof()
        vision, first, second = self._questions()
        # Two models at once may not fit.
        self._model.close()
        load, first_token = self._loads()
        return BenchResult(
            bundle=str(self._folder),
            backend=str(self._options.backend),
            kernels=native_kernels() if native else None,
            threads=self._options.threads,
            kv_cache=str(self._options.kv_cache),
            weights=self._manifest.weights.decoder,
            load=load,
            load_to_first_token=first_token,
            vision=vision,
            first_question=first,
            second_question=second,
            prefill=prefill,
            decode=decode,
            roof=Roof.best(self._roofs),
        )

    def _tell(self, part: str) -> None:
        self._progress(BenchProgress(part, self._done, self._total))
        self._done += 1

    def _measure_roof(self) -> None:
        self._tell("what the machine can do")
        if not is_installed():
            return
        from owl2.runtime import _native

        threads = self._options.threads or _native.usable_processors()
        self._roofs.append(Roof(*_native.roof(threads, ROOF_SECONDS)))

    def _prefill(self, tokens: int) -> PrefillSpeed:
        self._tell(f"a prompt of {tokens} tokens")
        seconds = timed(lambda: self._work.prefill(tokens), self._rounds)
        return PrefillSpeed(tokens, Spread.of(seconds), multiply_adds(self._manifest.model.decoder, tokens))

    def _decode(self, context: int) -> DecodeSpeed:
        self._tell(f"decoding after {context} positions")
        buffers = self._work.filled(context)
        seconds = timed(lambda: self._work.step(buffers, context), self._rounds * STEPS_PER_ROUND)
        runner: Runner = "native" if self._options.backend == "native" else "onnxruntime-cpu"
        kv_type = self._options.kv_cache or self._manifest.activations
        read = weights_per_token(self._manifest, runner) + context * kv_position(self._manifest, kv_type, runner)
        return DecodeSpeed(context, Spread.of(seconds), read, process_memory(buffers.nbytes))

    def _questions(self) -> tuple[Spread, Spread, Spread]:
        self._tell("questions about an image")
        self._work.conversation()
        pairs = [self._work.conversation() for _ in range(self._rounds)]
        return (
            Spread.of([first.stats.vision_seconds for first, _ in pairs]),
            Spread.of([first.stats.time_to_first_token for first, _ in pairs]),
            Spread.of([second.stats.time_to_first_token for _, second in pairs]),
        )

    def _loads(self) -> tuple[Spread, Spread]:
        self._tell("loads in new processes")
        options = self._options
        given = (options.backend or "", options.threads or "", options.kv_cache or "")
        found = [_load(self._folder, given) for _ in range(self._rounds)]
        return Spread.of([one["load"] for one in found]), Spread.of([one["first_token"] for one in found])


def _load(folder: Path, given: Sequence[object]) -> dict[str, float]:
    arguments = [str(folder.absolute()), *map(str, given)]
    try:
        times: dict[str, float] = json.loads("".join(lines_of("owl2.runtime.bench.fresh", arguments)))
    except ProcessError as error:
        raise BackendError(f"a new process could not load {folder} and answer: {error}") from error
    return times
