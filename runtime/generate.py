"""The main path: prefill what the KV cache does not hold, then sample, decode, stream."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from owl2.runtime.cancellation import NEVER, Cancellation, StoppedError
from owl2.runtime.engine import Floats
from owl2.runtime.errors import ContextOverflowError
from owl2.runtime.families.mplug_owl2 import positions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.tokenizer import StreamDecoder
from owl2.runtime.grammar import Grammar
from owl2.runtime.image_files import ImageRecord
from owl2.runtime.kv_cache import Claim, KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.memory import peak_memory
from owl2.runtime.sampling import GenerationConfig, StopFilter, likeliest, log_softmax, sample
from owl2.runtime.steps import Steps

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One generated token.

    Attributes:
        text: what can be shown now; may be empty while a character or a stop string is incomplete, and the last
            chunk may carry text that was held back.
        token_id: the sampled id.
        logprob: natural log-probability of that id under the unmodified logits.
        finish_reason: of the answer, in its last chunk; None before.
        top_logprobs: ids and log-probabilities of the likeliest tokens, if they were asked for.
    """

    text: str
    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one generation; times in seconds, memory in bytes.

    Attributes:
        prompt_tokens: positions of the prompt, image rows included.
        reused_tokens: of these, how many the KV cache already held.
        images_encoded: images that went through the vision tower.
        generated_tokens: sampled ids, the end of sequence included.
        preprocess_seconds: reading and preprocessing the images given with this question.
        vision_seconds: in the vision tower.
        prefill_seconds: in the decoder, for the new prompt positions.
        time_to_first_token: all of the above, to the first sampled id.
        decode_seconds: from the first sampled id to the last.
        peak_memory: largest resident size of the process so far.
        kv_cache_memory: of the K/V buffers.
        kv_cache_positions: that the K/V buffers have room for; they grow with the conversation.
        drafted_tokens: found by prompt lookup, and checked several to a step.
        accepted_tokens: of these, how many were right: steps that were saved.
    """

    prompt_tokens: int
    reused_tokens: int
    images_encoded: int
    generated_tokens: int
    preprocess_seconds: float
    vision_seconds: float
    prefill_seconds: float
    time_to_first_token: float
    decode_seconds: float
    peak_memory: int
    kv_cache_memory: int
    kv_cache_positions: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, the first token not counted; 0 when only one was generated."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer: a plain record that can be pickled.

    Attributes:
        text: without the stop string, if one ended it.
        ids: the sampled ids, the end of sequence included.
        logprobs: natural log-probability of each id under the unmodified logits.
        finish_reason: ``stop`` (end of sequence or stop string), ``length`` (max_new_tokens), ``context`` (full) or
            ``cancelled``.
        stats: its figures.
        images: what was done to the images of the conversation, each once, in order of appearance.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    stats: Stats
    images: tuple[ImageRecord, ...] = ()

    def __str__(self) -> str:
        return self.text


def check_context(cache: KvCache, prompt: Prompt) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Raises:
        ContextOverflowError: the prompt takes the whole context or more.
    """
    if len(prompt.keys) >= cache.context:
        shared = cache.shared_prefix(prompt.keys)
        raise ContextOverflowError(
            shared,
            len(prompt.keys) - shared + 1,
            cache.context,
            "shorten the prompt, use fewer images, start a new chat or, where the model allows it, load with a "
            "larger context",
        )


def reuse(model: Loaded, claim: Claim, prompt: Prompt, first: int) -> int:
    """Truncate the cache to what it shares with the prompt before position ``first``; returns that length."""
    cache = claim.cache
    shared = min(cache.shared_prefix(prompt.keys), first)
    longest, steady = max(cache.longest, len(prompt.keys)), model.config.decoder.steady_limit
    # Dynamic scaling changes the rotary angles of longer sequences, so that their keys cannot be reused.
    claim.truncate(0 if steady is not None and longest > steady else shared)
    return cache.length


def image_rows(
    model: Loaded, prompt: Prompt, start: int, cancellation: Cancellation = NEVER
) -> tuple[dict[str, Floats], int]:
    """Rows [queries + 1, C] of the images at positions from ``start`` on, by digest, and how many were encoded."""
    images = [prompt.images[digest] for digest in positions.digests_of(prompt.keys[start:])]
    return model.encoder.rows(images, cancellation)


def prefill(
    model: Loaded,
    claim: Claim,
    prompt: Prompt,
    rows: Mapping[str, Floats],
    first: int,
    cancellation: Cancellation = NEVER,
) -> Iterator[tuple[int, Floats]]:
    """Run the positions of a prompt that the cache does not hold, in blocks; the cache ends up holding the prompt.

    Args:
        model: what runs.
        claim: on a cache that holds a beginning of the prompt, up to ``first`` at most; see :func:`reuse`.
        prompt: its positions.
        rows: of the images from ``cache.length`` on; see :func:`image_rows`.
        first: the first position whose logits are wanted.
        cancellation: raises StoppedError.

    Yields:
        After each block its first wanted position, and the logits [R, V] from there to its end; R is 0 before
        ``first``.
    """
    cache, keys, steady = claim.cache, prompt.keys, model.config.decoder.steady_limit
    # The rotary angles may depend on the whole length, so a prompt that changes them runs as one block.
    block = len(keys) if steady is not None and len(keys) > steady else model.engine.block
    while cache.length < len(keys):
        start = cache.length
        new = keys[start : start + block]
        embeds, modality = positions.embed(new, model.table, rows)
        skipped = min(max(first - start, 0), len(new))
        asked = np.arange(min(skipped, len(new) - 1), len(new), dtype=np.int64)  # an engine is always asked for a row
        logits = model.engine.prefill(embeds, modality, start, claim.reserve(len(new)), asked, cancellation)
        claim.commit(new)
        yield start + skipped, logits if skipped < len(new) else logits[:0]


