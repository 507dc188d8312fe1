"""What a new process does: load a bundle and answer with one token."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import get_args

from owl2.runtime.bench.workload import Workload
from owl2.runtime.engine import BackendName, EngineOptions
from owl2.runtime.load import open_bundle
from owl2.runtime.spec import KvType


def main(folder: str, backend: str, threads: str, kv_cache: str) -> None:
    """Write the seconds as JSON: to a loaded model, and to the first token.

    Args:
        folder: the bundle.
        backend, threads, kv_cache: as of :class:`EngineOptions`, as text; empty for None.
    """
    options = EngineOptions(
        threads=int(threads) if threads else None,
        backend=next((name for name in get_args(BackendName) if name == backend), None),
        kv_cache=next((name for name in get_args(KvType) if name == kv_cache), None),
    )
    began = time.perf_counter()
    _, model = open_bundle(Path(folder), options)
    loaded = time.perf_counter()
    Workload(model).question()
    sys.stdout.write(json.dumps({"load": loaded - began, "first_token": time.perf_counter() - began}))
