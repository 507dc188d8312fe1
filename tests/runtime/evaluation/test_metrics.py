"""Each measure of ``owl2 eval`` on values that were worked out by hand."""

import math

import numpy as np
import pytest

from owl2.runtime.evaluation.captions import cider_d, longest_common_subsequence, rouge_l, words
from owl2.runtime.evaluation.data import Item, Question
from owl2.runtime.evaluation.divergence import Divergence, divergence, row_kl
from owl2.runtime.evaluation.measure import Generation, ItemResult
from owl2.runtime.evaluation.summary import summarise
from owl2.runtime.evaluation.vqa import CONTRACTIONS, exact_match, normalise, vqa_accuracy
from owl2.runtime.likelihood import log_softmax_rows, token_logprobs


class TestNormalise:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("Two dogs, and the cat.", "2 dogs and cat"),
            ("A  red\tbus\n", "red bus"),
            ("none", "0"),
            ("dont", "don't"),
            ("couldnt've", "couldn't've"),
            ("couldn'tve", "couldn't've"),
            ("it's", "it's"),
            ("yes/no", "yes no"),  # between letters a mark parts words
            ("yes / no", "yes no"),
            ("black-and-white", "black and white"),
            ("black -and white", "black and white"),
            ("1,000 people", "1000 people"),  # a number with a comma makes every mark vanish
            ("3.5 m.", "3.5 m"),
            ("U.S.A.", "usa"),
            ("10", "10"),
            ("ten", "10"),
            ("eleven", "eleven"),
            ("", ""),
            ("the", ""),
        ],
    )
    def test_answers(self, given: str, expected: str) -> None:
        assert normalise(given) == expected

    def test_contractions_lack_one_apostrophe(self) -> None:
        assert CONTRACTIONS["yalld've".replace("yalld", "yall'd")] == "y'all'd've"
        assert "well" not in CONTRACTIONS
        assert "were" not in CONTRACTIONS
        assert all(len(wrong) == len(word) - 1 for wrong, word in CONTRACTIONS.items())


