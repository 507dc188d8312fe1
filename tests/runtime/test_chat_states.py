"""Conversations that are asked, left, stopped, replaced, undone, forked and failed in any order, against cold replays.

Every answer must be the one that a new chat gives to the same messages. More steps, on any bundle, with a count of the
answers that differ: ``python tests/runtime/test_chat_states.py BUNDLE STEPS``.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from owl2 import Answer, AnswerStream, BackendError, Chat, ContextOverflowError, ImageError, Owl2, Owl2Error

ROOT = Path(__file__).parents[2]
QUESTIONS = ("What is this?", "Describe the picture.", "Why?", "And its colour?", "word " * 30, "é 你好 <s>")
CHATS = 3


@dataclass
class Difference:
    """An answer that a cold chat did not give: where it differs, and how near the two tokens are there.

    Attributes:
        position: of the first other token.
        gap: between the logits of the two tokens that the cold chat finds likeliest there.
    """

    position: int
    gap: float


@dataclass
class Told:
    """What a chat must hold: its messages, and the answer that is being streamed, with what was asked."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    open: tuple[AnswerStream, str, Path | None] | None = None


class Conversations(RuleBasedStateMachine):
    """Up to three chats of one model; ``owl``, ``images`` and ``differs`` are set by whoever runs it."""

    owl: Owl2
    images: list[Path]
    differs: Callable[[Difference], None]
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.chats: list[tuple[Chat, Told]] = [(self.owl.chat(), Told())]
        self.old: list[AnswerStream] = []

    which = st.integers(0, CHATS - 1)
    question = st.sampled_from(QUESTIONS)
    image = st.sampled_from([None, 0, 1, 2])
    tokens = st.integers(1, 8)

    def pick(self, which: int) -> tuple[Chat, Told]:
        type(self).steps += 1
        return self.chats[which % len(self.chats)]

    def path(self, image: int | None) -> Path | None:
        return None if image is None else self.images[image]

    def replace_open(self, told: Told) -> None:
        """The chat goes on without the answer that is being streamed."""
        if told.open is not None:
            self.old.append(told.open[0])
            told.open = None

    def finished(self, chat: Chat, told: Told, question: str, image: Path | None, answer: Answer, count: int) -> None:
        """Compare an answer with a cold chat's, and note its turn."""
        cold = self.owl.chat(told.messages).ask(question, images=image, max_new_tokens=count)
        if answer.ids != cold.ids:
            pairs = enumerate(zip(answer.ids, cold.ids))
            first = next((i for i, (warm, other) in pairs if warm != other), min(len(answer.ids), len(cold.ids)))
            gap = abs(answer.logprobs[first] - cold.logprobs[first]) if first < len(answer.ids) else 0.0
            type(self).differs(Difference(first, gap))
        told.messages = chat.messages
        assert told.messages[-1]["content"] == answer.text.replace("<|image|>", "<image>")

    @rule(which=which, question=question, image=image, count=tokens)
    def ask(self, which: int, question: str, image: int | None, count: int) -> None:
        chat, told = self.pick(which)
        self.replace_open(told)
        try:
            answer = chat.ask(question, images=self.path(image), max_new_tokens=count)
        except ContextOverflowError:
            chat.reset()
            told.messages = []
            return
        self.finished(chat, told, question, self.path(image), answer, count)

    @rule(which=which, question=question, image=image, chunks=st.integers(0, 4))
    def stream_and_leave(self, which: int, question: str, image: int | None, chunks: int) -> None:
        chat, told = self.pick(which)
        self.replace_open(told)
        with suppress(ContextOverflowError):
            stream = chat.stream(question, images=self.path(image), max_new_tokens=8)
            told.open = stream, question, self.path(image)
            for _ in range(chunks):
                if next(stream, None) is None or stream.finished:
                    break
            if stream.finished:
                told.open = None
                self.finished(chat, told, question, self.path(image), stream.answer, 8)

    @rule(which=which)
    def read_to_the_end(self, which: int) -> None:
        chat, told = self.pick(which)
        if told.open is not None:
            stream, question, image = told.open
            told.open = None
            self.finished(chat, told, question, image, stream.read(), 8)

    @rule(which=which)
    def cancel(self, which: int) -> None:
        _, told = self.pick(which)
        if told.open is not None:
            stream, _, _ = told.open
            told.open = None
            stream.cancel()
            assert list(stream) == []
            assert stream.answer.finish_reason == "cancelled"

    @precondition(lambda self: self.old)
    @rule(number=st.integers(0, 100), cancel=st.booleans())
    def read_an_old_stream(self, number: int, cancel: bool) -> None:
        type(self).steps += 1
        stream = self.old[number % len(self.old)]
        if cancel:
            stream.cancel()
            assert list(stream) == []
        elif not stream.cancelled:
            with pytest.raises(Owl2Error, match="can no longer be generated"):
                next(stream)

    @rule(which=which)
    def reset(self, which: int) -> None:
        chat, told = self.pick(which)
        self.replace_open(told)
        chat.reset()
        told.messages = []

    @rule(which=which)
    def undo(self, which: int) -> None:
        chat, told = self.pick(which)
        if told.messages:
            self.replace_open(told)
            chat.undo()
            told.messages = told.messages[:-2]
        else:
            with pytest.raises(Owl2Error, match="no turn to undo"):
                chat.undo()

    @rule(which=which)
    def fork(self, which: int) -> None:
        chat, told = self.pick(which)
        made = chat.fork(), Told(list(told.messages))
        if len(self.chats) < CHATS:
            self.chats.append(made)
        else:
            self.replace_open(self.chats[-1][1])
            self.chats[-1] = made

    @rule(which=which, question=question, image=image, after=st.integers(0, 4))
    def fail(self, which: int, question: str, image: int | None, after: int) -> None:
        """The engine fails at a step of the answer."""
        chat, told = self.pick(which)
        self.replace_open(told)
        engine, left = self.owl.model.engine, [after]
        steps: dict[str, Callable[..., Any]] = {"decode": engine.decode, "prefill": engine.prefill}

        def failing(name: str) -> Callable[..., Any]:
            def step(*arguments: Any) -> Any:
                if left[0] == 0:
                    raise BackendError("this step fails")
                left[0] -= 1
                return steps[name](*arguments)

            return step

        vars(engine).update({name: failing(name) for name in steps})
        try:
            answer = chat.ask(question, images=self.path(image), max_new_tokens=5)
        except (BackendError, ContextOverflowError):
            answer = None
        finally:
            for name in steps:
                del vars(engine)[name]
        if answer is not None:
            self.finished(chat, told, question, self.path(image), answer, 5)

    @rule(which=which)
    def refuse(self, which: int) -> None:
        chat, _ = self.pick(which)
        with pytest.raises(ContextOverflowError):
            chat.ask("word " * self.owl.context)
        with pytest.raises(ImageError):
            chat.ask("What?", images="nowhere.png")

    @rule(which=which, question=question, image=image, wait=st.floats(0, 0.02), count=tokens)
    def stop_from_another_thread_and_ask(
        self, which: int, question: str, image: int | None, wait: float, count: int
    ) -> None:
        chat, told = self.pick(which)
        self.replace_open(told)
        with suppress(ContextOverflowError):
            stream = chat.stream("Describe it at length.", images=self.path(0), max_new_tokens=40)
            reading = threading.Thread(target=_read, args=(stream,))
            reading.start()
            time.sleep(wait)
            stream.cancel()
            answer = None
            with suppress(ContextOverflowError):
                answer = chat.ask(question, images=self.path(image), max_new_tokens=count)
            reading.join()
            before = chat.messages[:-2] if answer is not None else chat.messages
            if len(before) > len(told.messages):  # it was complete before it was stopped
                told.messages = before
            if answer is not None:
                self.finished(chat, told, question, self.path(image), answer, count)

    @invariant()
    def messages_are_those_of_finished_turns(self) -> None:
        for chat, told in self.chats:
            assert chat.messages == told.messages


