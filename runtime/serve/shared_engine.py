"""One engine for many conversations at once: their tokens run in common steps, and nobody waits for a long prompt."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from owl2.runtime.cancellation import NEVER, Cancellation, StoppedError
from owl2.runtime.engine import CLOSED, Engine, Floats, Ints, KvBuffers, KvTransfer, SequenceRows
from owl2.runtime.errors import BackendError

SHORT = 16
"""Rows of a step that runs together with others: a token, or a token and its draft."""
GATHER_SECONDS = 0.01
"""How long a step waits for the conversations of the step before: they are choosing their next token."""


@dataclass(eq=False)
class Work:
    """A step that a conversation waits for.

    Attributes:
        rows: to run.
        logit_rows: counted from the first of ``rows``.
        cancellation: of the conversation.
        token: whether it is one token of text, for which engines have a way of their own.
        thread: that waits.
        logits: of the rows, once it has run.
    """

    rows: SequenceRows
    logit_rows: Ints
    cancellation: Cancellation
    token: bool = False
    thread: int = field(default_factory=threading.get_ident)
    logits: Future[Floats] = field(default_factory=Future)

    @property
    def short(self) -> bool:
        return len(self.rows.embeds) <= SHORT


class SharedEngine:
    """See :class:`owl2.runtime.engine.Engine`; any number of threads may call it, each with buffers of its own.

    Short steps of all that wait run as one where the engine can do that, and one after the other where it cannot.
    Between two blocks of a long prompt every conversation that answers gets its next token.
    """

    stepping = None
    """Steps of several conversations are made here, of what their threads ask for."""

    def __init__(self, engine: Engine) -> None:
        """Share an engine, which does the work."""
        self._engine, self._stepping = engine, engine.stepping
        self._changed = threading.Condition()
        self._short: deque[Work] = deque()
        self._long: deque[Work] = deque()
        self._answering: set[int] = set()
        self._closed = False
        self._worker = threading.Thread(target=self._serve, name="owl2 steps", daemon=True)
        self._worker.start()

    @property
    def context(self) -> int | None:
        return self._engine.context

    @property
    def block(self) -> int:
        return self._engine.block

    @property
    def rows_are_independent(self) -> bool:
        return self._engine.rows_are_independent

    @property
    def kv_transfer(self) -> KvTransfer | None:
        return self._engine.kv_transfer

    def allocate(self, capacity: int, previous: KvBuffers | None) -> KvBuffers:
        return self._engine.allocate(capacity, previous)

    def encode_images(self, pixels: Floats, cancellation: Cancellation = NEVER) -> Floats:
        return self._engine.encode_images(pixels, cancellation)

    def prefill(
        self,
        embeds: Floats,
        modality: Ints,
        past: int,
        buffers: KvBuffers,
        logit_rows: Ints,
        cancellation: Cancellation = NEVER,
    ) -> Floats:
        return self._run(Work(SequenceRows(embeds, modality, past, buffers), logit_rows, cancellation))

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        rows = SequenceRows(embeds, np.zeros(len(embeds), np.int64), past, buffers)
        logits: Floats = self._run(Work(rows, np.zeros(1, np.int64), cancellation, token=True))[0]
        return logits

    def leave(self) -> None:
        """Say that the calling thread has no further step: others need not wait for it."""
        with self._changed:
            self._answering.discard(threading.get_ident())
            self._changed.notify_all()

    def close(self) -> None:
        """Give the engine's memory back; steps that wait, and later ones, raise BackendError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()
        self._engine.close()

    def _run(self, work: Work) -> Floats:
        work.cancellation.check()
        with self._changed:
            if self._closed:
                raise BackendError(CLOSED)
            (self._short if work.short else self._long).append(work)
            self._changed.notify_all()
        return work.logits.result()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._short or self._long)
                if self._closed:
                    break
                self._gather()
                short = list(self._short)
                self._short.clear()
                long = None if not self._long else self._long.popleft()
                self._answering = {work.thread for work in short}
            if short:
                self._run_together(short)
            if long is not None:
                self._run_alone(long)
        for work in (*self._short, *self._long):
            work.logits.set_exception(BackendError(CLOSED))

    def _gather(self) -> None:
        """Wait a moment for those that took part in the last step."""
        until = time.monotonic() + GATHER_SECONDS
        while not self._closed and self._answering - {work.thread for work in (*self._short, *self._long)}:
            if not self._changed.wait(max(0.0, until - time.monotonic())):
                break

    def _run_together(self, works: list[Work]) -> None:
        wanted = []
        for work in works:
            if work.cancellation:
                work.logits.set_exception(StoppedError())
            else:
                wanted.append(work)
        if len(wanted) < 2 or self._stepping is None:
            for work in wanted:
                self._run_alone(work)
            return
        starts = np.cumsum([0, *(len(work.rows.embeds) for work in wanted)])
        asked = np.concatenate([work.logit_rows + start for work, start in zip(wanted, starts)])
        try:
            logits = self._stepping.step([work.rows for work in wanted], asked)
        except Exception:  # perhaps of one of them alone
            for work in wanted:
                self._run_alone(work)
            return
        ends = np.cumsum([len(work.logit_rows) for work in wanted])
        for work, part in zip(wanted, np.split(logits, ends[:-1])):
            work.logits.set_result(part)

    def _run_alone(self, work: Work) -> None:
        rows = work.rows
        try:
            if work.token:
                logits = self._engine.decode(rows.embeds, rows.past, rows.buffers, work.cancellation)[None]
            else:
                logits = self._engine.prefill(
                    rows.embeds, rows.modality, rows.past, rows.buffers, work.logit_rows, work.cancellation
                )
        except BaseException as error:  # for the one who waits
            work.logits.set_exception(error)
        else:
            work.logits.set_result(logits)
