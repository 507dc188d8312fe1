"""Choosing the next token and deciding when to stop: pure functions on one row of logits.

The filters and their order (repetition penalty, temperature, top-k, top-p, min-p) are those of transformers.
The logit of a filtered token becomes -inf. Rows are float32 [V].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.arguments import checked
from owl2.runtime.config import require, require_known
from owl2.runtime.errors import BackendError
from owl2.runtime.foreign import shorten

Logits = NDArray[np.float32]

STOPS = 256
"""Most stop strings: every one is looked for after every token."""
TOP_LOGPROBS = 20
"""Most alternatives that are told of a token, as in OpenAI's interface."""
STOP_LENGTH = 1000
"""Characters of a stop string, at most: so many are held back."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Settings of a generation.

    Attributes:
        max_new_tokens: most tokens an answer may have.
        temperature: 0 takes the most likely token; larger values flatten the distribution.
        top_k: number of candidates, 0 for all.
        top_p: the candidates' probabilities add up to at least this; 1 for all.
        min_p: least probability of a candidate, relative to the most likely one; 0 for all.
        repetition_penalty: above 1 makes tokens that occurred less likely, below 1 more likely.
        seed: makes sampling reproducible; None draws a fresh one.
        stop: a text or several, at most 256 of 1,000 characters each; the answer ends before the first of them, or at
            the end-of-sequence token. Kept as a tuple.
        lookup: draft tokens that followed the same words before, and check several in a step (prompt lookup). None:
            where that changes no answer, which the native core promises; True: also elsewhere, where an answer may
            change as with another number of threads; False: never.
        top_logprobs: likeliest tokens that each chunk tells, with their probabilities; at most 20.
        schema: a JSON schema that the answer follows; needs ``pip install 'owl2[grammar]'``, as the next two do.
        regex: a regular expression that the answer matches as a whole.
        choices: the answer is one of these texts. Kept as a tuple.

    Numbers of NumPy are taken as well, and kept as those of Python.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    lookup: bool | None = None
    top_logprobs: int = 0
    schema: Mapping[str, Any] | None = None
    regex: str | None = None
    choices: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, Sequence) and not isinstance(self.stop, bytes):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_new_tokens", "top_k", "seed", "top_logprobs"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        require(self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens} must be at least 1")
        require(
            0 <= self.temperature < math.inf,
            f"temperature {self.temperature} must be 0 (most likely token) or a positive number",
        )
        require(self.top_k >= 0, f"top_k {self.top_k} must be 0 (off) or a positive number")
        require(0 < self.top_p <= 1, f"top_p {self.top_p} must be above 0 and at most 1 (off)")
        require(0 <= self.min_p <= 1, f"min_p {self.min_p} must be between 0 (off) and 1")
        require(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty {self.repetition_penalty} must be between 0.01 and 100; 1 is off",
        )
        object.__setattr__(self, "choices", tuple(self.choices))
        require(self.schema is None or isinstance(self.schema, Mapping), f"schema {shorten(self.schema)} is no object")
        require(self.regex is None or isinstance(self.regex, str), f"regex {shorten(self.regex)} is no text")
        require(
            all(isinstance(choice, str) and choice for choice in self.choices),
            f"choices {shorten(self.choices)} must be non-empty texts",
        )
        given = [name for name in ("schema", "regex", "choices") if getattr(self, name) not in (None, ())]
        require(len(given) < 2, f"{' and '.join(given)} exclude each other; give one of them")
        require(
            0 <= self.top_logprobs <= TOP_LOGPROBS,
            f"top_logprobs {self.top_logprobs} must be between 0 and {TOP_LOGPROBS}",
        )
        require(self.seed is None or self.seed >= 0, f"seed {self.seed} must be None or a number from 0 upwards")
        require(
            isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop),
            f"stop {shorten(self.stop)} must be a non-empty string, or several, such as '###' or ['###', '</s>']",
        )
        longest = max(map(len, self.stop), default=0)
        require(
            len(self.stop) <= STOPS and longest <= STOP_LENGTH,
            f"stop has {len(self.stop)} strings, the longest of {longest} characters; give at most {STOPS} of "
            f"{STOP_LENGTH} characters",
        )

    @property
    def is_constrained(self) -> bool:
        """Whether answers follow a schema, an expression or a list."""
        return self.schema is not None or self.regex is not None or bool(self.choices)


def _number(name: str, value: object) -> float:
    require(isinstance(value, Real) and not isinstance(value, bool), f"{name} {shorten(value)} must be a number")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf


# People call with the names of other libraries.
setattr(GenerationConfig, "__init__", checked(GenerationConfig.__init__))  # noqa: B010


class GenerationOptions(TypedDict, total=False):
    """The fields of :class:`GenerationConfig`, as keywords."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    lookup: bool | None
    top_logprobs: int
    schema: Mapping[str, Any] | None
    regex: str | None
    choices: Sequence[str]