def _read(stream: AnswerStream) -> None:
    with suppress(Owl2Error):
        for _ in stream:
            pass


def run(owl: Owl2, images: list[Path], differs: Callable[[Difference], None], examples: int, steps: int) -> int:
    """Run conversations of at most ``steps`` steps each; returns how many steps were made."""
    machine = type("Machine", (Conversations,), {"owl": owl, "images": images, "differs": differs, "steps": 0})
    given = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=given)
    made: int = vars(machine)["steps"]
    return made


@pytest.mark.slow
def test_every_answer_is_that_of_a_cold_chat(bundle_a1: Path, golden: Path) -> None:
    differences: list[Difference] = []
    images = sorted((golden / "images").glob("*.png"))[:3]
    with Owl2.load(bundle_a1, threads=1, context=512) as owl:
        steps = run(owl, images, differences.append, examples=12, steps=40)
    assert steps > 250
    assert differences == []


def main() -> None:
    bundle, wanted = sys.argv[1], int(sys.argv[2])
    images = sorted((ROOT / "sample" / "pictures").glob("*.png"))[:3]
    differences: list[Difference] = []
    with Owl2.load(bundle, threads=1) as owl:
        made = run(owl, images, differences.append, examples=-(-wanted // 40), steps=50)
    gaps = np.array([difference.gap for difference in differences])
    print(f"{made} steps, {len(differences)} answers differ from a cold chat's")
    if len(gaps):
        print(f"log-probabilities of the two first tokens that differ: {gaps.max():.3g} apart at most")


if __name__ == "__main__":
    main()
