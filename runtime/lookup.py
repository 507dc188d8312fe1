"""Prompt lookup: tokens that followed the same words earlier are drafted, and one step of the decoder checks them all.

After "Prompt Lookup Decoding" (Saxena 2023), with two differences. Every token is chosen from its row of logits exactly
as without drafts, random number included, and a draft only saves the step where it says the same; so drafts change no
answer, greedy or sampled, where a row's logits do not depend on the other rows of its step. And a step of several rows
costs more than one of one row, so an account is kept of what drafts cost and save, and they are made only while it is
not overdrawn.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

ORDERS = (3, 2)
"""Lengths of the sequences that are looked up, the longest first."""
SHORTEST, LONGEST = 3, 15
"""Tokens of a draft: the first, and after others were right."""
START = 0.5
SHARE = 0.01
MOST = 4.0
SMOOTHING = 0.2


class Lookup:
    """Where sequences of keys occurred last in a conversation."""

    def __init__(self, keys: Sequence[Hashable]) -> None:
        """Index the keys of a prompt."""
        self._keys: list[Hashable] = []
        self._next: dict[tuple[Hashable, ...], int] = {}
        self._last: dict[tuple[Hashable, ...], int] = {}
        for key in keys:
            self.add(key)

    def add(self, key: Hashable) -> None:
        """Append a key; what ends with it can be found once something follows."""
        self._keys.append(key)
        self._last = {}
        for order in ORDERS:
            if len(self._keys) >= order:
                ending = tuple(self._keys[-order:])
                if ending in self._next:
                    self._last[ending] = self._next[ending]
                self._next[ending] = len(self._keys)

    def draft(self, most: int) -> list[int]:
        """What followed the last keys when they occurred before: up to ``most`` tokens, none where they did not."""
        for place in self._last.values():  # of the longest first
            found: list[int] = []
            for key in self._keys[place : place + most]:
                if not isinstance(key, int):
                    break
                found.append(key)
            return found
        return []


@dataclass
class LookupAccount:
    """What drafts have saved and cost, in steps of one row; threads may share it.

    The balance starts with ``START`` and every step of one row adds ``SHARE``, which bounds the loss where drafts are
    never right: to half a step, and one in a hundred. It is at most ``MOST``, so that drafts end soon where they were
    right before and are no longer.
    """

    balance: float = START
    length: int = SHORTEST
    _single: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def allowed(self) -> int:
        """Tokens that may be drafted now; 0 until a step of one row was timed, or with the account overdrawn."""
        return self.length if self.balance > 0 and self._single > 0 else 0

    def single(self, seconds: float) -> None:
        """Report a step of one row."""
        with self._lock:
            self._single += (seconds - self._single) * (SMOOTHING if self._single else 1.0)
            self.balance = min(self.balance + SHARE, MOST)

    def drafted(self, tokens: int, seconds: float) -> None:
        """Report a step with a draft; it costs no more than its rows one by one, whatever else the machine did."""
        with self._lock:
            self.balance -= min(seconds / self._single - 1, tokens)

    def checked(self, drafted: int, accepted: int) -> None:
        """Report how many tokens of a draft were right: each saved a step of one row."""
        with self._lock:
            self.balance = min(self.balance + accepted, MOST)
            right = accepted == drafted >= self.length
            self.length = min(2 * self.length + 1, LONGEST) if right else max(SHORTEST, accepted)
