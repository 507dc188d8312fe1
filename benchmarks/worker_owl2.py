"""Worker of peers.py: a bundle in this project's runtime.

``python worker_owl2.py BUNDLE BACKEND THREADS``; then one request of JSON per line, and one answer each.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import get_args

from owl2.runtime.bench.workload import Workload
from owl2.runtime.engine import BackendName, EngineOptions, KvBuffers
from owl2.runtime.load import open_bundle

TOKENS = 8


def memory() -> dict[str, int]:
    """Private and mapped bytes of this process."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE))
    private = int(found["Anonymous"]) * 1024
    return {"private": private, "mapped": int(found["Rss"]) * 1024 - private}


def main(folder: str, backend: str, threads: str) -> None:
    """Answer requests until stdin ends."""
    name = next(one for one in get_args(BackendName) if one == backend)
    began = time.perf_counter()
    _, model = open_bundle(Path(folder), EngineOptions(threads=int(threads), backend=name))
    ready = time.perf_counter()
    work = Workload(model)
    work.question()
    print(json.dumps({"load": ready - began, "first_token": time.perf_counter() - began}), flush=True)
    filled: dict[int, KvBuffers] = {}
    for line in sys.stdin:
        match json.loads(line):
            case ["prefill", int(count)]:
                answer: object = work.prefill(count)
            case ["decode", int(context)]:
                if context not in filled:
                    filled[context] = work.filled(context)
                answer = sum(work.step(filled[context], context) for _ in range(TOKENS)) / TOKENS
            case ["rows", int(count)]:
                if 128 not in filled:
                    filled[128] = work.filled(128)
                answer = work.rows(filled[128], 128, count)
            case ["picture"]:
                first, second = work.conversation()
                answer = [first.stats.time_to_first_token, second.stats.time_to_first_token]
            case ["memory", int(context)]:
                held = work.filled(context)
                work.step(held, context)
                answer = memory()
            case _:
                answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
