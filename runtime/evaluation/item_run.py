"""A model at work on one item: prompts, logits in blocks of bounded size, greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.engine import PREFILL_BLOCK, Floats
from owl2.runtime.errors import BackendError
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.template import Message, render
from owl2.runtime.generate import Answer, prompt_logits
from owl2.runtime.images import PreparedImage
from owl2.runtime.kv_cache import KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.stream import stream_answer


@dataclass(frozen=True)
class ItemRun:
    """The run of an item on one model.

    Attributes:
        cache: of all prompts of the item, so that what they share runs once.
        images: of the item, preprocessed as this model needs them.
    """

    model: Loaded
    cache: KvCache
    images: Sequence[PreparedImage]

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """Merged positions of the item's conversation, or of its beginning, with the first of the images."""
        text = render(messages)
        return self.model.encode(text, self.images[: text.count(IMAGE_TOKEN)])

    def windows(self, text: str) -> list[Prompt]:
        """Plain text in windows that fill the context, each after a start-of-sequence token."""
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode(text, parse_special=False)
        step = max(self.model.context - 1, 1)
        return [Prompt([tokenizer.bos_id, *ids[i : i + step]], {}) for i in range(0, len(ids), step)]

    def logits(self, prompt: Prompt, first: int = 0) -> Iterator[tuple[int, Floats]]:
        """Logits of the positions from ``first`` on, in blocks of the same size for every model.

        Cached positions before ``first`` are reused; the cache ends up holding the prompt. Yields the position of a
        block's first row, and its logits [R, V]; raises BackendError if a logit is NaN or infinite.
        """
        rest = None
        for _, logits in prompt_logits(self.model, self.cache, prompt, first):
            if not np.isfinite(logits).all():
                raise BackendError(
                    f"{self.model.name}: logits are NaN or infinite: the model's arithmetic overflowed; "
                    "use another device or a bundle of higher precision"
                )
            rest = logits if rest is None or not len(rest) else np.concatenate([rest, logits])
            while len(rest) >= PREFILL_BLOCK:
                yield first, rest[:PREFILL_BLOCK]
                first, rest = first + PREFILL_BLOCK, rest[PREFILL_BLOCK:]
        if rest is not None and len(rest):
            yield first, rest

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Answer:
        """The greedy answer to a prompt; cached positions are reused."""
        config = GenerationConfig(max_new_tokens=max_new_tokens)
        return stream_answer(self.model, self.cache, prompt, config).read()
