"""Scores of short answers: VQA accuracy and exact match.

VQA accuracy is the measure of Antol et al. 2015, "VQA: Visual Question Answering", section 3, averaged over annotators
as in the evaluation of VQA v2, which also defines the normalisation of answers. Its script compares answers verbatim
where all annotators agree; here they are always normalised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREEING_ANNOTATORS = 3
"""Other people who must have given an answer for it to be fully right."""

ARTICLES = frozenset(("a", "an", "the"))
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(DIGITS)}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
GROUPED_DIGITS = re.compile(r"\d,\d")
LOOSE_PERIOD = re.compile(r"\.(?!\d)")

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've 'ow's'at
"""


def _misspelled(word: str) -> list[str]:
    """The word with one of its apostrophes missing, for each of them."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: word for word in _CONTRACTED.split() for wrong in _misspelled(word)}


def normalise(answer: str) -> str:
    """Normalise an answer for comparison: no punctuation, articles or capitals, digits for number words.

    >>> normalise("Two dogs, and the cat.")
    '2 dogs and cat'
    """
    text = " ".join(answer.split())
    cleaned = text
    for mark in PUNCTUATION:
        # A mark next to a space, or any mark in a text with a number like 1,000, is removed; others separate words.
        removed = f"{mark} " in text or f" {mark}" in text or GROUPED_DIGITS.search(text) is not None
        cleaned = cleaned.replace(mark, "" if removed else " ")
    cleaned = LOOSE_PERIOD.sub("", cleaned)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """Accuracy of an answer against those that several people gave, 0 to 1.

    The mean, over the people, of min(number of *others* who gave this answer / 3, 1). With fewer than four people, the
    number of others replaces 3.

    Args:
        answer: of the model.
        given: at least two answers, usually ten.
    """
    normalised = normalise(answer)
    same = [normalise(other) == normalised for other in given]
    required = min(AGREEING_ANNOTATORS, len(given) - 1)
    return sum(min((sum(same) - own) / required, 1.0) for own in same) / len(given)


def exact_match(answer: str, given: str) -> tuple[float, float]:
    """1 or 0: equal letter by letter (surrounding blanks ignored), and equal after :func:`normalise`."""
    return float(answer.strip() == given.strip()), float(normalise(answer) == normalise(given))
