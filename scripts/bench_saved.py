"""Time to the first token of a saved conversation: loaded with its cache, against its messages run anew."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from owl2 import Chat, Owl2

QUESTIONS = ("What is in the picture?", "What is at the left?", "And at the right?", "What could it be for?")
ANSWER = (
    "There is a large red cube in the middle, and a small yellow ball to its left. Behind them stands a wall of bricks "
    "with a window, through which the light of the evening falls on the floor. "
)
"""Given: random weights would say what the tokenizer does not say again in the same tokens."""
NEXT = "Sum it up."


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with Owl2.load(options.bundle, threads=options.threads, warm=True) as owl, tempfile.TemporaryDirectory() as folder:
        messages: list[dict[str, Any]] = []
        for question in QUESTIONS:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
        image = {"type": "image", "image": str(options.picture)}
        messages[0]["content"] = [image, {"type": "text", "text": QUESTIONS[0]}]
        chat, path = owl.chat(messages), Path(folder) / "talk.owl2chat"
        stats = chat.ask("Is that all?", max_new_tokens=1).stats
        began = time.perf_counter()
        chat.save(path)
        saved, messages = time.perf_counter() - began, chat.messages
        loaded, anew = [], []
        for _ in range(options.rounds):
            owl.model.encoder.clear()
            loaded.append(_first(lambda: owl.load_chat(path)))
            owl.model.encoder.clear()
            anew.append(_first(lambda: owl.chat(messages)))
        fast, slow = statistics.median(loaded), statistics.median(anew)
        size = path.stat().st_size / 2**20
        print(f"{stats.prompt_tokens + stats.generated_tokens - 1} positions, saved in {saved:.2f} s, {size:.0f} MiB")
        print(f"first token: loaded {fast:.3f} s, messages anew {slow:.3f} s, ratio {fast / slow:.3f}")
    return 0


def _first(begin: Callable[[], Chat]) -> float:
    began = time.perf_counter()
    stream = begin().stream(NEXT, max_new_tokens=2)
    next(stream)
    seconds = time.perf_counter() - began
    stream.cancel()
    stream.read()
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
