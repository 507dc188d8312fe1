"""One engine for many threads: each gets what it would get alone, and nobody waits for a long prompt."""

import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS

from owl2 import BackendError, Owl2
from owl2.runtime.cancellation import Cancellation, StoppedError
from owl2.runtime.engine import BackendName, Floats, Ints
from owl2.runtime.images import ImageEncoder
from owl2.runtime.load import Loaded
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.serve.prefix_caches import PrefixCaches
from owl2.runtime.serve.shared_engine import SHORT, SharedEngine
from owl2.runtime.stream import stream_answer

PROMPTS = [f"USER: {text} ASSISTANT:" for text in ("one", "two and more", "three", "a longer fourth question", "five")]


class Counting:
    """An engine's joint steps, counted by the number of their sequences."""

    def __init__(self, engine: object) -> None:
        self.engine, self.sizes = engine, list[int]()

    def step(self, sequences: list[object], logit_rows: Ints, *rest: object) -> Floats:
        self.sizes.append(len(sequences))
        return self.engine.step(sequences, logit_rows, *rest)  # type: ignore[attr-defined,no-any-return]


def shared(model: Loaded) -> tuple[Loaded, SharedEngine, Counting | None]:
    counting = None if model.engine.stepping is None else Counting(model.engine.stepping)
    engine = SharedEngine(model.engine)
    engine._stepping = counting  # type: ignore[assignment]
    return replace(model, engine=engine, encoder=ImageEncoder(engine)), engine, counting


def answers_together(model: Loaded, engine: SharedEngine, **options: object) -> dict[str, tuple[int, ...]]:
    got: dict[str, tuple[int, ...]] = {}

    def one(prompt: str) -> None:
        stream = stream_answer(model, model.new_cache(), model.encode(prompt, []), GenerationConfig(**options))  # type: ignore[arg-type]
        got[prompt] = stream.read().ids
        engine.leave()

    threads = [threading.Thread(target=one, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gets_what_it_would_alone(bundle_a1: Path, backend: BackendName) -> None:
    owl = Owl2.load(bundle_a1, backend=backend)
    expected = {prompt: owl.generate(prompt, max_new_tokens=40).ids for prompt in PROMPTS}
    model, engine, counting = shared(owl.model)
    assert answers_together(model, engine, max_new_tokens=40) == expected
    if counting is not None:
        assert max(counting.sizes) == len(PROMPTS)
    engine.close()
    answer = stream_answer(model, model.new_cache(), model.encode("a", []), GenerationConfig())
    with pytest.raises(BackendError, match="closed"):
        answer.read()


def test_a_cancelled_one_does_not_disturb_the_others(owl: Owl2, bundle_a1: Path) -> None:
    expected = owl.generate(PROMPTS[0], max_new_tokens=60).ids
    model, engine, _ = shared(Owl2.load(bundle_a1).model)
    stream = stream_answer(model, model.new_cache(), model.encode(PROMPTS[1], []), GenerationConfig(max_new_tokens=200))
    reader = threading.Thread(target=stream.read)
    reader.start()
    threading.Timer(0.02, stream.cancel).start()
    other = stream_answer(model, model.new_cache(), model.encode(PROMPTS[0], []), GenerationConfig(max_new_tokens=60))
    assert other.read().ids == expected
    reader.join(10)
    assert stream.cancelled
    engine.close()


def test_a_step_that_fails_is_told_to_the_one_who_asked(bundle_a1: Path) -> None:
    owl = Owl2.load(bundle_a1)
    model, engine, _ = shared(owl.model)
    width = model.config.decoder.hidden_size
    buffers = engine.allocate(4, None)
    with pytest.raises(Exception, match="positions"):
        engine.prefill(np.zeros((9, width), np.float32), np.zeros(9, np.int64), 0, buffers, np.zeros(1, np.int64))
    cancelled = Cancellation()
    cancelled.cancel()
    with pytest.raises(StoppedError):
        engine.decode(np.zeros((1, width), np.float32), 0, buffers, cancelled)
    engine.close()


class TestPrefixCaches:
    def held(self, model: Loaded, caches: PrefixCaches, prompt: str) -> int:
        """Positions that a question finds, which is then answered."""
        encoded = model.encode(prompt, [])
        cache = caches.take(encoded.keys)
        stats = stream_answer(model, cache, encoded, GenerationConfig(max_new_tokens=4)).read().stats
        caches.give_back(cache)
        return stats.reused_tokens

    def test_what_was_asked_before_is_found_again(self, owl: Owl2) -> None:
        caches = PrefixCaches(owl.model, 1 << 30)
        begin = "USER: " + "a long beginning of a conversation " * 5
        assert self.held(owl.model, caches, begin) == 0
        more = self.held(
            owl.model, caches, begin + "and more of the one kind, much more of it than there was before it, " * 3
        )
        assert more > 16
        # Another way to go on leaves the first one as it is.
        assert self.held(owl.model, caches, begin + "but differently") > 16
        again = self.held(
            owl.model, caches, begin + "and more of the one kind, much more of it than there was before it, " * 3
        )
        assert again > more

    def test_the_least_recently_used_goes_first(self, owl: Owl2) -> None:
        one = owl.model.new_cache()
        caches = PrefixCaches(owl.model, 1 << 30)
        self.held(owl.model, caches, "USER: " + "one " * 30)
        size = caches.nbytes
        caches = PrefixCaches(owl.model, 2 * size)
        for word in ("one ", "two ", "three "):
            self.held(owl.model, caches, "USER: " + word * 30)
        assert caches.nbytes <= 2 * size
        assert self.held(owl.model, caches, "USER: " + "one " * 30) < 16
        assert one.nbytes == 0


def test_a_token_does_not_wait_for_a_whole_prompt(bundle_a1: Path) -> None:
    """Between two blocks of a long prompt, an answer goes on."""
    owl = Owl2.load(bundle_a1)
    model, engine, _ = shared(owl.model)
    order: list[str] = []
    run = engine._run_alone

    def recorded(work: object) -> None:
        order.append("short" if work.count <= SHORT else "long")  # type: ignore[attr-defined]
        time.sleep(0.01)
        run(work)  # type: ignore[arg-type]

    engine._run_alone = recorded  # type: ignore[method-assign]
    length = 600 if model.context > 700 else model.context - 60
    text = "USER: " + "word " * (length // 2)
    stream = stream_answer(model, model.new_cache(), model.encode("USER: a", []), GenerationConfig(max_new_tokens=50))
    reader = threading.Thread(target=stream.read)
    reader.start()
    time.sleep(0.1)
    for _ in range(3):
        cache = model.new_cache()
        stream_answer(model, cache, model.encode(text, []), GenerationConfig(max_new_tokens=1)).read()
    reader.join()
    longs = [index for index, kind in enumerate(order) if kind == "long"]
    assert len(longs) >= 3
    assert all("short" in order[first:second] for first, second in itertools.pairwise(longs))
    engine.close()
