"""Requests in, events out: each answer in a thread of its own, told to the loop that asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import anyio

from owl2.runtime.cancellation import Cancellation, StoppedError
from owl2.runtime.errors import Owl2Error
from owl2.runtime.generate import Answer, Chunk, check_context
from owl2.runtime.messages import read_turns, render_turns
from owl2.runtime.scoring.score import Score
from owl2.runtime.scoring.scorer import Scorer
from owl2.runtime.serve.fetch import Fetcher, FetchLimits
from owl2.runtime.serve.requests import (
    AnswerRequest,
    RequestError,
    ScoreRequest,
    WebImage,
    web_images,
    with_contents,
)
from owl2.runtime.serve.residence import Residence, Resident
from owl2.runtime.stream import stream_answer

EventT = TypeVar("EventT")
Job = Callable[[Resident, "Running[EventT]"], None]
"""Works with the model in a thread of its own, and tells what it makes."""


class Answering:
    """Runs so many answers at once, and lets so many requests wait, in the order in which they came."""

    def __init__(self, residence: Residence, active: int, waiting: int, seconds: float) -> None:
        """Answer with a model.

        Args:
            residence: of the model.
            active: answers at a time, at least one.
            waiting: requests that may wait for their turn.
            seconds: after which an answer ends.
        """
        self._residence, self._seconds = residence, seconds
        self._places = asyncio.Semaphore(active)
        self._active, self._waiting = active, waiting
        self._open = 0
        self._running: set[Running[Any]] = set()
        self._stopping = False

    @property
    def running(self) -> int:
        """Answers that are being generated, and requests that wait."""
        return self._open

    @asynccontextmanager
    async def run(self, job: Job[EventT]) -> AsyncIterator[AsyncIterator[EventT]]:
        """What a job tells; leaving the context ends it.

        Raises:
            RequestError: too many are waiting, or the server is stopping.
            Owl2Error: in the course of the iteration, what the job raises.
        """
        if self._stopping:
            raise RequestError("the server is stopping", status=503)
        if self._open >= self._active + self._waiting:
            raise RequestError(f"{self._open} requests are being answered or wait already; ask again later", status=429)
        self._open += 1
        try:
            async with self._places:
                if self._stopping:
                    raise RequestError("the server is stopping", status=503)
                running = Running(self._residence, job, asyncio.get_running_loop())
                self._running.add(running)
                late = RequestError(f"the answer took more than {self._seconds:g} s", status=504)
                limit = asyncio.get_running_loop().call_later(self._seconds, running.end, late)
                try:
                    yield running.events()
                finally:
                    limit.cancel()
                    running.cancel()
                    # Its cache is given back before the next one looks for it.
                    with anyio.CancelScope(shield=True):
                        await running.ended.wait()
                    self._running.discard(running)
        finally:
            self._open -= 1

    async def stop(self, seconds: float) -> None:
        """Take no further requests, and end those that have not ended by themselves after ``seconds``."""
        self._stopping = True
        until = asyncio.get_running_loop().time() + seconds
        while self._open and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
        for running in list(self._running):
            running.end(RequestError("the answer was cancelled: the server is stopping", status=503))


class Running(Generic[EventT]):
    """A job that runs, in a thread of its own."""

    def __init__(self, residence: Residence, job: Job[EventT], loop: asyncio.AbstractEventLoop) -> None:
        self._residence, self._job, self._loop = residence, job, loop
        self._events: asyncio.Queue[EventT | Exception | None] = asyncio.Queue()
        self._on_cancel: Callable[[], object] | None = None
        self.cancelled = False
        self.ended = asyncio.Event()
        threading.Thread(target=self._run, name="owl2 answer", daemon=True).start()

    async def events(self) -> AsyncIterator[EventT]:
        """What the job tells; raises what it raises."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        """Let the job end early."""
        self.cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def end(self, reason: RequestError) -> None:
        """Cancel, and tell why."""
        self._events.put_nowait(reason)
        self.cancel()

    def cancel_with(self, stop: Callable[[], object]) -> None:
        """What ends the work of the job; called at once if it is cancelled already."""
        self._on_cancel = stop
        if self.cancelled:
            stop()

    def tell(self, event: EventT | Exception | None) -> None:
        """Say something to the loop that asked."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _run(self) -> None:
        try:
            with self._residence.use() as resident:
                self._job(resident, self)
        except Exception as error:  # for the one who asked
            self.tell(error)
        finally:
            self.tell(None)
            self._loop.call_soon_threadsafe(self.ended.set)


class WebImages:
    """Fetches the images of requests, within the places that these have; not of all of them at once."""

    def __init__(self, at_once: int, limits: FetchLimits | None = None) -> None:
        """Fetch for so many requests at a time."""
        self._limits = limits or FetchLimits()
        self._places = threading.BoundedSemaphore(at_once)

    def fetch(self, urls: Sequence[str], running: Running[Any]) -> Mapping[str, bytes]:
        """Contents by URL; raises RequestError, also where too many others fetch already."""
        if not urls:
            return {}
        if not self._places.acquire(blocking=False):
            raise RequestError("other requests are fetching images already; ask again later", status=429)
        try:
            fetcher = Fetcher(self._limits)
            running.cancel_with(fetcher.cancel)
            return fetcher.fetch_all(urls)
        finally:
            self._places.release()


def answer_job(request: AnswerRequest, web: WebImages) -> Job[Chunk | Answer]:
    """Tells the chunks of an answer, and in the end the whole of it."""

    def job(resident: Resident, running: Running[Chunk | Answer]) -> None:
        model = resident.model
        fetched = web.fetch(web_images(request), running)
        if request.messages is None:
            text, images = request.prompt or "", []
        else:
            begun = request.messages[-1]["role"] == "assistant"
            wanted = [] if begun else [{"role": "assistant", "content": ""}]
            *turns, last = read_turns(model, [*with_contents(request.messages, fetched), *wanted])
            text = render_turns(turns, last.question, last.answer)
            images = [image for turn in (*turns, last) for image in turn.images]
        prompt = model.encode(text, images)
        cache = resident.caches.take(prompt.keys)
        try:
            check_context(cache, prompt)
            stream = stream_answer(model, cache, prompt, request.config)
            running.cancel_with(stream.cancel)
            if running.cancelled:
                return
            for chunk in stream:
                running.tell(chunk)
            running.tell(stream.answer)
        finally:
            resident.engine.leave()
            cache.claim()
            resident.caches.give_back(cache)

    return job


Scored = tuple[Score, ...] | Owl2Error


def score_job(request: ScoreRequest, web: WebImages) -> Job[list[Scored]]:
    """Tells the scores of all items at once."""

    def job(resident: Resident, running: Running[list[Scored]]) -> None:
        fetched = web.fetch(web_images(request), running)
        images = [fetched[image.url] if isinstance(image, WebImage) else image for image in request.images]
        scorer = Scorer(resident.model, request.scales)
        cancellation = Cancellation()
        running.cancel_with(cancellation.cancel)
        try:
            items = scorer.stream(images, scorer.prepare, workers=1, cancellation=cancellation)
            running.tell([scores for _, scores in items])
        except StoppedError:
            pass  # nobody waits for it any more
        finally:
            resident.engine.leave()

    return job
