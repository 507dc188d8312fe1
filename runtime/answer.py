"""An answer: streamed by iterating over it, or read as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from owl2.runtime.errors import Owl2Error
from owl2.runtime.generate import Chunk, FinishReason, Run, Stats


class Answer:
    """A generation that runs while it is read.

    Iterate over it to stream :class:`Chunk` records, or take :attr:`text`, which runs it to its end. Leaving the
    loop early, :meth:`cancel` or an error undo it: the conversation is as it was before the question.
    """

    def __init__(
        self,
        start: Callable[[Run], Iterator[Chunk]],
        finish: Callable[[str], None] | None = None,
        *,
        preprocess_seconds: float = 0.0,
    ) -> None:
        """An answer that has not started.

        Args:
            start: begins the generation; called once.
            finish: told the whole text when, and only when, the generation reached its end.
            preprocess_seconds: what preparing the images took.
        """
        self._start = start
        self._finish = finish
        self._run = Run(Stats(preprocess_seconds=preprocess_seconds))
        self._parts: list[str] = []
        self._state = "waiting"
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Chunk]:
        if self._state != "waiting":
            raise Owl2Error(f"this answer is {self._state} and cannot be streamed again; its text is in .text")
        self._state = "running"
        try:
            for chunk in self._start(self._run):
                self._parts.append(chunk.text)
                if self._run.finish_reason is not None and not self._run.cancelled:
                    # Before the last chunk is handed out: a caller may never come back for more.
                    self._state = "finished"
                    if self._finish is not None:
                        self._finish("".join(self._parts))
                yield chunk
        except Exception as error:
            self._error = error
            raise
        finally:
            if self._state != "finished":
                self._state = "cancelled"

    def cancel(self) -> None:
        """Stop after the step in progress; may be called from another thread. A finished answer stays as it is."""
        self._run.cancelled = True

    @property
    def text(self) -> str:
        """The whole text; runs the generation if it has not started. An error is raised again each time."""
        if self._state == "waiting":
            for _ in self:
                pass
        if self._error is not None:
            raise self._error
        return "".join(self._parts)

    @property
    def ids(self) -> list[int]:
        """The sampled ids so far."""
        return list(self._run.ids)

    @property
    def stats(self) -> Stats:
        """Figures of the generation so far."""
        return self._run.stats

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended: ``stop``, ``length`` (max_new_tokens) or ``context`` (full); None if it did not."""
        return self._run.finish_reason

    @property
    def state(self) -> str:
        """waiting, running, finished or cancelled."""
        return self._state

    def __str__(self) -> str:
        return self.text
