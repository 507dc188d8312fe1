"""Prompt lookup: it finds what followed, changes no answer, and loses little where it cannot help."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NEEDS_NATIVE

from owl2 import Answer, ConfigError, GenerationConfig, Owl2
from owl2.runtime.lookup import LONGEST, MOST, SHARE, SHORTEST, START, Lookup, LookupAccount
from owl2.runtime.spec import KvType

QUESTIONS = ("Describe the picture.", "How many shapes are there?", "Describe the picture.", "Describe the picture.")


class TestLookup:
    def test_what_followed_the_longest_ending(self) -> None:
        lookup = Lookup([1, 2, 3, 10, 11, 7, 2, 3, 20, 1, 2, 3])
        assert lookup.draft(3) == [10, 11, 7]
        assert lookup.draft(0) == []
        lookup.add(20)  # of 2, 3, 20 and of 3, 20 the only earlier place
        assert lookup.draft(9) == [1, 2, 3, 20]

    def test_the_last_place_counts(self) -> None:
        assert Lookup([1, 2, 5, 1, 2, 6, 1, 2]).draft(1) == [6]

    def test_a_draft_ends_before_an_image(self) -> None:
        assert Lookup([1, 2, 3, 4, ("image", 0), 9, 1, 2]).draft(9) == [3, 4]
        assert Lookup([1, 2, ("image", 0), 9, 1, 2]).draft(9) == []

    @pytest.mark.parametrize("keys", [[], [1], [1, 2], [1, 2, 3, 4, 5]])
    def test_nothing_occurred_before(self, keys: list[int]) -> None:
        assert Lookup(keys).draft(5) == []


class TestAccount:
    @pytest.mark.parametrize("cost", [1.1, 1.4, 3.0, 20.0])
    def test_the_loss_is_bounded_where_drafts_are_never_right(self, cost: float) -> None:
        account, lost, steps = LookupAccount(), 0.0, 2000
        for _ in range(steps):
            if drafted := account.allowed():
                account.drafted(drafted, cost)
                account.checked(drafted, 0)
                lost += min(cost - 1, drafted)
            else:
                account.single(1.0)
        assert lost <= START + SHARE * steps + min(cost - 1, SHORTEST)

    def test_a_gain_keeps_it_going_with_longer_drafts(self) -> None:
        account = LookupAccount()
        account.single(1.0)
        for _ in range(10):
            drafted = account.allowed()
            account.drafted(drafted, 1.5)
            account.checked(drafted, drafted)
        assert account.allowed() == LONGEST
        assert account.balance <= MOST
        account.checked(LONGEST, 0)
        assert account.allowed() == SHORTEST

    def test_nothing_is_drafted_before_a_step_was_timed(self) -> None:
        assert LookupAccount().allowed() == 0


def talk(owl: Owl2, image: Path, **options: Any) -> list[Answer]:
    """Four questions, two of them asked before."""
    chat = owl.chat()
    return [
        chat.ask(question, images=image if number == 0 else None, max_new_tokens=40, **options)
        for number, question in enumerate(QUESTIONS)
    ]


def results(answers: list[Answer]) -> list[tuple[object, ...]]:
    return [(answer.text, answer.ids, answer.logprobs, answer.finish_reason) for answer in answers]


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def owl(request: pytest.FixtureRequest, sample_bundle: Path) -> Iterator[Owl2]:
    kv_cache: KvType = request.param
    with Owl2.load(sample_bundle, backend="native", kv_cache=kv_cache) as owl:
        yield owl


@pytest.fixture(scope="module")
def image(sample_checkpoint: Path) -> Path:
    return sample_checkpoint.parent / "pictures" / "scene3.png"


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are always allowed: how long steps take on this machine decides nothing."""
    monkeypatch.setattr(LookupAccount, "allowed", lambda account: account.length)
    monkeypatch.setattr(LookupAccount, "drafted", lambda account, tokens, seconds: None)


