"""The main path: prefill what the cache does not hold, then sample, decode, stream."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.engine import Engine, Floats
from owl2.runtime.errors import ContextOverflowError
from owl2.runtime.families.mplug_owl2 import positions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.tokenizer import StreamDecoder, Tokenizer
from owl2.runtime.images import ImageEncoder
from owl2.runtime.kv_cache import KvCache
from owl2.runtime.sampling import GenerationConfig, StopFilter, log_softmax, sample

PREFILL_BLOCK = 256
FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One generated token.

    Attributes:
        text: what can be shown now; may be empty while a character or a stop string is incomplete, and the last
            chunk may carry text that was held back.
        token_id: the sampled id.
        logprob: natural log-probability of that id under the unmodified logits.
    """

    text: str
    token_id: int
    logprob: float


@dataclass(slots=True)
class Stats:
    """Figures of one generation; times in seconds, memory in bytes.

    Attributes:
        prompt_tokens: merged positions of the prompt, images included.
        reused_tokens: of these, how many the KV cache already held.
        images_encoded: images that went through the vision tower.
        generated_tokens: ids sampled, the end of sequence included.
        preprocess_seconds: reading and preprocessing the images given with this question.
        vision_seconds: in the vision tower.
        prefill_seconds: in the decoder, for the new prompt positions.
        time_to_first_token: all of the above, to the first sampled id.
        decode_seconds: from the first sampled id to the last.
        peak_memory: largest resident size of the process so far.
        kv_cache_memory: of the K/V buffers.
        kv_cache_positions: how many positions they have room for; they grow with the conversation.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    images_encoded: int = 0
    generated_tokens: int = 0
    preprocess_seconds: float = 0.0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    peak_memory: int = 0
    kv_cache_memory: int = 0
    kv_cache_positions: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, the first token not counted; 0 when only one was generated."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class Model:
    """What a generation needs of a loaded bundle.

    Attributes:
        engine, tokenizer, encoder: do the work.
        table: token embeddings [V, C].
        eos_id: ends an answer.
        steady_limit: sequences up to this length share their rotary angles. Dynamic scaling changes the angles of
            longer ones, so that their keys cannot be reused; None where nothing changes.
    """

    engine: Engine
    tokenizer: Tokenizer
    table: NDArray[np.floating[Any]]
    eos_id: int
    encoder: ImageEncoder
    steady_limit: int | None


@dataclass
class Run:
    """State of one generation that its caller may read at any time."""

    stats: Stats = field(default_factory=Stats)
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False


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


def reusable(model: Model, cache: KvCache, prompt: Prompt) -> int:
    """How many positions of the cache the prompt can keep; at least its last one runs again, for its logits."""
    shared = min(cache.shared_prefix(prompt.keys), len(prompt.keys) - 1)
    longest = max(cache.longest, len(prompt.keys))
    return 0 if model.steady_limit is not None and longest > model.steady_limit else shared


def prefill(model: Model, cache: KvCache, prompt: Prompt, run: Run) -> Floats | None:
    """Bring ``cache`` to hold exactly the prompt and return its last position's logits [V]; None if cancelled.

    Long prompts run in blocks, so that cancelling takes effect soon and memory stays bounded.
    """
    stats, keys = run.stats, prompt.keys
    reused = reusable(model, cache, prompt)
    stats.prompt_tokens, stats.reused_tokens = len(keys), reused
    start = time.perf_counter()
    images = [prompt.images[digest] for digest in positions.digests_of(keys[reused:])]
    rows, stats.images_encoded = model.encoder.rows(images)
    encoded = time.perf_counter()
    stats.vision_seconds = encoded - start
    cache.truncate(reused)
    # The rotary angles may depend on the whole length, so a prompt that changes them runs as one block.
    whole = model.steady_limit is not None and len(keys) > model.steady_limit
    block = len(keys) if whole else PREFILL_BLOCK
    logits: Floats | None = None
    while cache.length < len(keys):
        if run.cancelled:
            return None
        new = keys[cache.length : cache.length + block]
        embeds, modality = positions.embed(new, model.table, rows)
        last = np.array([len(new) - 1], dtype=np.int64)
        logits = model.engine.prefill(embeds, modality, cache.length, cache.reserve(len(new)), last)[0]
        cache.commit(new)
    stats.prefill_seconds = time.perf_counter() - encoded
    return logits


def generate(model: Model, cache: KvCache, prompt: Prompt, config: GenerationConfig, run: Run) -> Iterator[Chunk]:
    """Generate from a merged prompt; yields a chunk per token and fills ``run`` as it goes.

    The cache ends up holding the prompt and every generated id but the last, which was never fed back.
    """
    start = time.perf_counter() - run.stats.preprocess_seconds
    rng = np.random.default_rng(config.seed)
    decoder, stop = StreamDecoder(model.tokenizer), StopFilter(config.stop)
    history = [key for key in prompt.keys if isinstance(key, int)]
    logits = prefill(model, cache, prompt, run)
    while logits is not None and not run.cancelled:
        token = sample(logits, config, rng, history)
        _count_token(run, cache, token, start)
        if token == model.eos_id:
            run.finish_reason = "stop"
            text = ""
        else:
            history.append(token)
            text, stopped = stop.feed(decoder.feed(token))
            run.finish_reason = _finish(stopped, run, config, cache)
        if run.finish_reason is not None:
            text += _flush(decoder, stop)
        yield Chunk(text, token, float(log_softmax(logits)[token]))
        if run.finish_reason is not None:
            return
        logits = decode(model, cache, token)


def decode(model: Model, cache: KvCache, token: int) -> Floats:
    """Feed one generated id: -> logits [V]."""
    embeds, _ = positions.embed([token], model.table, {})
    logits = model.engine.decode(embeds, cache.length, cache.reserve(1))
    cache.commit([token])
    return logits


def _count_token(run: Run, cache: KvCache, token: int, start: float) -> None:
    elapsed = time.perf_counter() - start
    run.ids.append(token)
    stats = run.stats
    stats.generated_tokens = len(run.ids)
    if len(run.ids) == 1:
        stats.time_to_first_token = elapsed
    stats.decode_seconds = elapsed - stats.time_to_first_token
    stats.peak_memory = peak_memory()
    stats.kv_cache_memory, stats.kv_cache_positions = cache.nbytes, cache.capacity


def _finish(stopped: bool, run: Run, config: GenerationConfig, cache: KvCache) -> FinishReason | None:
    if stopped:
        return "stop"
    if len(run.ids) >= config.max_new_tokens:
        return "length"
    return "context" if cache.length >= cache.context else None


def _flush(decoder: StreamDecoder, stop: StopFilter) -> str:
    text, stopped = stop.feed(decoder.flush())
    return text if stopped else text + stop.flush()


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
