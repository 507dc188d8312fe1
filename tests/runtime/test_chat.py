"""Conversations: what is reused, what a failed or abandoned turn leaves, messages in and out, threads."""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Case
from conftest import MakeCheckpoint
from PIL import Image

from owl2 import (
    Answer,
    BackendError,
    BusyError,
    Chat,
    Chunk,
    ConfigError,
    ContextOverflowError,
    ImageError,
    ImageReading,
    Owl2,
    Owl2Error,
    PromptError,
)
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime.engine import Engine, Floats, KvBuffers
from owl2.runtime.families.mplug_owl2.template import Message, render


def ask_first(case: Case) -> tuple[Chat, str]:
    """A chat with one turn about an image, and its answer."""
    chat = case.owl.chat()
    return chat, chat.ask("What is this?", images=case.files[:1], max_new_tokens=6).text


def engine_of(case: Case) -> type[Engine]:
    return type(case.owl.model.engine)


class TestReuse:
    def test_second_turn_equals_a_cold_start(self, case: Case) -> None:
        chat, first = ask_first(case)
        second = chat.ask("And its colour?", max_new_tokens=12)
        prompt = render(
            [
                Message("USER", "<|image|>What is this?"),
                Message("ASSISTANT", first),
                Message("USER", "And its colour?"),
                Message("ASSISTANT"),
            ]
        )
        cold = case.owl.generate(prompt, images=case.files[:1], max_new_tokens=12)
        assert (second.text, second.ids) == (cold.text, cold.ids)
        assert second.stats.images_encoded == 0
        assert second.stats.reused_tokens > case.owl.config.rows_per_image
        assert second.stats.prompt_tokens == cold.stats.prompt_tokens
        assert cold.stats.reused_tokens == 0

    def test_reused_prefix_has_the_logits_of_a_cold_start(self, case: Case) -> None:
        """The log-probabilities of the chosen tokens depend on every cached position."""
        chat, _ = ask_first(case)
        again = case.owl.chat(messages=chat.messages)
        warm = chat.ask("Why?", max_new_tokens=8)
        cold = again.ask("Why?", max_new_tokens=8)
        assert cold.stats.reused_tokens == 0
        np.testing.assert_allclose(warm.logprobs, cold.logprobs, atol=1e-4, rtol=0)

    def test_another_image_is_not_taken_for_the_first(self, case: Case) -> None:
        chat = case.owl.chat()
        chat.ask("q", images=case.files[:1], max_new_tokens=4)
        chat.reset()
        warm = chat.ask("q", images=case.files[1:2], max_new_tokens=4)
        cold = case.owl.chat().ask("q", images=case.files[1:2], max_new_tokens=4)
        assert warm.text == cold.text
        assert warm.stats.reused_tokens == 0

    def test_kv_buffers_are_written_in_place_and_grow(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        allocate = engine_of(case).allocate
        sizes: list[int] = []

        def counted(self: Engine, capacity: int, previous: KvBuffers | None) -> KvBuffers:
            sizes.append(capacity)
            return allocate(self, capacity, previous)

        monkeypatch.setattr(engine_of(case), "allocate", counted)
        chat = case.owl.chat()
        chat.ask("q", images=case.files[:1], max_new_tokens=4)
        chat.ask("r", max_new_tokens=4)
        assert len(sizes) == 1
        stats = chat.ask("word " * 120, max_new_tokens=4).stats
        assert len(sizes) == 2
        assert sizes[1] == stats.kv_cache_positions > sizes[0]

    def test_keys_of_stretched_positions_are_not_reused(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        """Dynamic scaling turns the keys of a long sequence by other angles than those of a short one."""
        scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 48}
        export_bundle(ExportConfig(make_checkpoint(top=scaling), tmp_path / "bundle", weights="fp32"))
        owl = Owl2.load(tmp_path / "bundle", context=400)

        def logprobs(chat: Chat, question: str) -> tuple[float, ...]:
            return chat.ask(question, max_new_tokens=4).logprobs

        chat = owl.chat()
        next(chat.stream("word " * 40))  # longer than the limit, and left again
        np.testing.assert_allclose(logprobs(chat, "Hi"), logprobs(owl.chat(), "Hi"), atol=1e-5, rtol=0)
        second = chat.ask("Hello", max_new_tokens=4)
        assert second.stats.reused_tokens > 0  # as long as everything stays short, the cache is used
        again = owl.chat(messages=chat.messages)
        warm, cold = logprobs(chat, "word " * 40), logprobs(again, "word " * 40)
        np.testing.assert_allclose(warm, cold, atol=1e-5, rtol=0)


class TestUnfinished:
    """A turn that does not come to its end leaves the conversation as it was."""

    def expect_as_before(self, case: Case, chat: Chat, before: list[dict[str, Any]]) -> None:
        assert chat.messages == before
        expected = ask_first(case)[0].ask("Why?", max_new_tokens=8).text
        assert chat.ask("Why?", max_new_tokens=8).text == expected

    def test_leaving_a_stream_half_read(self, case: Case) -> None:
        chat, _ = ask_first(case)
        before = chat.messages
        for chunk in chat.stream("And then?", images=case.files[1:3], max_new_tokens=50):
            if chunk.text:
                break
        self.expect_as_before(case, chat, before)

    def test_a_refused_question(self, case: Case) -> None:
        chat, _ = ask_first(case)
        before = chat.messages
        with pytest.raises(PromptError, match=r"has 2 <\|image\|> placeholders, but 1 image given"):
            chat.ask("<|image|> or <|image|>?", images=case.files[:1])
        with pytest.raises(ContextOverflowError, match=f"the context holds {case.owl.context} positions"):
            chat.ask("word " * 3000)
        with pytest.raises(ConfigError, match="preprocess 'stretch' is not known; use resize, pad, crop"):
            chat.ask("What?", images=case.files[:1], preprocess="stretch")
        self.expect_as_before(case, chat, before)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_failing_step(self, case: Case, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
        chat, _ = ask_first(case)
        before = chat.messages
        decode = engine_of(case).decode
        calls: list[int] = []

        def failing(self: Engine, embeds: Floats, past: int, buffers: KvBuffers, *others: Any) -> Floats:
            calls.append(1)
            if len(calls) == 3:
                raise error("the third step fails")
            return decode(self, embeds, past, buffers, *others)

        monkeypatch.setattr(engine_of(case), "decode", failing)
        with pytest.raises(error, match="third step"):
            chat.ask("Why?", max_new_tokens=8)
        monkeypatch.undo()
        self.expect_as_before(case, chat, before)

    def test_a_stream_that_failed_says_so(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        chat, _ = ask_first(case)
        before = chat.messages
        stream = chat.stream("Why?", max_new_tokens=8)
        next(stream)

        def failing(*_: Any) -> Any:
            raise BackendError("the step fails")

        monkeypatch.setattr(engine_of(case), "decode", failing)
        with pytest.raises(BackendError, match="the step fails"):
            stream.read()
        monkeypatch.undo()
        for step in (lambda: next(stream), stream.read):
            with pytest.raises(Owl2Error, match="it was stopped by BackendError; ask again"):
                step()
        self.expect_as_before(case, chat, before)

    def test_a_refused_question_leaves_an_unfinished_answer_alone(self, case: Case) -> None:
        chat, _ = ask_first(case)
        stream = chat.stream("Why?", max_new_tokens=6)
        first = next(stream)
        with pytest.raises(PromptError, match="the question is empty"):
            chat.ask("")
        assert (first.text + stream.read().text).endswith(stream.answer.text)
        assert len(chat.messages) == 4

    def test_an_abandoned_stream_does_not_disturb_the_next_question(self, case: Case) -> None:
        chat, _ = ask_first(case)
        stream = chat.stream("And then?", max_new_tokens=50)
        next(stream)
        self.expect_as_before(case, chat, chat.messages)
        with pytest.raises(Owl2Error, match="can no longer be generated: its chat went on without it; ask again"):
            next(stream)
        with pytest.raises(Owl2Error, match="the answer is not finished; read the stream to its end"):
            _ = stream.answer
        assert len(chat.messages) == 4

    def test_reset_while_an_answer_streams(self, case: Case) -> None:
        chat, _ = ask_first(case)
        stream = chat.stream("Why?", max_new_tokens=50)
        next(stream)
        chat.reset()
        with pytest.raises(Owl2Error, match="can no longer be generated"):
            next(stream)
        assert chat.messages == []
        assert chat.ask("Hi", max_new_tokens=5).text == case.owl.chat().ask("Hi", max_new_tokens=5).text

    def test_cancelling(self, case: Case) -> None:
        chat, _ = ask_first(case)
        before = chat.messages
        stream = chat.stream("And then?", max_new_tokens=50)
        read = []
        for chunk in stream:
            read.append(chunk.text)
            if len(read) == 3:
                stream.cancel()
        assert (len(read), stream.answer.finish_reason) == (3, "cancelled")
        assert stream.answer.text == "".join(read)
        self.expect_as_before(case, chat, before)

    def test_cancelling_before_the_start_runs_nothing(self, case: Case) -> None:
        chat = case.owl.chat()
        stream = chat.stream("Hi", images=case.files[0], max_new_tokens=1)
        stream.cancel()
        assert list(stream) == []
        assert (stream.answer.stats.images_encoded, stream.answer.stats.kv_cache_positions) == (0, 0)
        assert (stream.answer.text, stream.answer.stats.generated_tokens) == ("", 0)
        assert chat.messages == []

    def test_cancelling_takes_effect_between_blocks_of_a_long_prompt(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = case.owl.chat().stream("word " * 80, max_new_tokens=5)
        prefill = engine_of(case).prefill
        blocks: list[int] = []

        def counted(self: Engine, embeds: Floats, *others: Any) -> Floats:
            blocks.append(len(embeds))
            stream.cancel()
            return prefill(self, embeds, *others)

        monkeypatch.setattr(engine_of(case), "block", 32)
        monkeypatch.setattr(engine_of(case), "prefill", counted)
        assert list(stream) == []
        assert blocks == [32]


class TestMessages:
    def test_they_can_be_read_while_an_answer_streams(self, case: Case) -> None:
        chat, first = ask_first(case)
        stream = chat.stream("Why?", max_new_tokens=8)
        seen = [(chunk.text, len(chat.messages)) for chunk in stream]
        # The turn counts with the last chunk: a caller may not come back for more.
        assert [count for _, count in seen] == [2] * (len(seen) - 1) + [4]
        assert [message["content"] for message in chat.messages[1::2]] == [first, stream.answer.text]

    def test_images_stand_where_they_were_asked_about(self, case: Case) -> None:
        chat = case.owl.chat()
        one, two = case.files[:2]
        chat.ask("A <|image|> and <|image|>?", images=[one, two], preprocess="pad", max_new_tokens=3)
        chat.ask("<|image|>", images=one, max_new_tokens=3)
        assert [message["content"] for message in chat.messages[::2]] == [
            [
                {"type": "text", "text": "A "},
                {"type": "image", "image": one, "preprocess": "pad"},
                {"type": "text", "text": " and "},
                {"type": "image", "image": two, "preprocess": "pad"},
                {"type": "text", "text": "?"},
            ],
            [{"type": "image", "image": one}],
        ]
        again = case.owl.chat(messages=chat.messages)
        assert again.messages == chat.messages
        assert again.ask("Why?", max_new_tokens=6).ids == chat.ask("Why?", max_new_tokens=6).ids

    def test_how_images_were_read_goes_with_them(self, case: Case) -> None:
        chat, image = case.owl.chat(), Image.new("RGBA", (30, 20))
        for reading in (ImageReading("stored", "#ff0000"), ImageReading(background=None), None):
            chat.ask("What?", image, reading=reading, max_new_tokens=3)
        parts = [{"type": "image", "image": image} for _ in range(3)]
        parts[0] |= {"orientation": "stored", "background": "#ff0000"}
        parts[1] |= {"background": None}
        assert [message["content"][0] for message in chat.messages[::2]] == parts
        again = case.owl.chat(messages=chat.messages).ask("Why?", max_new_tokens=6)
        assert again.ids == chat.ask("Why?", max_new_tokens=6).ids
        assert [record.background for record in again.images] == ["#ff0000", None, "white"]
        with pytest.raises(ConfigError, match="reading must be an ImageReading, got 'stored'"):
            chat.ask("What?", image, reading="stored")  # type: ignore[arg-type]

    def test_the_context_is_checked_before_an_image_is_read(self, case: Case) -> None:
        missing = ["missing.png"] * (case.owl.context // case.owl.config.rows_per_image + 1)
        chat = case.owl.chat()
        with pytest.raises(ContextOverflowError):
            chat.ask("What?", missing)
        with pytest.raises(ContextOverflowError):
            case.owl.generate("<|image|>" * len(missing) + "What?", images=missing)
        with pytest.raises(ContextOverflowError):
            case.owl.logits("<|image|>" * len(missing) + "What?", images=missing)
        history = [{"type": "image", "image": image} for image in missing]
        with pytest.raises(ContextOverflowError, match="leave out the messages with the first images"):
            case.owl.chat([{"role": "user", "content": history}, {"role": "assistant", "content": "x"}])
        with pytest.raises(ImageError, match=r"missing\.png"):
            chat.ask("What?", missing[:1])

    def test_a_history_of_another_program(self, case: Case) -> None:
        path = case.files[0]
        with Image.open(path) as image:
            loaded = image.convert("RGB")
        parts = [{"type": "image", "image": loaded}, {"type": "text", "text": "Hi"}]
        chat = case.owl.chat([{"role": "user", "content": parts}, {"role": "assistant", "content": "Hello"}])
        expected = case.owl.generate(
            "USER: <|image|>Hi ASSISTANT: Hello</s>USER: Why? ASSISTANT:", images=path, max_new_tokens=6
        )
        assert chat.ask("Why?", max_new_tokens=6).ids == expected.ids

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("Hi", r"messages must be a list of \{'role': …, 'content': …\}, got str"),
            (3, "messages must be a list of .*, got int"),
            (["Hi"], r"message 0 is 'Hi', expected \{'role': …, 'content': …\}"),
            (
                [{"role": "system", "content": "x"}],
                "message 0 has the role 'system', expected 'user'.*no system message",
            ),
            ([{"role": "user", "content": "x"}], "the last message is the user's; leave it out and ask it"),
            (
                [{"role": "user", "content": 3}, {"role": "assistant", "content": ""}],
                "must be a text or a list of parts",
            ),
            (
                [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": ""}],
                r"message 0 has the part \{'type': 'audio'\}, expected \{'type': 'text'",
            ),
            (
                [{"role": "user", "content": [{"type": "image", "image": "a.png", "preproces": "pad"}]}] * 2,
                "message 1 has the role 'user', expected 'assistant'",
            ),
            (
                [
                    {"role": "user", "content": [{"type": "image", "image": "a.png", "preproces": "pad"}]},
                    {"role": "assistant", "content": "x"},
                ],
                r"message 0 has the part .*\(and perhaps preprocess, orientation, background\)",
            ),
            ([{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}], "message 0 is empty"),
            (
                [{"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": ""}],
                r"1 <\|image\|> placeholder, but 0 images given",
            ),
            (
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<|image|>"}],
                "message 1 has an image; only the user's messages may",
            ),
        ],
    )
    def test_what_is_not_a_history(self, case: Case, messages: Any, message: str) -> None:
        with pytest.raises(PromptError, match=message):
            case.owl.chat(messages=messages)

    def test_an_image_of_the_history_that_cannot_be_read(self, case: Case) -> None:
        parts = [{"type": "image", "image": "nowhere.png"}]
        with pytest.raises(ImageError, match=r"cannot read nowhere\.png"):
            case.owl.chat([{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}])

    def test_a_placeholder_that_the_model_wrote_stands_for_no_image(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat, _ = ask_first(case)
        last = chat.ask("Why?", max_new_tokens=2)

        def written(*_: object) -> Generator[Chunk, None, Answer]:
            yield Chunk("It is <|image|>.", 5, 0.0, "stop")
            return replace(last, text="It is <|image|>.")

        monkeypatch.setattr("owl2.runtime.stream.generate", written)
        assert chat.ask("What?").text == "It is <|image|>."
        assert chat.messages[-1]["content"] == "It is <image>."

    def test_what_the_caller_changes_later_is_not_seen(self, case: Case) -> None:
        pixels = np.full((20, 20, 3), 200, np.uint8)
        chat = case.owl.chat()
        chat.ask("What?", images=pixels, max_new_tokens=3)
        pixels[:] = 0
        chat.messages[0]["content"][0]["image"] = "nowhere.png"
        again = case.owl.chat(chat.messages)
        assert again.ask("Why?", max_new_tokens=4).ids == chat.ask("Why?", max_new_tokens=4).ids

    def test_undo(self, case: Case) -> None:
        chat, _ = ask_first(case)
        before = chat.messages
        chat.ask("Why?", images=case.files[1], max_new_tokens=4)
        chat.undo()
        assert chat.messages == before
        assert chat.ask("Why?", max_new_tokens=8).text == ask_first(case)[0].ask("Why?", max_new_tokens=8).text
        chat.undo()
        chat.undo()
        with pytest.raises(Owl2Error, match="no turn to undo"):
            chat.undo()

    def test_a_fork_goes_its_own_way_and_runs_nothing_again(self, case: Case) -> None:
        chat, _ = ask_first(case)
        other = chat.fork()
        answers = [chat.ask("Why?", max_new_tokens=8), other.ask("Why?", max_new_tokens=8)]
        assert answers[0].ids == answers[1].ids
        assert answers[0].stats.reused_tokens == answers[1].stats.reused_tokens > case.owl.config.rows_per_image
        other.ask("More", max_new_tokens=4)
        assert (len(chat.messages), len(other.messages)) == (4, 6)
        assert (
            chat.ask("And?", max_new_tokens=8).ids == case.owl.chat(chat.messages[:4]).ask("And?", max_new_tokens=8).ids
        )

    def test_representations(self, case: Case) -> None:
        chat, first = ask_first(case)
        assert f"<Chat of {case.bundle}: 1 turn, " in repr(chat)
        stream = chat.stream("Hi", max_new_tokens=1)
        assert repr(stream) == "<AnswerStream not finished>"
        list(stream)
        assert repr(stream) == f"<AnswerStream {stream.answer.text!r}>"
        assert repr(stream.answer).startswith("Answer(text=")
        assert first


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Results and errors of threads that start at the same time."""
    barrier = threading.Barrier(count)

    def run(index: int) -> Any:
        barrier.wait()
        try:
            return work(index)
        except Owl2Error as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class TestThreads:
    def test_one_chat_used_by_four_threads_says_so_and_loses_nothing(self, case: Case) -> None:
        chat, _ = ask_first(case)
        results = together(4, lambda index: chat.ask(f"Question {index}?", max_new_tokens=40))
        answers = {index: result for index, result in enumerate(results) if isinstance(result, Answer)}
        errors = [result for result in results if not isinstance(result, Answer)]
        assert answers
        assert all(
            isinstance(error, BusyError) and "another thread is using this chat" in str(error) for error in errors
        )
        asked = [message["content"] for message in chat.messages[2::2]]
        assert sorted(asked) == sorted(f"Question {index}?" for index in answers)
        told = dict(zip(asked, [message["content"] for message in chat.messages[3::2]]))
        assert told == {f"Question {index}?": answer.text for index, answer in answers.items()}
        cold = case.owl.chat(messages=chat.messages)
        assert chat.ask("Why?", max_new_tokens=8).ids == cold.ask("Why?", max_new_tokens=8).ids

    def test_different_chats_of_one_model_do_not_meet(self, case: Case) -> None:
        def talk(index: int) -> list[tuple[int, ...]]:
            chat = case.owl.chat()
            image = case.files[index % len(case.files)]
            return [chat.ask(q, i, max_new_tokens=8).ids for q, i in (("What?", image), ("Why?", None))]

        assert together(4, talk) == [talk(index) for index in range(4)]

    def test_a_stream_of_another_thread_is_in_the_way_until_it_is_cancelled(self, case: Case) -> None:
        chat, _ = ask_first(case)
        stream = chat.stream("Why?", max_new_tokens=50)
        next(stream)
        (error,) = together(1, lambda _: chat.ask("Hi"))
        assert isinstance(error, BusyError)
        next(stream)
        stream.cancel()
        (answer,) = together(1, lambda _: chat.ask("Hi", max_new_tokens=4))
        assert answer.text == ask_first(case)[0].ask("Hi", max_new_tokens=4).text

    def test_asking_after_a_cancel_waits_for_the_step_in_progress(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat, _ = ask_first(case)
        before = chat.messages
        decode, inside, go = engine_of(case).decode, threading.Event(), threading.Event()

        def slow(self: Any, *arguments: Any) -> Any:
            inside.set()
            go.wait(10)
            return decode(self, *arguments)

        monkeypatch.setattr(engine_of(case), "decode", slow)
        stream = chat.stream("Why?", max_new_tokens=50)
        with ThreadPoolExecutor(2) as pool:
            reading = pool.submit(list, stream)
            assert inside.wait(10)
            stream.cancel()
            asking = pool.submit(chat.ask, "Hi", max_new_tokens=4)
            go.set()
            reading.result(10)
            answer = asking.result(10)
        assert chat.messages[:2] == before
        assert answer.text == ask_first(case)[0].ask("Hi", max_new_tokens=4).text

    def test_of_two_that_wait_for_a_cancelled_step_one_gets_the_chat(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other must see the stream that came first, or both would write to one cache."""
        chat, _ = ask_first(case)
        decode, inside, go = engine_of(case).decode, threading.Event(), threading.Event()

        def slow(self: Any, *arguments: Any) -> Any:
            inside.set()
            go.wait(10)
            return decode(self, *arguments)

        monkeypatch.setattr(engine_of(case), "decode", slow)
        stream = chat.stream("Why?", max_new_tokens=50)
        with ThreadPoolExecutor(3) as pool:
            reading = pool.submit(list, stream)
            assert inside.wait(10)
            stream.cancel()
            asking = [pool.submit(chat.stream, question, max_new_tokens=4) for question in ("A?", "B?")]
            go.set()
            reading.result(10)
            errors = [future.exception(10) for future in asking]
        assert sorted(type(error).__name__ for error in errors) == ["BusyError", "NoneType"]

    def test_a_stream_belongs_to_the_thread_that_reads_it(self, case: Case) -> None:
        chat, _ = ask_first(case)
        stream = chat.stream("Why?", max_new_tokens=50)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(next, stream).result(10)
            with pytest.raises(BusyError):
                chat.ask("Hi")
            assert pool.submit(chat.ask, "Hi", max_new_tokens=2).result(10).finish_reason == "length"


def test_preparing_images_counts_as_time_to_the_first_token(case: Case) -> None:
    stats = case.owl.chat().ask("What?", images=case.files[:3], max_new_tokens=1).stats
    assert stats.preprocess_seconds > 0
    assert stats.time_to_first_token > stats.preprocess_seconds + stats.vision_seconds + stats.prefill_seconds


def test_a_stream_that_cannot_be_read_on_is_in_nobodys_way(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that failed nor one that was reset, though the object is kept."""

    def failing(*_: Any) -> Any:
        raise BackendError("the step fails")

    for end in ("fail", "reset"):
        chat = case.owl.chat()
        stream = chat.stream("Why?", max_new_tokens=8)
        next(stream)
        if end == "fail":
            with monkeypatch.context() as patched:
                patched.setattr(engine_of(case), "decode", failing)
                with pytest.raises(BackendError):
                    next(stream)
        else:
            chat.reset()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(chat.ask, "Hi", max_new_tokens=2).result(10)
        assert isinstance(answer, Answer)


def test_a_chat_waits_for_no_image_of_another(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, inside, go = engine_of(case).encode_images, threading.Event(), threading.Event()

    def slow(self: Any, *arguments: Any) -> Any:
        inside.set()
        go.wait(10)
        return encode(self, *arguments)

    case.owl.model.encoder.clear()
    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(engine_of(case), "encode_images", slow)
            first = pool.submit(case.owl.chat().ask, "What?", case.files[0], max_new_tokens=2)
            assert inside.wait(10)
        second = pool.submit(case.owl.chat().ask, "What?", case.files[1], max_new_tokens=2)
        assert second.result(10).finish_reason == "length"
        go.set()
        assert first.result(10).finish_reason == "length"


def test_drawing_on_an_image_later_changes_no_chat(case: Case) -> None:
    with Image.open(case.files[0]) as opened:
        image = opened.convert("RGB")
    chat = case.owl.chat()
    chat.ask("What?", images=image, max_new_tokens=2)
    kept = case.owl.chat(chat.messages)
    image.paste((0, 0, 0), (0, 0, *image.size))
    again = case.owl.chat(kept.messages)
    assert again.ask("Why?", max_new_tokens=4).ids == chat.ask("Why?", max_new_tokens=4).ids
