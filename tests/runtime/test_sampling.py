"""Filters on small rows with known answers, their invariants on random ones, and the rules for stopping."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from owl2.runtime.errors import BackendError, ConfigError
from owl2.runtime.families.mplug_owl2.tokenizer import StreamDecoder, Tokenizer
from owl2.runtime.sampling import (
    GenerationConfig,
    StopFilter,
    apply_repetition_penalty,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    sample,
)

# Probabilities 0.1, 0.2, 0.3, 0.4.
LOGITS = np.log(np.array([1, 2, 3, 4], np.float32))
ROWS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    return weights


def test_log_softmax() -> None:
    np.testing.assert_allclose(np.exp(log_softmax(LOGITS)), [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(log_softmax(LOGITS + 1000), log_softmax(LOGITS), atol=1e-4)
    assert log_softmax(LOGITS).dtype == np.float32


def test_temperature() -> None:
    np.testing.assert_allclose(softmax(apply_temperature(LOGITS, 0.5)), np.array([1, 4, 9, 16]) / 30, rtol=1e-6)
    np.testing.assert_allclose(softmax(apply_temperature(LOGITS, 1e9)), [0.25] * 4, rtol=1e-6)
    np.testing.assert_array_equal(softmax(apply_temperature(LOGITS, 1e-320)), [0, 0, 0, 1])
    with pytest.raises(ConfigError, match="temperature 0 must be positive to sample"):
        apply_temperature(LOGITS, 0)


def test_top_k() -> None:
    np.testing.assert_allclose(softmax(keep_top_k(LOGITS, 2)), [0, 0, 3 / 7, 4 / 7], rtol=1e-6)
    np.testing.assert_array_equal(keep_top_k(LOGITS, 0), LOGITS)
    np.testing.assert_array_equal(keep_top_k(LOGITS, 9), LOGITS)
    np.testing.assert_array_equal(softmax(keep_top_k(np.zeros(4, np.float32), 2)), [0.25] * 4)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [0, 0, 0, 1]),
        (0.39, [0, 0, 0, 1]),
        (0.41, [0, 0, 3 / 7, 4 / 7]),
        (0.71, [0, 2 / 9, 3 / 9, 4 / 9]),
        (0.95, [0.1, 0.2, 0.3, 0.4]),
        (1.0, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_top_p(p: float, expected: list[float]) -> None:
    np.testing.assert_allclose(softmax(keep_top_p(LOGITS, p)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [
        (0.0, [0.1, 0.2, 0.3, 0.4]),
        (0.6, [0, 0, 3 / 7, 4 / 7]),
        (0.3, [0, 2 / 9, 3 / 9, 4 / 9]),
        (1.0, [0, 0, 0, 1]),
    ],
)
def test_min_p(min_p: float, expected: list[float]) -> None:
    np.testing.assert_allclose(softmax(keep_min_p(LOGITS, min_p)), expected, rtol=1e-6)


def test_repetition_penalty() -> None:
    logits = np.array([-1.0, 2.0, 0.0, 4.0], np.float32)
    np.testing.assert_array_equal(apply_repetition_penalty(logits, [3, 0, 3, 3, -200], 2.0), [-2, 2, 0, 2])
    np.testing.assert_array_equal(apply_repetition_penalty(logits, [], 2.0), logits)
    np.testing.assert_array_equal(logits, [-1, 2, 0, 4])


@given(ROWS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_prefix(logits: NDArray[np.float32], p: float) -> None:
    kept = np.isfinite(keep_top_p(logits, p))
    probabilities = softmax(logits)
    assert probabilities[kept].sum() >= p - 1e-9
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-9
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


@given(ROWS, st.integers(1, 50))
def test_top_k_keeps_the_largest(logits: NDArray[np.float32], k: int) -> None:
    kept = np.isfinite(keep_top_k(logits, k))
    assert kept.sum() >= min(k, logits.size)
    assert kept.all() or logits[kept].min() > logits[~kept].max()


@given(ROWS)
def test_greedy_takes_the_largest_and_leaves_the_generator_alone(logits: NDArray[np.float32]) -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert sample(logits, GenerationConfig(), rng) == int(np.argmax(logits))
    assert rng.bit_generator.state == before


@given(ROWS, st.integers(0, 2**32), st.floats(0.1, 3.0), st.integers(0, 10), st.floats(0.1, 1.0), st.floats(0, 1))
def test_sampling_is_reproducible_and_respects_the_filters(
    logits: NDArray[np.float32], seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    first, second = (
        [sample(logits, config, rng) for _ in range(5)] for rng in (np.random.default_rng(seed) for _ in range(2))
    )
    assert first == second
    scaled = apply_temperature(logits, temperature)
    allowed = np.isfinite(keep_min_p(keep_top_p(keep_top_k(scaled, top_k), top_p), min_p))
    assert allowed[first].all()


def test_samples_follow_the_distribution() -> None:
    rng = np.random.default_rng(5)
    config = GenerationConfig(temperature=1.0, top_k=3)
    drawn = np.bincount([sample(LOGITS, config, rng) for _ in range(9000)], minlength=4)
    np.testing.assert_allclose(drawn / 9000, [0, 2 / 9, 3 / 9, 4 / 9], atol=0.02)


def test_the_penalty_applies_before_the_choice() -> None:
    config = GenerationConfig(repetition_penalty=2.0)
    assert sample(LOGITS, config, np.random.default_rng(0), previous_ids=[3]) == 2
    assert sample(LOGITS, GenerationConfig(), np.random.default_rng(0), previous_ids=[3]) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_reported(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(BackendError, match="1 of 4 logits are NaN or infinite: the model's arithmetic overflowed"):
        sample(logits, GenerationConfig(temperature=temperature), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens 0 must be at least 1"),
        ("max_new_tokens", 2.5, "max_new_tokens must be a whole number, got 2.5"),
        ("temperature", -0.1, r"temperature -0\.1 must be 0 .* or a positive number"),
        ("temperature", float("nan"), "temperature nan must be 0"),
        ("temperature", float("inf"), "temperature inf must be 0"),
        ("top_k", -1, r"top_k -1 must be 0 \(off\) or a positive number"),
        ("top_k", None, "top_k must be a whole number, got None"),
        ("top_p", 0.0, r"top_p 0\.0 must be above 0 and at most 1"),
        ("top_p", 1.1, r"top_p 1\.1 must be above 0 and at most 1"),
        ("min_p", 1.5, r"min_p 1\.5 must be between 0 \(off\) and 1"),
        ("repetition_penalty", 0.0, r"repetition_penalty 0\.0 must be between 0\.01 and 100"),
        ("seed", -1, "seed -1 must be None or a number from 0 upwards"),
        ("stop", 3, r"stop 3 must be a non-empty string, or several"),
        ("stop", ("",), r"stop \(''\,\) must be a non-empty string, or several"),
        ("stop", ["x"] * 257, "stop has 257 strings, the longest of 1 characters; give at most 256 of 1000"),
        ("stop", "x" * 1001, "stop has 1 strings, the longest of 1001 characters; give at most 256 of 1000"),
        ("stop", [1] * 100_000, "stop tuple of 100000 entries must be"),
        ("max_new_tokens", "12", "max_new_tokens must be a whole number, got '12'"),
        ("max_new_tokens", np.bool_(1), "max_new_tokens must be a whole number, got .*True"),
        ("top_k", "x" * 1000, "^top_k must be a whole number, got 'x{70,80}…$"),
        ("temperature", 10**400, "temperature inf must be 0"),
        ("temperature", True, "temperature True must be a number"),
        ("seed", 10**400, "^seed must be a whole number or None, got 10{70,80}…$"),
    ],
)
def test_bad_settings_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**{name: value})


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens must be a whole number, got a value of type int"):
        GenerationConfig(max_new_tokens=10**5000)


def test_numbers_of_numpy_become_those_of_python() -> None:
    given: dict[str, Any] = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.uint8(1)}
    config = GenerationConfig(**given)
    assert config == GenerationConfig(max_new_tokens=3, temperature=0.5, seed=1)
    assert [type(getattr(config, name)) for name in given] == [int, float, int]


@pytest.mark.parametrize("temperature", [-0.0, 5e-324, 1e300])
def test_extreme_settings_sample(temperature: float) -> None:
    largest = 2**63 - 1
    config = GenerationConfig(temperature=temperature, top_k=largest, seed=largest, max_new_tokens=largest)
    assert sample(LOGITS, config, np.random.default_rng(config.seed)) in range(4)


def test_the_most_stop_strings_take_no_time() -> None:
    """As many and as long as are allowed, all beginning as the text does."""
    stop = StopFilter([f"{'a' * 996}{n:04}" for n in range(256)])
    began = time.process_time()
    for _ in range(100):
        stop.feed("aaaaaaaaaaa")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("case", ["a1_base_bin", "a2_fp16_safetensors"])
def test_answers_end_where_the_original_would_end_them(golden: Path, case: str) -> None:
    """At the end-of-sequence id exactly there; at other keywords there or before, since pieces do not matter here."""
    tokenizer = Tokenizer.load(golden / case / "model")
    for entry in json.loads((golden / case / "stop_criteria.json").read_text()):
        (keyword,) = entry["keywords"]
        theirs = entry["stop_after_each_new_token"]
        decoder, stop = StreamDecoder(tokenizer), StopFilter([] if keyword == "</s>" else [keyword])
        ours = [token == tokenizer.eos_id or stop.feed(decoder.feed(token))[1] for token in entry["new_ids"]]
        if keyword == "</s>":
            assert ours == theirs, entry["name"]
        elif any(theirs):
            assert any(ours[: theirs.index(True) + 1]), entry["name"]


def run(stops: Sequence[str], pieces: Iterable[str]) -> tuple[str, bool, str]:
    """Text passed on, whether it was stopped, and what the end releases."""
    stop = StopFilter(stops)
    results = [stop.feed(piece) for piece in pieces]
    return "".join(text for text, _ in results), any(stopped for _, stopped in results), stop.flush()


def test_stop_strings_are_cut_off() -> None:
    assert run(("###",), ["Hello #", "#", "# more", "text"]) == ("Hello ", True, "")
    assert run(("###",), ["Hello #", "#", " more"]) == ("Hello ## more", False, "")
    assert run(("###",), ["Hello ", "##"]) == ("Hello ", False, "##")
    assert run((), ["as ", "it is"]) == ("as it is", False, "")


def test_only_the_possible_beginning_is_held_back() -> None:
    stop = StopFilter(("aab",))
    assert [stop.feed(letter) for letter in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert run(("abcd", "bc"), ["abcd"]) == ("a", True, "")
    assert run(("xbc", "bc"), ["axbc"]) == ("a", True, "")


@given(st.text("ab#", max_size=30), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3), st.data())
def test_the_cut_does_not_depend_on_the_pieces(text: str, stops: Sequence[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    emitted, stopped, held = run(stops, pieces)
    assert (emitted, stopped, held) == run(stops, text)
    assert stopped == any(stop in text for stop in stops)
    assume(not stopped)
    assert emitted + held == text
