"""Time of answers with and without prompt lookup, interleaved.

The answers are given, so that weights of any quality, random ones too, can say them: one quotes its prompt between
words of its own, one shares nothing with it, and one goes on differently wherever it repeats three words of the prompt.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from owl2.runtime.cancellation import NEVER
from owl2.runtime.engine import EngineOptions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.kv_cache import Key
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.lookup import LookupAccount
from owl2.runtime.steps import Steps

PROMPT, ANSWER = 120, 60


def prompts(vocabulary: int) -> dict[str, tuple[list[Key], list[int]]]:
    """Prompt and answer of each kind."""
    chance = random.Random(0)

    def words(count: int) -> list[int]:
        return [chance.randrange(300, vocabulary) for _ in range(count)]

    prompt = words(PROMPT)
    quoting = [*prompt[:3], *words(5), *prompt[20:65], *words(4)]
    misled: list[int] = []
    while len(misled) < ANSWER:
        start = chance.randrange(PROMPT - 3)
        misled += [*prompt[start : start + 3], *words(1)]
    answers = {"quotes its prompt": quoting, "shares nothing": words(ANSWER), "misleads": misled[:ANSWER]}
    return {name: (list[Key](prompt), (answer + words(ANSWER))[:ANSWER]) for name, answer in answers.items()}


def answered(model: Loaded, prompt: list[Key], answer: list[int], *, lookup: bool) -> tuple[float, int, int]:
    """Seconds of all tokens after the first, and how many were drafted and right."""
    cache = model.new_cache()
    claim = cache.claim()
    embeds = model.table.rows([int(key) for key in prompt if isinstance(key, int)])
    model.engine.prefill(embeds, np.zeros(len(prompt), np.int64), 0, claim.reserve(len(prompt)), np.array([0]))
    claim.commit(prompt)
    steps = Steps(model, claim, Prompt(prompt, {}), lookup=lookup)
    began = time.perf_counter()
    for number, token in enumerate(answer):
        steps.feed(token, len(answer) - number - 1, NEVER)
    seconds = time.perf_counter() - began
    steps.settle()
    return seconds, steps.drafted, steps.accepted


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model = open_bundle(options.bundle, EngineOptions(threads=options.threads, backend="native"))[1]
    cases = prompts(model.config.decoder.vocab_size)
    times: dict[tuple[str, bool], list[float]] = {}
    told: dict[str, tuple[int, int]] = {}
    for round_number in range(options.rounds + 1):
        for name, (prompt, answer) in cases.items():
            for lookup in (False, True):
                fresh = replace(model, lookup=LookupAccount())
                seconds, drafted, accepted = answered(fresh, prompt, answer, lookup=lookup)
                if round_number:
                    times.setdefault((name, lookup), []).append(seconds)
                if lookup:
                    told[name] = drafted, accepted
    for name in cases:
        plain, ahead = (statistics.median(times[name, lookup]) for lookup in (False, True))
        print(
            f"{name:18} {1000 * plain / ANSWER:7.1f} ms a token without, {1000 * ahead / ANSWER:7.1f} with: "
            f"{plain / ahead:.2f} x; {told[name][1]} of {told[name][0]} drafted tokens were right"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
