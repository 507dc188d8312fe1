"""An answer as it is generated, and whose turn it is in a chat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator

from owl2.runtime.errors import BusyError, Owl2Error
from owl2.runtime.generate import Answer, Chunk

BUSY = (
    "another thread is using this chat; wait for its answer, cancel its stream, or give each thread a chat of its own "
    "(owl.chat() or chat.fork())"
)


class AnswerStream:
    """An answer as it is generated: iterate over its chunks, then take :attr:`answer`.

    Leaving it unfinished, :meth:`cancel` or an error undo the turn: the conversation is as it was before the question.
    """

    def __init__(
        self,
        chunks: Generator[Chunk, None, Answer],
        cancelled: threading.Event,
        lock: threading.Lock,
        finish: Callable[[Answer], None],
    ) -> None:
        """Wrap a generation; :meth:`Chat.stream` and :meth:`Owl2.stream` are the usual ways.

        Args:
            chunks: the generation.
            cancelled: ends it before its next step.
            lock: held during each step.
            finish: told the answer, unless it was cancelled.
        """
        self._chunks, self._cancelled, self._lock, self._finish = chunks, cancelled, lock, finish
        self._answer: Answer | None = None
        self._replaced = False
        self._thread = threading.get_ident()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            if self._answer is not None:
                raise StopIteration
            if self._replaced:
                raise Owl2Error("a newer question was asked in this chat; this answer can no longer be generated")
            try:
                chunk = next(self._chunks)
                if chunk.finish_reason is not None:
                    next(self._chunks)  # now: the caller may not come back for more
            except StopIteration as end:
                answer: Answer = end.value
                if answer.finish_reason != "cancelled":
                    self._finish(answer)
                self._answer = answer
                if answer.finish_reason == "cancelled":
                    raise
            return chunk

    def read(self) -> Answer:
        """Generate the rest and return the whole answer."""
        for _ in self:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The finished answer; of a cancelled one, its beginning.

        Raises:
            Owl2Error: the stream has not been read to its end.
        """
        if self._answer is None:
            raise Owl2Error("the answer is not finished; read the stream to its end first")
        return self._answer

    @property
    def finished(self) -> bool:
        """Whether :attr:`answer` is available."""
        return self._answer is not None

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop before the next step; may be called from another thread. A finished answer stays as it is."""
        self._cancelled.set()

    def give_way(self) -> None:
        """End an unfinished answer, because its chat is used for something else.

        Raises:
            BusyError: another thread is reading it, and it has not been cancelled.
        """
        if not self.finished and self._thread != threading.get_ident() and not self.cancelled:
            raise BusyError(BUSY)
        self._replaced = True

    def __repr__(self) -> str:
        return f"<AnswerStream {'not finished' if self._answer is None else repr(self._answer.text)}>"
