"""Evaluating a bundle on the user's own data, by itself or against the model that it came from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from owl2.runtime.arguments import checked
from owl2.runtime.config import require
from owl2.runtime.engine import BackendName
from owl2.runtime.errors import Owl2Error
from owl2.runtime.evaluation.data import read_items
from owl2.runtime.evaluation.measure import ItemResult, measure
from owl2.runtime.evaluation.reference import is_bundle, open_reference
from owl2.runtime.evaluation.summary import Summary, item_json, summarise
from owl2.runtime.owl import Owl2
from owl2.runtime.placement import CPU, Placement
from owl2.runtime.preprocess import UPRIGHT, ImageReading, check_mode
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.spec import KvType
from owl2.runtime.verification import LoadProgress

MAX_NEW_TOKENS = 64
"""Of an answer, if not told otherwise."""


@dataclass(frozen=True, slots=True)
class EvaluationProgress:
    """Number of items that have been measured."""

    done: int
    total: int

    def __str__(self) -> str:
        return f"measuring: {self.done} of {self.total} items"


OnEvaluationProgress = Callable[[LoadProgress | EvaluationProgress], object]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of an evaluation, complete or not.

    Attributes:
        summary: scores by task and category, and the divergence from the reference.
        results: of each item that was measured.
        total: items that were to be measured.
        seconds: without loading.
        preprocess: how images were made square.
        reading: what was made of their orientation and transparency.
        failure: what ended it early, other than Ctrl-C: an image that is gone by now, or a device that failed.
    """

    summary: Summary
    results: tuple[ItemResult, ...]
    total: int
    seconds: float
    context: int
    preprocess: str
    reading: ImageReading
    failure: Owl2Error | None = None

    @property
    def complete(self) -> bool:
        return len(self.results) == self.total

    def to_json(self, *, items: bool = False) -> dict[str, Any]:
        """Plain dictionaries, with the outputs of every item if ``items``."""
        record = {
            "preprocess": self.preprocess,
            **asdict(self.reading),
            "context": self.context,
            "complete": self.complete,
            "failure": None if self.failure is None else str(self.failure),
            "asked": self.total,
            "seconds": round(self.seconds, 3),
            **self.summary.to_json(),
        }
        return record | ({"predictions": [item_json(result) for result in self.results]} if items else {})


@checked
def evaluate(  # noqa: PLR0913 - the arguments of Owl2.load and those of the evaluation
    bundle: str | os.PathLike[str] | Owl2,
    data: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv_cache: KvType | None = None,
    backend: BackendName | None = None,
    preprocess: str | None = None,
    reading: ImageReading = UPRIGHT,
    check_memory: bool = True,
    progress: OnEvaluationProgress | None = None,
) -> Evaluation:
    """Measure a bundle on records of JSON, which ``owl2 eval --help`` describes.

    Everything that can be checked is checked before a model is loaded. Answers are greedy, so results are reproducible.
    Ctrl-C ends the evaluation early, and so does an error after the first item: what was measured until then is
    returned, ``complete`` is False, and ``failure`` is the error.

    Args:
        bundle: folder written by ``owl2-export``, or a loaded model, which keeps its device, threads, context and
            K/V cache.
        data: file of JSON lines, or of one JSON array; images are named relative to it.
        against: a checkpoint (needs the export extra) or another bundle to compare with; runs on the same device with
            the same context and backend, and the K/V cache that a load chooses for it.
        limit: measure at most this many items, spread evenly over the file.
        max_new_tokens: of an answer.
        device: as in :meth:`Owl2.load`; None for the CPU, or for that of the loaded model.
        threads, context, kv_cache, backend, check_memory: as in :meth:`Owl2.load`.
        preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
        reading: what to make of EXIF orientation and transparency; ``AS_ORIGINAL`` of :mod:`owl2.runtime.preprocess`
            for scores that compare with the original's.
        progress: called with a :class:`LoadProgress` while models are loaded, and with an :class:`EvaluationProgress`
            after each item.

    Raises:
        DataError: the data cannot be used; names every line at fault.
        ReferenceModelError: ``against`` is not available or does not match the bundle.
        ConfigError, BundleError, BackendError, InsufficientMemoryError: as :meth:`Owl2.load`.
    """
    placement = None if device is None else Placement.parse(device)
    GenerationConfig(max_new_tokens=max_new_tokens)
    if preprocess is not None:
        check_mode(preprocess)
    items = read_items(Path(data), limit)
    if against is not None:
        is_bundle(Path(against))
    with ExitStack() as stack:
        if isinstance(bundle, Owl2):
            require(
                all(value is None for value in (threads, context, kv_cache, backend))
                and placement in (None, bundle.device),
                "a loaded model keeps its device, threads, context and K/V cache, and its backend; "
                "to choose others, give its folder",
            )
            owl = bundle
        else:
            owl = stack.enter_context(
                Owl2.load(
                    bundle,
                    device=CPU if device is None else device,
                    threads=threads,
                    context=context,
                    kv_cache=kv_cache,
                    backend=backend,
                    check_memory=check_memory,
                    progress=progress,
                )
            )
        reference = None
        if against is not None:
            reference = open_reference(
                Path(against),
                owl.model,
                device=owl.device,
                threads=threads,
                backend=backend,
                check_memory=check_memory,
                on_progress=progress,
            )
            stack.enter_context(closing(reference))
        measuring = measure(
            owl.model, items, reference, max_new_tokens=max_new_tokens, preprocess=preprocess, reading=reading
        )
        began = time.perf_counter()
        results: list[ItemResult] = []
        failure = None
        try:
            for result in measuring:
                results.append(result)
                if progress is not None:
                    progress(EvaluationProgress(len(results), len(items)))
        except KeyboardInterrupt:
            pass  # what was measured is returned
        except Owl2Error as error:
            if not results:
                raise
            failure = error
        seconds = time.perf_counter() - began
    mode = preprocess or owl.config.preprocess.mode
    return Evaluation(summarise(results), tuple(results), len(items), seconds, owl.context, mode, reading, failure)
