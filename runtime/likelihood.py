"""How likely given text is: log-probabilities of tokens, and of whole answers to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.engine import Floats, Ints
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.template import Message
from owl2.runtime.kv_cache import Key, common_prefix

ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class ChoiceLikelihoods:
    """Likelihood of each choice.

    Attributes:
        logprobs: sum over the choice's tokens, nats.
        tokens: how many.
    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def best(self) -> int:
        """Index of the most likely choice."""
        return int(np.argmax(self.logprobs))

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of the choices among each other."""
        odds = np.exp(np.array(self.logprobs) - max(self.logprobs))
        return tuple((odds / odds.sum()).tolist())

    @property
    def best_per_token(self) -> int:
        """Index of the choice whose tokens are most likely on average, which does not favour short ones."""
        return int(np.argmax(np.divide(self.logprobs, self.tokens)))


def choice_likelihoods(
    encode: Callable[[Sequence[Message]], Prompt],
    logits_from: Callable[[Prompt, int], Iterator[tuple[int, Floats]]],
    end_id: int,
    question: str,
    choices: Sequence[str],
) -> ChoiceLikelihoods:
    """Log-probability of each choice after the question, which runs once: a choice starts from its cached positions.

    Args:
        encode: positions of a conversation.
        logits_from: logits of a prompt from a position on, in blocks; reuses what it ran before.
        end_id: ends an answer, and is not counted.
        question: of the user, with a placeholder for each image.
        choices: what the assistant may say.
    """
    asked = Message("USER", question)
    prompt = encode((asked, Message("ASSISTANT")))
    sums, counts = [], []
    for choice in choices:
        keys = encode((asked, Message("ASSISTANT", choice))).keys
        if keys[-1] == end_id:
            keys = keys[:-1]
        start = common_prefix(prompt.keys, keys)
        ids = text_ids(keys[start:])
        # The last token predicts nothing; the one before the choice predicts its first.
        logprobs = [
            token_logprobs(logits, ids[position - start + 1 : position - start + 1 + len(logits)])
            for position, logits in logits_from(Prompt(keys[:-1], prompt.images), start - 1)
        ]
        sums.append(math.fsum(np.concatenate(logprobs)))
        counts.append(len(ids))
    return ChoiceLikelihoods(tuple(sums), tuple(counts))


def log_softmax_rows(logits: Floats) -> NDArray[np.float64]:
    """Natural logarithm of the probabilities of each row: [T, V] -> float64 [T, V]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def token_logprobs(logits: Floats, ids: Ints) -> NDArray[np.float64]:
    """Log-probability of one token per row, in nats: logits [T, V], ids [T] -> [T]."""
    logprobs = [np.zeros(0)]
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        logprobs.append(np.take_along_axis(log_softmax_rows(logits[rows]), ids[rows, None], axis=1)[:, 0])
    return np.concatenate(logprobs)


def text_ids(keys: Sequence[Key]) -> Ints:
    """The tokens among positions."""
    return np.array([key for key in keys if isinstance(key, int)], dtype=np.int64)
