"""Steps of the decoder after the prompt: one token, or one token and a draft of those after it."""

from __future__ import annotations

import time

import numpy as np

from owl2.runtime.cancellation import Cancellation
from owl2.runtime.engine import Floats
from owl2.runtime.families.mplug_owl2 import positions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.kv_cache import Claim
from owl2.runtime.load import Loaded
from owl2.runtime.lookup import Lookup


class Steps:
    """Feeds generated tokens and gives the logits after each.

    Attributes:
        drafted: tokens that were drafted.
        accepted: of these, how many were right.
    """

    def __init__(self, model: Loaded, claim: Claim, prompt: Prompt, *, lookup: bool | None = None) -> None:
        """Continue a conversation.

        Args:
            model: what runs.
            claim: on a cache that holds the prompt once :meth:`feed` is called.
            prompt: drafts are looked up in it, and in the answer.
            lookup: whether to draft; None to do so where it changes no answer.
        """
        self._model, self._claim = model, claim
        wanted = model.engine.rows_are_independent if lookup is None else lookup
        self._lookup = Lookup(prompt.keys) if wanted else None
        self._draft: list[int] = []
        self._rows: Floats = np.empty((0, 0), np.float32)
        self._checked = 0
        self.drafted = self.accepted = 0

    def feed(self, token: int, most: int, cancellation: Cancellation) -> Floats:
        """Logits [V] after a token.

        Args:
            token: chosen from the logits before it.
            most: tokens that may still follow it.
            cancellation: stops the step.
        """
        if self._lookup is not None:
            self._lookup.add(token)
        if self._checked < len(self._draft) and token == self._draft[self._checked]:
            # Its keys and values are already behind those of the cache.
            self._claim.commit([token])
            self._checked += 1
            self.accepted += 1
            row: Floats = self._rows[self._checked]
            return row
        self.settle()
        return self._step(token, most, cancellation)

    def settle(self) -> None:
        """Report a draft that is used up, was wrong, or is no longer needed."""
        if self._draft:
            self._model.lookup.checked(len(self._draft), self._checked)
        self._draft, self._checked = [], 0

    def _step(self, token: int, most: int, cancellation: Cancellation) -> Floats:
        cache, engine, account = self._claim.cache, self._model.engine, self._model.lookup
        past = cache.length
        draft = [] if self._lookup is None else self._lookup.draft(min(account.allowed(), most, self._room()))
        embeds, modality = positions.embed([token, *draft], self._model.table, {})
        buffers, began = self._claim.reserve(1 + len(draft)), time.perf_counter()
        if not draft:
            logits = engine.decode(embeds, past, buffers, cancellation)
            account.single(time.perf_counter() - began)
            self._claim.commit([token])
            return logits
        rows: Floats = engine.prefill(embeds, modality, past, buffers, np.arange(1 + len(draft)), cancellation)
        account.drafted(len(draft), time.perf_counter() - began)
        self._claim.commit([token])
        self._draft, self._rows, self.drafted = draft, rows, self.drafted + len(draft)
        first: Floats = rows[0]
        return first

    def _room(self) -> int:
        """Tokens that a draft may have behind one more: within the context, and with the same rotary angles."""
        cache, steady = self._claim.cache, self._model.config.decoder.steady_limit
        limit = cache.context if steady is None else min(cache.context, steady)
        return max(0, limit - cache.length - 1)