@NEEDS_NATIVE
@pytest.mark.usefixtures("generous")
class TestAnswers:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 1.0, "seed": 5},
            {"temperature": 2.0, "seed": 7, "top_k": 20},
            {"repetition_penalty": 1.2},
            {"stop": "left and"},
            {"stop": ["cross", "blue triangle at the top right"]},
        ],
    )
    def test_they_are_the_same_bit_for_bit(self, owl: Owl2, image: Path, options: dict[str, Any]) -> None:
        plain, drafted = talk(owl, image, lookup=False, **options), talk(owl, image, **options)
        assert results(drafted) == results(plain)
        assert all(answer.stats.drafted_tokens == 0 for answer in plain)

    def test_drafts_are_right_where_an_answer_is_repeated(self, owl: Owl2, image: Path) -> None:
        last = talk(owl, image)[-1].stats
        assert last.accepted_tokens > last.generated_tokens / 2
        assert last.accepted_tokens <= last.drafted_tokens

    @pytest.mark.parametrize("most", range(1, 28))
    def test_an_answer_of_any_length(self, owl: Owl2, image: Path, most: int) -> None:
        """The last token of an answer may be anywhere in a draft; the next turn finds the cache as without it."""
        chats = [owl.chat() for _ in range(2)]
        for chat, lookup in zip(chats, (False, None)):
            for question in ("Describe the picture.", "Describe the picture.", "What colour is the cross?"):
                limit = most if chat.messages else 40
                chat.ask(question, images=None if chat.messages else image, max_new_tokens=limit, lookup=lookup)
        assert chats[0].messages == chats[1].messages

    @pytest.mark.parametrize("missing", range(1, 18, 3))
    def test_the_end_of_the_context(self, sample_bundle: Path, image: Path, missing: int) -> None:
        whole = talk(Owl2.load(sample_bundle, backend="native"), image, lookup=False)[-1].stats
        owl = Owl2.load(sample_bundle, backend="native", context=whole.prompt_tokens + whole.generated_tokens - missing)
        plain, drafted = talk(owl, image, lookup=False), talk(owl, image)
        assert results(drafted) == results(plain)
        assert plain[-1].finish_reason == ("stop" if missing == 1 else "context")
        assert drafted[-1].stats.accepted_tokens > 0

    def test_cancelled_in_the_midst_of_a_draft(self, owl: Owl2, image: Path) -> None:
        expected = [answer.ids for answer in talk(owl, image, lookup=False)]
        rng = random.Random(1)
        for _ in range(10):
            chat = owl.chat()
            chat.ask(QUESTIONS[0], images=image)
            stream = chat.stream(QUESTIONS[2])
            for _, _ in zip(range(rng.randrange(1, 25)), stream):
                pass
            stream.cancel()
            assert chat.ask(QUESTIONS[1], max_new_tokens=40).ids == expected[1]

    def test_two_chats_share_a_model(self, owl: Owl2, image: Path) -> None:
        expected = results(talk(owl, image, lookup=False))
        chats, answers = [owl.chat(), owl.chat()], [list[Answer](), list[Answer]()]
        for number, question in enumerate(QUESTIONS):
            streams = [
                chat.stream(question, images=image if number == 0 else None, max_new_tokens=40) for chat in chats
            ]
            for _ in zip(*streams):
                pass
            for stream, given in zip(streams, answers):
                given.append(stream.read())
        assert results(answers[0]) == results(answers[1]) == expected


@pytest.mark.usefixtures("generous")
def test_onnxruntime_drafts_only_when_asked(sample_bundle: Path, image: Path) -> None:
    owl = Owl2.load(sample_bundle, backend="onnxruntime", threads=1)
    usual, asked = talk(owl, image), talk(owl, image, lookup=True)
    assert sum(answer.stats.drafted_tokens for answer in usual) == 0
    assert asked[-1].stats.accepted_tokens > 0
    assert [answer.text for answer in asked] == [answer.text for answer in usual]
    for one, other in zip(asked, usual):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=0.1)


@pytest.mark.parametrize("value", [1, "yes", 0.5])
def test_it_is_on_off_or_left_out(value: Any) -> None:
    with pytest.raises(ConfigError, match="lookup must be True or False or None, got"):
        replace(GenerationConfig(), lookup=value)
