"""Requests in, events out: each answer in a thread of its own, told to the loop that asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from owl2.runtime.generate import Answer, Chunk, check_context
from owl2.runtime.messages import read_turns, render_turns
from owl2.runtime.serve.requests import AnswerRequest, RequestError
from owl2.runtime.serve.residence import Residence, Resident
from owl2.runtime.stream import AnswerStream, stream_answer

Event = Chunk | Answer
"""The chunks of an answer, and in the end the whole of it."""


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
        self._running: set[_Running] = set()
        self._stopping = False

    @property
    def running(self) -> int:
        """Answers that are being generated, and requests that wait."""
        return self._open

    @asynccontextmanager
    async def answer(self, request: AnswerRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """The events of an answer; leaving the context ends it.

        Raises:
            RequestError: too many are waiting, or the server is stopping.
            Owl2Error: in the course of the iteration, what prompt and model raise.
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
                running = _Running(self._residence, request, asyncio.get_running_loop())
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


class _Running:
    """An answer that is being generated."""

    def __init__(self, residence: Residence, request: AnswerRequest, loop: asyncio.AbstractEventLoop) -> None:
        self._residence, self._request, self._loop = residence, request, loop
        self._events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._stream: AnswerStream | None = None
        self._cancelled = False
        self.ended = asyncio.Event()
        threading.Thread(target=self._run, name="owl2 answer", daemon=True).start()

    async def events(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    def end(self, reason: RequestError) -> None:
        """Cancel, and tell why."""
        self._events.put_nowait(reason)
        self.cancel()

    def _run(self) -> None:
        try:
            with self._residence.use() as resident:
                self._generate(resident)
        except Exception as error:  # for the one who asked
            self._tell(error)
        finally:
            self._tell(None)
            self._loop.call_soon_threadsafe(self.ended.set)

    def _generate(self, resident: Resident) -> None:
        model, request = resident.model, self._request
        if request.messages is None:
            text, images = request.prompt or "", []
        else:
            begun = request.messages[-1]["role"] == "assistant"
            wanted = [] if begun else [{"role": "assistant", "content": ""}]
            *turns, last = read_turns(model, [*request.messages, *wanted])
            text = render_turns(turns, last.question, last.answer)
            images = [image for turn in (*turns, last) for image in turn.images]
        prompt = model.encode(text, images)
        cache = resident.caches.take(prompt.keys)
        try:
            check_context(cache, prompt)
            self._stream = stream_answer(model, cache, prompt, request.config)
            if self._cancelled:
                return
            for chunk in self._stream:
                self._tell(chunk)
            self._tell(self._stream.answer)
        finally:
            resident.engine.leave()
            cache.claim()
            resident.caches.give_back(cache)

    def _tell(self, event: Event | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)
