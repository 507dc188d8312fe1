"""Thousands of steps that are cancelled, fail or belong to other conversations leave nothing behind."""

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import NEEDS_NATIVE

from owl2.runtime.cancellation import Cancellation, StoppedError
from owl2.runtime.engine import EngineOptions, Floats, KvBuffers
from owl2.runtime.errors import ConfigError
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.spec import KvType

pytestmark = NEEDS_NATIVE
STEPS = 10_000
LENGTH = 300


class Talk:
    """A conversation of random rows, and the rows themselves for a cold start."""

    def __init__(self, model: Loaded, seed: int) -> None:
        width = model.config.decoder.hidden_size
        self.model, self.random = model, np.random.default_rng(seed)
        self.rows = self.random.standard_normal((LENGTH, width)).astype(np.float32)
        self.modality = self.random.integers(0, 2, LENGTH)
        self.length = 0
        self.buffers: KvBuffers = model.engine.allocate(LENGTH, None)

    def step(self, count: int, cancellation: Cancellation) -> Floats:
        """Logits of new rows, the first of which follows what was committed."""
        part = slice(self.length, self.length + count)
        return self.model.engine.prefill(
            self.rows[part], self.modality[part], self.length, self.buffers, np.arange(count), cancellation
        )

    def expected(self) -> Floats:
        """Logits of all committed rows, from an empty cache in one step."""
        buffers = self.model.engine.allocate(self.length, None)
        rows, modality = self.rows[: self.length], self.modality[: self.length]
        return self.model.engine.prefill(rows, modality, 0, buffers, np.arange(self.length))


def check(talk: Talk, made: list[Floats]) -> None:
    """The logits of the committed rows are those of a cold start, bit for bit."""
    if made:
        np.testing.assert_array_equal(np.concatenate(made), talk.expected())


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["fp32", "fp16", "int8"])
def test_ten_thousand_steps_leave_no_difference_to_a_cold_start(sample_bundle: Path, kv_cache: KvType) -> None:
    model = open_bundle(sample_bundle, EngineOptions(threads=2, backend="native", kv_cache=kv_cache))[1]
    chance = random.Random(0)
    talks = [Talk(model, seed) for seed in range(4)]
    made: list[list[Floats]] = [[] for _ in talks]
    stopped = failed = 0
    for _ in range(STEPS):
        number = chance.randrange(len(talks))
        talk = talks[number]
        if talk.length == LENGTH or chance.random() < 0.005:
            check(talk, made[number])
            talks[number], made[number] = Talk(model, chance.randrange(1 << 30)), []
            continue
        count = min(chance.choice([1, 1, 1, 2, 4, 9, 33]), LENGTH - talk.length)
        what, cancellation = chance.random(), Cancellation()
        if what < 0.1:
            cancellation.cancel()
        elif what < 0.4:  # while it runs, if it has not ended before
            threading.Timer(chance.random() * 0.001, cancellation.cancel).start()
        elif what < 0.5:  # positions that the buffers do not have
            with pytest.raises(ConfigError):
                model.engine.prefill(talk.rows, talk.modality, 1, talk.buffers, np.array([0]))
            failed += 1
            continue
        elif what < 0.55:  # grows, or is copied as a fork is, and the original goes on
            copy = model.engine.allocate(LENGTH, talk.buffers)
            model.engine.prefill(talk.rows[:1], talk.modality[:1], talk.length, copy, np.array([0]))
        try:
            logits = talk.step(count, cancellation)
        except StoppedError:
            stopped += 1
            continue
        if what > 0.8:
            continue  # not committed: the next step writes over it, as where a draft was wrong
        made[number].append(logits)
        talk.length += count
    assert stopped > STEPS / 20
    assert failed > STEPS / 20
    for talk, parts in zip(talks, made):
        check(talk, parts)
    model.close()


@pytest.mark.parametrize("threads", [2, 3])
def test_steps_of_several_python_threads_do_not_mix(sample_bundle: Path, threads: int) -> None:
    model = open_bundle(sample_bundle, EngineOptions(threads=threads, backend="native"))[1]
    talks = [Talk(model, seed) for seed in range(6)]
    made: list[list[Floats]] = [[] for _ in talks]

    def run(number: int) -> None:
        talk = talks[number]
        while talk.length < 120:
            made[number].append(talk.step(3, Cancellation()))
            talk.length += 3
            time.sleep(0)

    running = [threading.Thread(target=run, args=(number,)) for number in range(len(talks))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for talk, parts in zip(talks, made):
        check(talk, parts)
    model.close()
