"""What a grammar costs: seconds a token with and without one, interleaved, for the same tokens.

An expression that allows everything leaves an answer as it is, so that the difference is the grammar's alone. A JSON
schema is timed as well; its answer is another one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from owl2 import Owl2

QUESTION = "Describe the picture in a few words."
ANYTHING = r"(.|\n)*"
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 30, "maxLength": 60},
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 6, "maxLength": 12}, "minItems": 3},
    },
    "required": ["title", "score", "tags"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "everything allowed": {"regex": ANYTHING},
    "JSON schema": {"schema": SCHEMA},
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with Owl2.load(options.bundle, threads=options.threads) as owl:
        began = time.perf_counter()
        assert owl.model.grammars is not None
        print(f"the tokenizer is prepared once, in {time.perf_counter() - began:.2f} s")
        speeds: dict[str, list[float]] = {name: [] for name in CASES}
        texts: dict[str, str] = {}
        for number in range(options.rounds + 1):
            for name, grammar in CASES.items():
                answer = owl.chat().ask(QUESTION, max_new_tokens=options.tokens, lookup=False, **grammar)
                texts[name] = answer.text
                if number and answer.stats.tokens_per_second:
                    speeds[name].append(answer.stats.tokens_per_second)
    if texts["none"] != texts["everything allowed"]:
        raise SystemExit("the grammar that allows everything changed the answer")
    free = statistics.median(speeds["none"])
    for name, found in speeds.items():
        middle = statistics.median(found)
        extra = 1000 * (1 / middle - 1 / free)
        print(f"{name:20} {middle:8.1f} tokens/s   {extra:+.2f} ms a token   {middle / free:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
