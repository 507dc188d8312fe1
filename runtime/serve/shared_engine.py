"""One engine for many conversations at once: their tokens run in common steps, and nobody waits for a long prompt."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
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
        sequences: whose rows are to run; several where scores share a step.
        logit_rows: counted over the rows of all sequences.
        cancellation: of the conversation.
        token: whether it is one token of text, for which engines have a way of their own.
        thread: that waits.
        logits: of the rows, once it has run.
    """

    sequences: Sequence[SequenceRows]
    logit_rows: Ints
    cancellation: Cancellation
    token: bool = False
    thread: int = field(default_factory=threading.get_ident)
    logits: Future[Floats] = field(default_factory=Future)

    @property
    def count(self) -> int:
        """Its rows."""
        return sum(len(rows.embeds) for rows in self.sequences)


class SharedEngine:
    """See :class:`owl2.runtime.engine.Engine`; any number of threads may call it, each with buffers of its own.

    Short steps of all that wait run as one where the engine can do that, and one after the other where it cannot; so do
    long ones, as many as fill a step. Between two long steps every conversation that answers gets its next token.
    """

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
    def stepping(self) -> SharedEngine | None:
        return None if self._stepping is None else self

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
        return self._run(Work([SequenceRows(embeds, modality, past, buffers)], logit_rows, cancellation))

    def step(self, sequences: Sequence[SequenceRows], logit_rows: Ints, cancellation: Cancellation = NEVER) -> Floats:
        return self._run(Work(sequences, logit_rows, cancellation))

    def decode(self, embeds: Floats, past: int, buffers: KvBuffers, cancellation: Cancellation = NEVER) -> Floats:
        rows = SequenceRows(embeds, np.zeros(len(embeds), np.int64), past, buffers)
        logits: Floats = self._run(Work([rows], np.zeros(1, np.int64), cancellation, token=True))[0]
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
            (self._short if work.count <= SHORT else self._long).append(work)
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
                long = self._next_long()
                self._answering = {work.thread for work in short}
            for works in (short, long):
                try:
                    self._run_together(works)
                except BaseException as error:  # a fault of this module: nobody may wait for ever
                    for work in works:
                        if not work.logits.done():
                            work.logits.set_exception(error)
        for work in (*self._short, *self._long):
            work.logits.set_exception(BackendError(CLOSED))

    def _next_long(self) -> list[Work]:
        """Long steps that fill one together, in the order in which they came; one at least, if there is any."""
        taken: list[Work] = []
        count = 0
        while self._long and (not taken or count + self._long[0].count <= self._engine.block):
            taken.append(self._long.popleft())
            count += taken[-1].count
        return taken

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
        starts = np.cumsum([0, *(work.count for work in wanted)])
        asked = np.concatenate([work.logit_rows + start for work, start in zip(wanted, starts)])
        try:
            logits = self._stepping.step([rows for work in wanted for rows in work.sequences], asked)
        except Exception:  # perhaps of one of them alone
            for work in wanted:
                self._run_alone(work)
            return
        ends = np.cumsum([len(work.logit_rows) for work in wanted])
        for work, part in zip(wanted, np.split(logits, ends[:-1])):
            work.logits.set_result(part)

    def _run_alone(self, work: Work) -> None:
        rows = work.sequences[0]
        try:
            if len(work.sequences) > 1 and self._stepping is not None:
                logits = self._stepping.step(work.sequences, work.logit_rows, work.cancellation)
            elif work.token:
                logits = self._engine.decode(rows.embeds, rows.past, rows.buffers, work.cancellation)[None]
            else:
                logits = self._engine.prefill(
                    rows.embeds, rows.modality, rows.past, rows.buffers, work.logit_rows, work.cancellation
                )
        except BaseException as error:  # for the one who waits
            work.logits.set_exception(error)
        else:
            work.logits.set_result(logits)