def merge_options(config: GenerationConfig | None, options: Mapping[str, object]) -> GenerationConfig:
    """``config``, or the defaults, with some fields replaced.

    Raises:
        ConfigError: not a config, a name that is not one of its fields, or a value outside its range.
    """
    config = GenerationConfig() if config is None else config
    require(
        isinstance(config, GenerationConfig),
        f"config must be a GenerationConfig, got {type(config).__name__}; give its fields as keywords instead",
    )
    names = [field.name for field in fields(config)]
    for name in options:
        require_known(name, names, "an option of generation")
    return replace(config, **options)  # type: ignore[arg-type]


def log_softmax(logits: Logits) -> Logits:
    """Natural logarithm of the probabilities, accumulated in float64."""
    shifted = logits.astype(np.float64) - np.max(logits)
    result: Logits = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return result


def apply_repetition_penalty(logits: Logits, ids: Sequence[int], penalty: float) -> Logits:
    """Divide positive logits of the tokens in ``ids`` by ``penalty`` and multiply negative ones.

    From "CTRL: A Conditional Transformer Language Model", section 4.1, with the sign rule of transformers.
    Each token counts once. Negative ids, which stand for image placeholders, are skipped.
    """
    seen = np.unique(np.asarray(ids, dtype=np.int64))
    seen = seen[seen >= 0]
    result = logits.copy()
    result[seen] = np.where(result[seen] < 0, result[seen] * penalty, result[seen] / penalty)
    return result


def apply_temperature(logits: Logits, temperature: float) -> Logits:
    """Divide by ``temperature``, after shifting the largest logit to 0 so that no temperature overflows.

    Raises:
        ConfigError: ``temperature`` is not positive.
    """
    require(temperature > 0, f"temperature {temperature} must be positive to sample")
    with np.errstate(over="ignore"):
        scaled: Logits = ((logits.astype(np.float64) - np.max(logits)) / temperature).astype(np.float32)
    return scaled


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the ``k`` largest logits, and all that equal the smallest of them; 0 keeps everything."""
    if k == 0 or k >= logits.size:
        return logits
    return _keep(logits, logits >= np.partition(logits, -k)[-k])


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest tokens, most likely first, whose probabilities add up to ``p`` (nucleus sampling).

    Of equally likely tokens those with smaller ids come first.
    """
    if p >= 1:
        return logits
    order = np.argsort(-logits, kind="stable")
    probabilities = _softmax(logits)[order]
    mass_before = np.concatenate(([0.0], np.cumsum(probabilities)[:-1]))
    kept = np.zeros(logits.shape, dtype=np.bool_)
    kept[order[mass_before < p]] = True
    return _keep(logits, kept)


def keep_min_p(logits: Logits, min_p: float) -> Logits:
    """Keep tokens at least ``min_p`` times as likely as the most likely one."""
    if min_p == 0:
        return logits
    probabilities = _softmax(logits)
    return _keep(logits, probabilities >= min_p * probabilities.max())


def sample(
    logits: Logits,
    config: GenerationConfig,
    rng: np.random.Generator,
    previous_ids: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Choose the next token.

    Args:
        logits: [V] float32, as the model gives them.
        config: filters; with temperature 0 the most likely token is taken and ``rng`` is not advanced.
        rng: advanced by one number when sampling.
        previous_ids: tokens that the repetition penalty looks at.

    Raises:
        BackendError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        broken = int(logits.size - np.isfinite(logits).sum())
        raise BackendError(
            f"{broken} of {logits.size} logits are NaN or infinite: the model's arithmetic overflowed; "
            "use another device or a bundle of higher precision"
        )
    if allowed is not None:
        logits = _keep(logits, allowed)
    if config.repetition_penalty != 1.0:
        logits = apply_repetition_penalty(logits, previous_ids, config.repetition_penalty)
    if config.temperature == 0:
        return int(np.argmax(logits))
    logits = apply_temperature(logits, config.temperature)
    logits = keep_min_p(keep_top_p(keep_top_k(logits, config.top_k), config.top_p), config.min_p)
    candidates = np.flatnonzero(np.isfinite(logits))
    mass = np.cumsum(_softmax(logits[candidates]))
    drawn = np.searchsorted(mass, rng.random() * mass[-1], side="right")
    return int(candidates[min(drawn, candidates.size - 1)])


def likeliest(logprobs: Logits, count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest tokens with their log-probabilities, in order; of equal ones the lower id first."""
    if not count:
        return ()
    # Ids of equal probability at the edge must not depend on the algorithm.
    edge = np.partition(logprobs, -count)[-count]
    candidates = np.flatnonzero(logprobs >= edge)
    order = candidates[np.argsort(-logprobs[candidates], kind="stable")][:count]
    return tuple((int(token), float(logprobs[token])) for token in order)


class StopFilter:
    """Cuts streamed text before the first stop string, however it is divided into pieces.

    Text that may turn out to be the beginning of a stop string is held back. Of several stop strings the one
    that is complete first counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Text to pass on and whether a stop string was met; after that nothing is passed on any more."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        emitted, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return emitted, False

    def flush(self) -> str:
        """The text still held back, which the end of the answer shows to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, short of the whole ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _keep(logits: Logits, kept: NDArray[np.bool_]) -> Logits:
    return np.where(kept, logits, np.float32(-np.inf))


def _softmax(logits: Logits) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - np.max(logits))
    return np.asarray(weights / weights.sum())
