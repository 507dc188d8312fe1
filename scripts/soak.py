"""A process in use for long: chats with images that stream, stop, fork, fail and start over, while models come and go.

Prints operations and memory at the start, in the middle and at the end. Fails if an answer differs from the one of a
cold start (of a bundle with integer weights: where the two tokens were not nearly equally likely, see docs/limits.md),
or if memory after the first fifth grows by more than a bound.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import owl2
from owl2 import Answer, Chat, Owl2, Owl2Error

QUESTIONS = (
    "What shapes are there?",
    "Which is the largest?",
    "What colour is it?",
    "Describe the picture.",
    "And now?",
)
WARM_UP = 0.2
"""Share of the time before memory is watched: buffers grow to their final size, libraries load."""
NEAR_TIE = 0.5
"""Logits between two tokens within which integer weights may choose either; measured: 0.3 (docs/limits.md)."""
MAX_TURNS = 8


def resident() -> int:
    """Memory of this process, bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


@dataclass
class Soak:
    """The chats of a loaded model, what was done with them, and what was wrong.

    Attributes:
        near_tie: logits between two tokens within which two answers may part; None for nowhere.
    """

    owl: Owl2
    pictures: list[Path]
    data: Path
    near_tie: float | None
    rng: random.Random
    chats: list[Chat] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def step(self) -> None:
        """Do one thing."""
        if len(self.chats) < 3:
            self.chats.append(self.owl.chat())
        chat = self.rng.choice(self.chats)
        if len(chat.messages) >= 2 * MAX_TURNS:
            chat.reset()
        names = ("ask", "stop", "drop", "undo", "fork", "reset", "fail", "replace", "leave", "rare")
        name = self.rng.choices(names, (40, 10, 8, 8, 5, 4, 10, 6, 4, 0.3))[0]
        getattr(self, f"_{name}")(chat)
        self.done[name] += 1

    def _question(self) -> tuple[str, list[Path]]:
        return self.rng.choice(QUESTIONS), self.rng.sample(self.pictures, self.rng.choice((0, 0, 1, 1, 2)))

    def _ask(self, chat: Chat) -> None:
        question, images = self._question()
        history = chat.messages
        try:
            answer = chat.ask(question, images, max_new_tokens=16)
        except owl2.ContextOverflowError:
            chat.reset()
            return
        if self.rng.random() < 0.2:
            self._compare(answer, self.owl.chat(history).ask(question, images, max_new_tokens=16))

    def _compare(self, warm: Answer, cold: Answer) -> None:
        self.done["compared"] += 1
        parted = next((place for place, pair in enumerate(zip(warm.ids, cold.ids)) if len(set(pair)) > 1), None)
        if parted is None:
            return
        self.done["other token"] += 1
        # Of two tokens that are nearly equally likely, neither is much more likely than even.
        likely = max(warm.logprobs[parted], cold.logprobs[parted])
        if self.near_tie is None or likely > -math.log1p(math.exp(-self.near_tie)):
            self.problems.append(f"{warm.text!r} with what the cache held, {cold.text!r} from a cold start")

    def _stop(self, chat: Chat) -> None:
        before, stream = chat.messages, chat.stream(*self._question(), max_new_tokens=16)
        for count, _ in enumerate(stream):
            if count == 2:
                stream.cancel()
        self._unchanged(chat, before, unless=stream.answer.finish_reason != "cancelled")

    def _unchanged(self, chat: Chat, before: list[dict[str, Any]], *, unless: bool) -> None:
        if not unless and chat.messages != before:
            self.problems.append("an answer that was left changed the conversation")

    def _drop(self, chat: Chat) -> None:
        before, stream = chat.messages, chat.stream(*self._question(), max_new_tokens=16)
        next(stream)
        self._unchanged(chat, before, unless=stream.finished)

    def _undo(self, chat: Chat) -> None:
        if chat.messages:
            chat.undo()

    def _fork(self, chat: Chat) -> None:
        self.chats.append(chat.fork())

    def _reset(self, chat: Chat) -> None:
        chat.reset()

    def _leave(self, chat: Chat) -> None:
        self.chats.remove(chat)

    def _replace(self, chat: Chat) -> None:
        left = chat.stream(*self._question(), max_new_tokens=16)
        next(left)
        chat.ask(*self._question(), max_new_tokens=4)

    def _fail(self, chat: Chat) -> None:
        hostile = ([Path("missing.png")], [b"GIF89a"], [np.zeros((0, 1, 3), np.uint8)], [Path(__file__)])
        question, images = self.rng.choice(
            [("What?", images) for images in hostile] + [("word " * 5000, []), ("\ud800", [])]
        )
        before = chat.messages
        try:
            chat.ask(question, images)
        except Owl2Error:
            self._unchanged(chat, before, unless=False)
            return
        self.problems.append(f"{question[:20]!r} with {images} was accepted")

    def _rare(self, _: Chat) -> None:
        """What takes longer: a second model, verification, evaluation."""
        folder = self.owl.model.name
        with Owl2.load(folder) as other:
            other.chat().ask("What is it?", self.pictures[0], max_new_tokens=4)
        if not owl2.verify(folder).passed:
            self.problems.append("the golden prompts failed")
        owl2.evaluate(self.owl, self.data, max_new_tokens=4)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="folder of .png images")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--growth", type=float, default=32, help="MiB that memory may grow after the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pictures = sorted(options.pictures.glob("*.png"))
    records = (
        {"image": str(path.resolve()), "question": "What is it?", "answers": ["a shape"]} for path in pictures[:2]
    )
    with tempfile.TemporaryDirectory() as folder, Owl2.load(options.bundle) as owl:
        data = Path(folder) / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        exact = owl.manifest.weights.decoder in ("fp32", "fp16")
        soak = Soak(owl, pictures, data, None if exact else NEAR_TIE, random.Random(options.seed))
        samples = run(soak, 60 * options.minutes)
        kv = sum(chat._cache.nbytes for chat in soak.chats)
    watched = [size for share, size in samples if share >= WARM_UP]
    third = max(len(watched) // 3, 1)
    growth = float(np.median(watched[-third:]) - np.median(watched[:third])) / 2**20
    if growth > options.growth:
        soak.problems.append(
            f"memory grew by {growth:.0f} MiB after the warm-up, at most {options.growth:.0f} are allowed"
        )
    memory = {name: round(samples[int(share * (len(samples) - 1))][1] / 2**20) for name, share in
              (("start", 0), ("middle", 0.5), ("end", 1))}  # fmt: skip
    figures = {
        "operations": soak.done.total(),
        "memory_mib": memory,
        "growth_mib": round(growth, 1),
        "kv_mib": kv >> 20,
    }
    print(json.dumps(figures | {"done": soak.done, "problems": soak.problems[:20]}, indent=None if options.json else 2))
    return int(bool(soak.problems))


def run(soak: Soak, seconds: float) -> list[tuple[float, int]]:
    """Operate for this long; returns memory with the share of the time at which it was taken."""
    began, samples = time.monotonic(), [(0.0, resident())]
    while (passed := time.monotonic() - began) < seconds and len(soak.problems) < 20:
        soak.step()
        if len(soak.chats) > 6:
            soak.chats.pop(0)
        if len(samples) < 1000 * passed / seconds:
            samples.append((passed / seconds, resident()))
            if len(samples) % 100 == 0:
                sys.stderr.write(f"{passed:.0f} s: {soak.done.total()} operations, {resident() >> 20} MiB\n")
    return [*samples, (1.0, resident())]


if __name__ == "__main__":
    raise SystemExit(main())