class TestVqaAccuracy:
    def test_no_one_said_it(self) -> None:
        assert vqa_accuracy("red", ["blue"] * 10) == 0

    @pytest.mark.parametrize(
        ("count", "expected"),
        # k of 10 said it: the k leave out their own and see k-1, the others see k.
        [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
    )
    def test_some_of_ten_said_it(self, count: int, expected: float) -> None:
        by_hand = (count * min((count - 1) / 3, 1) + (10 - count) * min(count / 3, 1)) / 10
        assert by_hand == pytest.approx(expected)
        assert vqa_accuracy("Red.", ["red"] * count + ["blue"] * (10 - count)) == pytest.approx(expected)

    def test_few_people(self) -> None:
        assert vqa_accuracy("red", ["red", "red"]) == 1
        assert vqa_accuracy("red", ["red", "blue"]) == pytest.approx(0.5)
        assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx((0.5 + 0.5 + 1) / 3)

    def test_exact_match(self) -> None:
        assert exact_match(" red ", "red") == (1, 1)
        assert exact_match("The red.", "red") == (0, 1)
        assert exact_match("reddish", "red") == (0, 0)


class TestCaptions:
    def test_words(self) -> None:
        assert words("A man's dog, 2 cats_here!") == ["a", "man's", "dog", "2", "cats", "here"]

    def test_longest_common_subsequence(self) -> None:
        assert longest_common_subsequence("abcbdab", "bdcaba") == 4  # Cormen et al., figure 15.8
        assert longest_common_subsequence("", "abc") == 0

    def test_rouge_l_of_lin(self) -> None:
        """Lin 2004, section 3.1: police killed the gunman / police kill the gunman / the gunman kill police."""
        reference = ["police killed the gunman"]

        def expected(common: int) -> float:
            precision = recall = common / 4
            return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)

        assert rouge_l("police kill the gunman", reference) == pytest.approx(expected(3)) == pytest.approx(0.75)
        assert rouge_l("the gunman kill police", reference) == pytest.approx(expected(2)) == pytest.approx(0.5)

    def test_rouge_l_of_unequal_lengths_and_several_references(self) -> None:
        # lcs with the first: "a cat" 2 of 2 and 2 of 4; with the second: "cat" 1 of 2 and 1 of 1
        precision, recall = 1.0, 1.0
        assert rouge_l("a cat", ["a black cat sits", "cat"]) == pytest.approx(
            (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
        )
        assert rouge_l("a cat", ["a black cat sits"]) == pytest.approx(2.44 * 1.0 * 0.5 / (0.5 + 1.44 * 1.0))
        assert rouge_l("", ["a"]) == 0
        assert rouge_l("dog", ["cat"]) == 0

    def test_cider_d_by_hand(self) -> None:
        """Two images; "a" is in both and weighs nothing, every other n-gram weighs log 2."""
        references = [["a red cat"], ["a blue dog"]]
        # n = 1: made (red, cat), wanted (red, cat): cosine 1. n = 2: (a red, red cat): 1. n = 3: 1. n = 4: none, 0.
        assert cider_d(["a red cat", "a blue dog"], references) == pytest.approx([7.5, 7.5])
        # n = 1: made (red): 1 · 1 / (1 · √2); n = 2: (a red): the same; n = 3, 4: none. One word shorter.
        expected = 10 * (2 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
        assert cider_d(["a red", "x"], references) == pytest.approx([expected, 0])

    def test_cider_d_clips_repetitions(self) -> None:
        references = [["red cat"], ["blue dog"]]
        # n = 1: made (red 3), wanted (red 1, cat 1): min(3, 1) · 1 / (3 · √2); longer n-grams do not match. One longer.
        expected = 10 * (1 / (3 * math.sqrt(2))) / 4 * math.exp(-1 / 72)
        assert cider_d(["red red red", ""], references)[0] == pytest.approx(expected)

    def test_cider_d_averages_over_references(self) -> None:
        references = [["red cat", "green bird"], ["blue dog"]]
        # Equal to the first in n = 1 and n = 2, unlike the second.
        assert cider_d(["red cat", "dog"], references)[0] == pytest.approx(10 * (2 / 4 + 0) / 2)

    def test_cider_d_of_a_single_image_is_nothing(self) -> None:
        assert cider_d(["a cat"], [["a cat"]]) == [0]


class TestDivergence:
    def test_kl_by_hand(self) -> None:
        p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
        expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
        assert row_kl(np.log(p).astype(np.float32), np.log(q).astype(np.float32)) == pytest.approx(expected, rel=1e-6)

    def test_shifted_logits_are_the_same_distribution(self) -> None:
        logits = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
        assert np.abs(row_kl(logits, logits + 100)).max() < 1e-9

    def test_modalities_are_kept_apart_and_blocks_join(self) -> None:
        rng = np.random.default_rng(1)
        reference, actual = rng.normal(size=(2, 150, 11)).astype(np.float32)
        modalities = rng.integers(0, 2, 150)
        whole = divergence(reference, actual, modalities)
        same = reference.argmax(-1) == actual.argmax(-1)
        for modality in (0, 1):
            rows = modalities == modality
            assert whole.mean_kl(modality) == pytest.approx(row_kl(reference, actual)[rows].mean())
            assert whole.agreement(modality) == pytest.approx(same[rows].mean())
        assert whole.mean_difference == pytest.approx(np.abs(reference - actual).mean(), rel=1e-5)
        parts = (slice(70), slice(70, None))
        joined = sum((divergence(reference[p], actual[p], modalities[p]) for p in parts), Divergence())
        assert joined.positions == whole.positions == (float((modalities == 0).sum()), float(modalities.sum()))
        assert joined.kl == pytest.approx(whole.kl)

    def test_nothing_compared(self) -> None:
        assert Divergence().mean_kl(0) == Divergence().agreement(1) == Divergence().mean_difference == 0

    def test_logprobs_of_tokens(self) -> None:
        logits = np.random.default_rng(2).normal(size=(130, 7)).astype(np.float32)
        ids = np.arange(130) % 7
        np.testing.assert_allclose(token_logprobs(logits, ids), log_softmax_rows(logits)[np.arange(130), ids])
        np.testing.assert_allclose(np.exp(log_softmax_rows(logits)).sum(-1), 1)
        assert len(token_logprobs(logits[:0], ids[:0])) == 0


def test_items_without_a_category_join_those_whose_category_is_other() -> None:
    categories = ("other", "", "yes/no")
    results = [
        ItemResult(Item(i, Question("?", ("red",)), category=category), Generation("red", "stop"))
        for i, category in enumerate(categories)
    ]
    (task,) = summarise(results).tasks
    assert {category: group.items for category, group in task.categories.items()} == {"other": 2, "yes/no": 1}
