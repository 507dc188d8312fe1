"""Scores of any number of images: the decoder runs each prompt once, and only its last position is looked at."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from owl2.runtime.cancellation import NEVER, Cancellation
from owl2.runtime.config import IMAGE_TOKEN, require
from owl2.runtime.engine import Floats, SequenceRows, SteppingEngine
from owl2.runtime.errors import ConfigError, ContextOverflowError, ImageError, Owl2Error, PromptError
from owl2.runtime.families.mplug_owl2 import positions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.generate import prefill, reuse
from owl2.runtime.images import Images, PreparedImage
from owl2.runtime.kv_cache import Claim, KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.preprocess import ImageReading
from owl2.runtime.scoring.scale import Scale, level_ids
from owl2.runtime.scoring.score import Score, score_of

Source = TypeVar("Source")
MOST = 64
"""Prompts in a step of the decoder, at most: each keeps a K/V cache."""
GROWTH = 32
"""Positions by which these grow: all prompts of a scale are about as long."""


class Scorer:
    """Scores images on one or several scales; the vision tower runs once for all scales.

    A score is a function of the image alone: the same bits whatever is scored beside it, before it, or in which order.
    The vision tower sees one image at a time (with int8 weights it would round one by what is in the others). Where the
    engine's rows are independent of each other, prompts share steps and what stands before the image runs once;
    elsewhere every prompt runs alone and as a whole. Several threads may use one scorer; they take turns.
    """

    def __init__(self, model: Loaded, scales: Sequence[Scale]) -> None:
        """Prepare the words of the scales; raises ConfigError."""
        require(bool(scales), "there is no task to score")
        require(len({scale.preprocess for scale in scales}) == 1, "scales must have one way to preprocess images")
        require(len({scale.task for scale in scales}) == len(scales), "a task is given twice")
        self._model, self.scales = model, tuple(scales)
        self._ids = [level_ids(scale, model.tokenizer) for scale in scales]
        self._caches: list[list[KvCache]] = [[] for _ in scales]
        self._lock = threading.Lock()

    def prepare(self, images: Images, reading: ImageReading | None = None) -> list[PreparedImage]:
        """Read the images of one item.

        Raises:
            ImageError: there is none, or as :func:`owl2.runtime.images.prepare_images`.
        """
        prepared = self._model.prepare(images, self.scales[0].preprocess, reading)
        if not prepared:
            raise ImageError("there is no image to score")
        return prepared

    def rows(self, images: Sequence[PreparedImage], cancellation: Cancellation = NEVER) -> Mapping[str, Floats]:
        """What the decoder sees of images, by digest: float32 [queries + 1, C] each."""
        return self._model.encoder.rows(images, cancellation)[0]

    def prompt(self, scale: Scale, images: Sequence[PreparedImage]) -> Prompt:
        """The positions of a scale's prompt with these images.

        Raises:
            PromptError: placeholders and images do not agree.
            ContextOverflowError: they do not fit the context.
        """
        if not images:
            raise PromptError("there is no image to score")
        text = scale.prompt
        if scale.video:
            text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * len(images))
        prompt = self._model.encode(text, images)
        if len(prompt.keys) > self._model.context:
            raise ContextOverflowError(0, len(prompt.keys), self._model.context, "give fewer images or frames")
        return prompt

    def score(
        self,
        items: Sequence[Sequence[PreparedImage]],
        sources: Sequence[object] | None = None,
        cancellation: Cancellation = NEVER,
        *,
        rows: Mapping[str, Floats] | None = None,
    ) -> list[tuple[Score, ...]]:
        """Scores of each item on each scale.

        Args:
            items: the images of each prompt: one, or the frames of a video, or several that are compared.
            sources: what each item was given as; named in its scores.
            cancellation: raises StoppedError.
            rows: of all images, by digest, where they are known (:meth:`rows`).

        Raises:
            PromptError, ContextOverflowError: as :meth:`prompt`.
            BackendError: a step failed.
        """
        given = sources if sources is not None else [None] * len(items)
        if not items:
            return []
        prompts = [self._prompts(images) for images in items]
        if rows is None:
            rows = self.rows([image for images in items for image in images], cancellation)
        return self._score(prompts, given, rows, cancellation)

    def stream(
        self,
        sources: Iterable[Source],
        open_item: Callable[[Source], Sequence[PreparedImage]],
        *,
        batch: int | None = None,
        workers: int = 2,
        cancellation: Cancellation = NEVER,
    ) -> Iterator[tuple[Source, tuple[Score, ...] | Owl2Error]]:
        """Scores of any number of items, in their order, in bounded memory.

        Args:
            sources: may be endless.
            open_item: reads and prepares one; runs ahead in ``workers`` threads. An Owl2Error takes its scores' place,
                but a ConfigError ends the work.
            batch: items at a time, 64 at most; None for as many as fill a step of the decoder.
            workers: threads.
            cancellation: raises StoppedError.
        """
        require(batch is None or batch > 0, f"batch must be positive, got {batch}")
        require(workers > 0, f"workers must be positive, got {workers}")
        size = min(batch or self.batch, MOST)
        waiting = iter(sources)
        opened: deque[tuple[Source, Future[Sequence[PreparedImage]]]] = deque()
        with ThreadPoolExecutor(workers, "owl2 images") as pool:
            try:
                while True:
                    ahead = 2 * size + 2 * workers - len(opened)  # the next batch is read while this one runs
                    opened.extend((source, pool.submit(open_item, source)) for source in islice(waiting, ahead))
                    if not opened:
                        return
                    yield from self._scored([opened.popleft() for _ in range(min(size, len(opened)))], cancellation)
            finally:
                for _, future in opened:
                    future.cancel()

    @property
    def frames_that_fit(self) -> int:
        """Frames of a video that fit the context, under the scale with the longest prompt."""
        return max(0, (self._model.context - self._text_positions) // self._model.config.rows_per_image)

    @property
    def batch(self) -> int:
        """Images that fill a step of the decoder."""
        if self._model.engine.stepping is None:
            return 1
        longest = self._text_positions + self._model.config.rows_per_image
        return min(MOST, max(1, self._model.engine.block // longest))

    @property
    def _text_positions(self) -> int:
        """Of the longest prompt."""
        return max(len(self._model.tokenizer.encode_prompt(scale.prompt)) for scale in self.scales)

    def _prompts(self, images: Sequence[PreparedImage]) -> list[Prompt]:
        """Of an item, one for each scale; raises as :meth:`prompt`."""
        return [self.prompt(scale, images) for scale in self.scales]

    def _score(
        self,
        prompts: Sequence[Sequence[Prompt]],
        sources: Sequence[object],
        rows: Mapping[str, Floats],
        cancellation: Cancellation,
    ) -> list[tuple[Score, ...]]:
        """Scores of one item or more, by their prompts for each scale and the rows of all their images."""
        by_scale = []
        for scale, ids, caches, asked in zip(self.scales, self._ids, self._caches, zip(*prompts)):
            with self._lock:  # the caches are of one thread at a time
                logits = last_logits(self._model, caches, asked, rows, cancellation)
            by_scale.append(
                [
                    score_of(row, ids, scale, source, self._model.fingerprint)
                    for row, source in zip(logits, sources, strict=True)
                ]
            )
        return list(zip(*by_scale))

    def _scored(
        self, opened: Sequence[tuple[Source, Future[Sequence[PreparedImage]]]], cancellation: Cancellation
    ) -> Iterator[tuple[Source, tuple[Score, ...] | Owl2Error]]:
        results: list[tuple[Score, ...] | Owl2Error | None] = [None] * len(opened)
        good: list[tuple[int, Sequence[PreparedImage], list[Prompt]]] = []
        for place, (_, future) in enumerate(opened):
            try:
                images = future.result()
                good.append((place, images, self._prompts(images)))  # too many frames spoil no batch
            except ConfigError:  # a setting that spoils every image
                raise
            except Owl2Error as error:
                results[place] = error
        if good:
            places, items, prompts = zip(*good)
            rows = self.rows([image for images in items for image in images], cancellation)
            sources = [opened[place][0] for place in places]
            for place, scores in zip(places, self._score(prompts, sources, rows, cancellation)):
                results[place] = scores
        for (source, _), result in zip(opened, results):
            assert result is not None  # every place was filled
            yield source, result


def last_logits(
    model: Loaded,
    caches: list[KvCache],
    prompts: Sequence[Prompt],
    rows: Mapping[str, Floats],
    cancellation: Cancellation = NEVER,
) -> list[Floats]:
    """Logits [V] of the last position of each prompt, in steps that several share.

    Args:
        model: what runs.
        caches: of earlier prompts, whose beginnings are reused; grows.
        prompts: one or more.
        rows: of all their images, by digest.
        cancellation: raises StoppedError.
    """
    engine = model.engine
    stepping = engine.stepping if engine.rows_are_independent else None
    results: list[Floats] = []
    pending: list[tuple[Claim, Prompt]] = []
    positions_pending = 0
    for prompt in prompts:
        full = positions_pending + len(prompt.keys) > engine.block or len(pending) == MOST
        if pending and (stepping is None or full):
            results += _run(model, stepping, pending, rows, cancellation)
            pending, positions_pending = [], 0
        if len(caches) == len(pending):
            caches.append(model.new_cache(GROWTH))
        claim = caches[len(pending)].claim()
        if stepping is None:
            claim.truncate(0)
        else:
            reuse(model, claim, prompt, len(prompt.keys) - 1)
        pending.append((claim, prompt))
        positions_pending += len(prompt.keys)
    return results + _run(model, stepping, pending, rows, cancellation)


def _run(
    model: Loaded,
    stepping: SteppingEngine | None,
    pending: Sequence[tuple[Claim, Prompt]],
    rows: Mapping[str, Floats],
    cancellation: Cancellation,
) -> list[Floats]:
    if stepping is None or len(pending) == 1:  # or longer than a step
        return [_alone(model, claim, prompt, rows, cancellation) for claim, prompt in pending]
    news = [prompt.keys[claim.cache.length :] for claim, prompt in pending]
    sequences = [
        SequenceRows(*positions.embed(new, model.table, rows), claim.cache.length, claim.reserve(len(new)))
        for (claim, _), new in zip(pending, news)
    ]
    logits = stepping.step(sequences, np.cumsum([len(new) for new in news]) - 1, cancellation)
    for (claim, _), new in zip(pending, news):
        claim.commit(new)
    return list(logits)


def _alone(
    model: Loaded, claim: Claim, prompt: Prompt, rows: Mapping[str, Floats], cancellation: Cancellation
) -> Floats:
    last = len(prompt.keys) - 1
    *_, (_, logits) = prefill(model, claim, prompt, rows, last, cancellation)
    whole: Floats = logits[0]
    return whole
