"""Similarity of a caption to those that people wrote: ROUGE-L and CIDEr-D.

Words are runs of letters and digits, in lower case, with apostrophes inside. The evaluation of COCO captions uses the
tokenizer of the Penn Treebank instead, so its figures can differ a little.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
ROUGE_BETA = 1.2
CIDER_N = 4
CIDER_SIGMA = 6.0

Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a caption."""
    return WORD.findall(text.lower())


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence of words that both contain in order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for left in first:
        diagonal = 0
        for column, right in enumerate(second, 1):
            diagonal, row[column] = row[column], diagonal + 1 if left == right else max(row[column], row[column - 1])
    return row[-1]


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L, 0 to 1: F-measure over the longest common subsequence.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3, with beta 1.2 and the best precision
    and the best recall over the references, as is usual for COCO captions.
    """
    candidate = words(caption)
    expected = [words(reference) for reference in references]
    common = [longest_common_subsequence(candidate, reference) for reference in expected]
    precision = max((count / len(candidate) for count in common), default=0.0) if candidate else 0.0
    recall = max((count / len(reference) for count, reference in zip(common, expected) if reference), default=0.0)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10.

    Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", equations 1 to 4 with the changes of
    section 6: counts clipped to those of the reference, a Gaussian penalty on the difference in length (sigma 6),
    scaled by 10. The document frequencies are those of ``references``, one document per image: with a single image
    every weight and every score is 0.

    Args:
        captions: one per image.
        references: captions that people wrote, for each image.
    """
    expected = [[_ngrams(words(text)) for text in texts] for texts in references]
    documents: Counter[Gram] = Counter()
    for texts in expected:
        documents.update({gram for grams in texts for gram in grams})
    scale = math.log(max(len(references), 1))

    def weights(grams: Mapping[Gram, int]) -> dict[Gram, float]:
        return {gram: count * (scale - math.log(max(documents[gram], 1))) for gram, count in grams.items()}

    scores = []
    for caption, texts in zip(captions, expected):
        candidate = _ngrams(words(caption))
        total = sum(
            _similarity(weights(candidate), weights(text), _length(candidate) - _length(text)) for text in texts
        )
        scores.append(10.0 * total / max(len(texts), 1))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter[Gram]:
    """Counts of runs of 1 to 4 words."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, CIDER_N + 1) for i in range(len(tokens) - n + 1))


def _length(grams: Mapping[Gram, int]) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _similarity(candidate: Mapping[Gram, float], reference: Mapping[Gram, float], difference: int) -> float:
    """Mean over n of the clipped cosine of the n-grams' weights, times the penalty on length."""
    total = 0.0
    for n in range(1, CIDER_N + 1):
        norm = _norm(candidate, n) * _norm(reference, n)
        shared = [gram for gram in candidate if len(gram) == n and gram in reference]
        if norm > 0:
            total += sum(min(candidate[gram], reference[gram]) * reference[gram] for gram in shared) / norm
    return total / CIDER_N * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))


def _norm(weights: Mapping[Gram, float], n: int) -> float:
    return math.sqrt(sum(weight * weight for gram, weight in weights.items() if len(gram) == n))
