"""An answer as it is generated, and whose turn it is in a chat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import NoReturn

from owl2.runtime.cancellation import Cancellation
from owl2.runtime.errors import BusyError, Owl2Error
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.generate import Answer, Chunk, generate
from owl2.runtime.kv_cache import Claim, KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.sampling import GenerationConfig

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
        claim: Claim,
        cancellation: Cancellation,
        lock: threading.Lock,
        finish: Callable[[Answer], None],
    ) -> None:
        """Wrap a generation, as :func:`stream_answer` does.

        Args:
            chunks: the generation.
            claim: that it writes with.
            cancellation: that ends it.
            lock: held during each step.
            finish: told the answer, unless it was cancelled.
        """
        self._chunks, self._claim, self._cancellation = chunks, claim, cancellation
        self._lock, self._finish = lock, finish
        self._answer: Answer | None = None
        self._problem = ""
        self._thread = threading.get_ident()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            if self._answer is not None:
                raise StopIteration
            if not self._cancellation:
                self._claim.check()
            if self._problem:
                raise Owl2Error(f"this answer can no longer be generated: {self._problem}; ask again")
            self._thread = threading.get_ident()
            self._problem = "it was interrupted"  # until the step has ended in another way
            try:
                chunk = next(self._chunks)
                answer = None if chunk.finish_reason is None else self._end()
            except StopIteration as end:  # cancelled
                self._answer, self._problem = end.value, ""
                raise
            except BaseException as error:
                self._problem = f"it was stopped by {type(error).__name__}"
                raise
            if answer is not None:
                # The answer first: an interrupt before the turn counts leaves the chat without it.
                self._answer = answer
                self._finish(answer)
            self._problem = ""
            return chunk

    def _end(self) -> Answer:
        """The answer, once its last chunk has been made: the caller may not come back for more."""
        try:
            next(self._chunks)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        raise RuntimeError("a chunk came after the last one")

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
        return bool(self._cancellation)

    def cancel(self) -> None:
        """Stop the step that runs, or before the next; may be called from another thread.

        A finished answer stays as it is.
        """
        self._cancellation.cancel()

    def require_own(self) -> None:
        """Refuse to touch the chat while another thread is reading this answer.

        Raises:
            BusyError: it can still be read on, and has not been cancelled.
        """
        over = self.finished or self.cancelled or bool(self._problem) or not self._claim.counts
        if not over and self._thread != threading.get_ident():
            raise BusyError(BUSY)

    def __reduce__(self) -> NoReturn:
        raise Owl2Error("a stream cannot be pickled; read it to its end and send stream.answer")

    def __repr__(self) -> str:
        return f"<AnswerStream {'not finished' if self._answer is None else repr(self._answer.text)}>"


def stream_answer(
    model: Loaded,
    cache: KvCache,
    prompt: Prompt,
    config: GenerationConfig,
    *,
    preprocess_seconds: float = 0.0,
    lock: threading.Lock | None = None,
    finish: Callable[[Answer], None] | None = None,
) -> AnswerStream:
    """Answer a prompt as :func:`generate`, step by step as the stream is read; nothing runs before.

    From now on, earlier answers that use the cache can no longer be generated.

    Args:
        model: what runs.
        cache: of the conversation.
        prompt: fewer positions than the context.
        config: how tokens are chosen and when to stop.
        preprocess_seconds: counted in the time to the first token.
        lock: held during each step; None if nothing else uses the cache.
        finish: told the answer, unless it was cancelled.

    Raises:
        ConfigError: a schema or an expression that cannot be followed.
    """
    grammar = model.grammars.compile(config) if config.is_constrained else None  # first: it may be refused
    claim, cancellation = cache.claim(), Cancellation()
    chunks = generate(model, claim, prompt, config, cancellation, preprocess_seconds, grammar)
    return AnswerStream(chunks, claim, cancellation, lock or threading.Lock(), finish or (lambda _: None))
