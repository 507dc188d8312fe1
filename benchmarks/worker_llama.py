"""Worker of peers.py: a GGUF file in llama.cpp, through llama-cpp-python; runs in that package's own environment.

``python worker_llama.py MODEL THREADS``; then one request of JSON per line, and one answer each. Flash attention and
keys and values in float16, one context for each length, so that none attends over the cells of another.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

TOKENS = 8
BATCH = 512


def memory() -> dict[str, int]:
    """Private and mapped bytes of this process."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE))
    private = int(found["Anonymous"]) * 1024
    return {"private": private, "mapped": int(found["Rss"]) * 1024 - private}


class Context:
    """A context of one sequence."""

    def __init__(self, model: Any, threads: int, size: int) -> None:  # noqa: ANN401 - a pointer
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = (size + 255) // 256 * 256
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.no_perf = True
        self.handle = llama_cpp.llama_init_from_model(model, settings)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.length = 0

    def fill(self, tokens: list[int], first: int, *, last: bool) -> None:
        """Put tokens into the batch, from this position on; the logits of the last are wanted at the end."""
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, first + i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = last and i == len(tokens) - 1

    def run(self, count: int) -> float:
        """Seconds of so many more tokens, with the logits of the last."""
        tokens = [random.randrange(300, 32000) for _ in range(count)]
        began = time.perf_counter()
        for start in range(0, count, BATCH):
            part = tokens[start : start + BATCH]
            self.fill(part, self.length + start, last=start + BATCH >= count)
            if llama_cpp.llama_decode(self.handle, self.batch):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.handle)
        seconds = time.perf_counter() - began
        self.length += count
        return seconds

    def cut(self, length: int) -> None:
        """Forget what follows."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.handle), 0, length, -1)
        self.length = length

    def close(self) -> None:
        """Give its memory back."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.handle)


def main(path: str, given: str) -> None:
    """Answer requests until stdin ends."""
    threads = int(given)
    llama_cpp.llama_backend_init()
    began = time.perf_counter()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    prompts = Context(model, threads, BATCH)
    ready = time.perf_counter()
    prompts.run(20)
    print(json.dumps({"load": ready - began, "first_token": time.perf_counter() - began}), flush=True)
    contexts: dict[int, Context] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request[0] == "prefill":
            prompts.cut(0)
            answer: object = prompts.run(request[1])
        elif request[0] == "decode":
            length = request[1]
            if length not in contexts:
                contexts[length] = Context(model, threads, length + TOKENS)
                contexts[length].run(length)
            contexts[length].cut(length)
            answer = sum(contexts[length].run(1) for _ in range(TOKENS)) / TOKENS
        elif request[0] == "memory":
            prompts.close()
            held = Context(model, threads, request[1] + TOKENS)
            held.run(request[1])
            answer = memory()
        else:
            answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
