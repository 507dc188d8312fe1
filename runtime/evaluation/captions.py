"""How close a caption comes to those that people wrote: ROUGE-L and CIDEr-D.

Words are runs of letters and digits, in lower case, with apostrophes inside. The evaluation of COCO captions
uses the tokenizer of the Penn Treebank instead, so its figures can differ a little.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
BETA = 1.2
LONGEST = 4
SIGMA = 6.0

Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a caption."""
    return WORD.findall(text.lower())


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence of words that both hold in order, gaps allowed."""
    row = [0] * (len(other) + 1)
    for left in one:
        diagonal = 0
        for column, right in enumerate(other, 1):
            diagonal, row[column] = row[column], diagonal + 1 if left == right else max(row[column], row[column - 1])
    return row[-1]


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L, 0 to 1: F-measure over the longest common subsequence.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3, with beta 1.2 and the best
    precision and the best recall over the references, as is usual for COCO captions.
    """
    made = words(caption)
    wanted = [words(reference) for reference in references]
    common = [longest_common_subsequence(made, reference) for reference in wanted]
    precision = max((count / len(made) for count in common), default=0.0) if made else 0.0
    recall = max((count / len(reference) for count, reference in zip(common, wanted) if reference), default=0.0)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10.

    Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", equations 1 to 4 with the changes
    of section 6: counts clipped to those of the reference, a Gaussian penalty on the difference in length
    (sigma 6), scaled by 10. The document frequencies are those of ``references``, one document per image: with a
    single image every weight and every score is 0.

    Args:
        captions: one per image.
        references: what people wrote about each image.
    """
    wanted = [[_grams(words(text)) for text in texts] for texts in references]
    documents: Counter[Gram] = Counter()
    for texts in wanted:
        documents.update({gram for grams in texts for gram in grams})
    scale = math.log(max(len(references), 1))

    def weights(grams: Mapping[Gram, int]) -> dict[Gram, float]:
        return {gram: count * (scale - math.log(max(documents[gram], 1))) for gram, count in grams.items()}

    scores = []
    for caption, texts in zip(captions, wanted):
        made = _grams(words(caption))
        total = sum(_similarity(weights(made), weights(text), _length(made) - _length(text)) for text in texts)
        scores.append(10.0 * total / max(len(texts), 1))
    return scores


def _grams(tokens: Sequence[str]) -> Counter[Gram]:
    """How often each run of 1 to 4 words occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1))


def _length(grams: Mapping[Gram, int]) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _similarity(made: Mapping[Gram, float], wanted: Mapping[Gram, float], difference: int) -> float:
    """Mean over n of the clipped cosine of the n-grams' weights, times the penalty on length."""
    total = 0.0
    for n in range(1, LONGEST + 1):
        norm = _norm(made, n) * _norm(wanted, n)
        shared = [gram for gram in made if len(gram) == n and gram in wanted]
        if norm > 0:
            total += sum(min(made[gram], wanted[gram]) * wanted[gram] for gram in shared) / norm
    return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))


def _norm(weights: Mapping[Gram, float], n: int) -> float:
    return math.sqrt(_sum_of_squares(weight for gram, weight in weights.items() if len(gram) == n))


def _sum_of_squares(values: Iterable[float]) -> float:
    return sum(value * value for value in values)
