"""Time for the first and the second question about an image, with the KV cache and without.

Every round asks two questions in a chat, then the second one again in a cold conversation with the same history, so
that all figures come from interleaved runs. Medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from owl2 import Owl2, Stats
from owl2.runtime.families.mplug_owl2.template import Message, render

FIRST, SECOND = "What shapes are there?", "Which of them is the largest?"


@dataclass
class Round:
    """Figures of one round: both turns, and the second turn with nothing reused."""

    first: Stats
    second: Stats
    cold: Stats


def load(bundle: Path) -> Owl2:
    """Load a bundle and run a first step, which allocates."""
    owl = Owl2.load(bundle)
    owl.generate("USER: Hi ASSISTANT:", max_new_tokens=2)
    return owl


def run_round(bundle: Path, image: Path) -> Round:
    """One conversation from a fresh load, since a loaded model remembers the rows of images."""
    with load(bundle) as owl, load(bundle) as other:
        chat = owl.chat()
        first = chat.ask(FIRST, images=image, max_new_tokens=16)
        second = chat.ask(SECOND, max_new_tokens=16)
        history = [Message("USER", f"<|image|>{FIRST}"), Message("ASSISTANT", first.text), Message("USER", SECOND)]
        prompt = render([*history, Message("ASSISTANT")])
        cold = other.generate(prompt, images=image, max_new_tokens=16)
    return Round(first.stats, second.stats, cold.stats)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, help="folder of .png images, one for each round in turn")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    images = sorted(options.images.glob("*.png"))
    began = time.perf_counter()
    rounds = [run_round(options.bundle, images[i % len(images)]) for i in range(options.rounds)]
    seconds = time.perf_counter() - began

    def median(name: str, field: str) -> float:
        values: list[float] = [getattr(getattr(entry, name), field) for entry in rounds]
        return statistics.median(values)

    first, second, cold = (median(name, "time_to_first_token") for name in ("first", "second", "cold"))
    record = {
        "rounds": len(rounds),
        "first_ttft_ms": round(first * 1000, 2),
        "second_ttft_ms": round(second * 1000, 2),
        "second_cold_ttft_ms": round(cold * 1000, 2),
        "second_over_first": round(second / first, 3),
        "second_over_cold": round(second / cold, 3),
        "second_prompt_tokens": median("second", "prompt_tokens"),
        "second_reused_tokens": median("second", "reused_tokens"),
        "second_images_encoded": max(entry.second.images_encoded for entry in rounds),
        "tokens_per_second": round(median("second", "tokens_per_second"), 1),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(record) if options.json else "\n".join(f"{name:24}{value}" for name, value in record.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