def prompt_logits(model: Loaded, cache: KvCache, prompt: Prompt, first: int = 0) -> Iterator[tuple[int, Floats]]:
    """Logits of the positions from ``first`` on, as :func:`prefill`; what the cache holds before it is reused."""
    claim = cache.claim()
    rows, _ = image_rows(model, prompt, reuse(model, claim, prompt, first))
    return prefill(model, claim, prompt, rows, first)


def choose(
    logits: Floats, config: GenerationConfig, rng: np.random.Generator, history: Sequence[int], grammar: Grammar | None
) -> int:
    """The next token, of those that the grammar allows; it is told."""
    if grammar is None:
        return sample(logits, config, rng, history)
    token = sample(logits, config, rng, history, grammar.allowed(len(logits)))
    grammar.accept(token)
    return token


def generate(
    model: Loaded,
    claim: Claim,
    prompt: Prompt,
    config: GenerationConfig,
    cancellation: Cancellation,
    preprocess_seconds: float = 0.0,
    grammar: Grammar | None = None,
) -> Generator[Chunk, None, Answer]:
    """Answer a prompt, a chunk per token; returns the whole answer.

    The cache ends up holding the prompt and every generated id but the last, which was never fed back.

    Args:
        model: what runs.
        claim: on the cache of the conversation; what it shares with the prompt is reused.
        prompt: fewer positions than the context.
        config: how tokens are chosen and when to stop.
        cancellation: looked at before each step, and stops the one that runs.
        preprocess_seconds: counted in the time to the first token.
        grammar: that the answer follows.
    """
    cache, last = claim.cache, len(prompt.keys) - 1
    began = prefilling = decoding = now = time.perf_counter()
    reused, encoded, logits = 0, 0, None
    with suppress(StoppedError):
        cancellation.check()
        reused = reuse(model, claim, prompt, last)
        rows, encoded = image_rows(model, prompt, reused, cancellation)
        prefilling = decoding = time.perf_counter()
        for _, made in prefill(model, claim, prompt, rows, last, cancellation):
            cancellation.check()
            logits = made[0] if len(made) else None
        decoding = now = time.perf_counter()

    rng, steps = np.random.default_rng(config.seed), Steps(model, claim, prompt, lookup=config.lookup)
    decoder, stop, ends = StreamDecoder(model.tokenizer), StopFilter(config.stop), model.end_ids
    history = [key for key in prompt.keys if isinstance(key, int)]
    texts: list[str] = []
    ids: list[int] = []
    logprobs: list[float] = []
    reason: FinishReason | None = None
    first_token = 0.0
    while logits is not None and reason is None and not cancellation:
        token = choose(logits, config, rng, history, grammar)
        now = time.perf_counter()
        first_token = first_token or now
        ids.append(token)
        distribution = log_softmax(logits)
        logprobs.append(float(distribution[token]))
        text = ""
        if token in ends:
            reason = "stop"
        else:
            history.append(token)
            text, stopped = stop.feed(decoder.feed(token))
            if stopped:
                reason = "stop"
            elif len(ids) >= config.max_new_tokens:
                reason = "length"
            elif cache.length >= cache.context:
                reason = "context"
        if reason is not None:
            rest, stopped = stop.feed(decoder.flush())
            text += rest if stopped else rest + stop.flush()
        texts.append(text)
        yield Chunk(text, token, logprobs[-1], reason, likeliest(distribution, config.top_logprobs))
        if reason is None and not cancellation:
            with suppress(StoppedError):
                logits = steps.feed(token, config.max_new_tokens - len(ids) - 1, cancellation)

    steps.settle()
    stats = Stats(
        prompt_tokens=len(prompt.keys),
        reused_tokens=reused,
        images_encoded=encoded,
        generated_tokens=len(ids),
        preprocess_seconds=preprocess_seconds,
        vision_seconds=prefilling - began,
        prefill_seconds=decoding - prefilling,
        time_to_first_token=preprocess_seconds + first_token - began if ids else 0.0,
        decode_seconds=now - first_token if ids else 0.0,
        peak_memory=peak_memory(),
        kv_cache_memory=cache.nbytes,
        kv_cache_positions=cache.capacity,
        drafted_tokens=steps.drafted,
        accepted_tokens=steps.accepted,
    )
    images = tuple(prompt.images[digest].record for digest in positions.digests_of(prompt.keys))
    return Answer("".join(texts), tuple(ids), tuple(logprobs), reason or "cancelled", stats, images)
