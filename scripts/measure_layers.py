"""Time and memory of exporting full-size layers; fails if twice as many layers take much more memory.

Memory is what the process allocates itself (RssAnon): pages of the mapped checkpoint, which the system may drop at any
time, do not count.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from random_checkpoint import write_checkpoint

MAX_GROWTH = 1.15
TOKENIZER = Path(__file__).parents[1] / "sample" / "checkpoint"


def anonymous_memory(pid: int) -> int:
    """Bytes that the process has allocated; 0 after it ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def measure(scratch: Path, layers: int, options: list[str]) -> int:
    """Export a checkpoint of ``layers`` decoder layers; returns the peak memory in bytes."""
    checkpoint, bundle = scratch / "checkpoint", scratch / "bundle"
    for folder in (checkpoint, bundle):
        shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(checkpoint, TOKENIZER, layers, seed=0)
    command = [sys.executable, "-m", "owl2.export", str(checkpoint), str(bundle), *options]
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    print(f"{layers} decoder layers: peak memory {peak / 2**30:.2f} GiB", flush=True)
    shutil.rmtree(checkpoint)
    shutil.rmtree(bundle)
    return peak


def main() -> int:
    """Command line; unknown options go to owl2-export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path, help="folder for checkpoints of a few GB")
    parser.add_argument("--layers", type=int, default=2, help="the smaller of the two models (default 2)")
    arguments, options = parser.parse_known_args()
    few, many = (measure(arguments.scratch, arguments.layers * factor, options) for factor in (1, 2))
    print(f"twice the layers take {many / few:.2f} times the memory")
    return int(many > MAX_GROWTH * few)


if __name__ == "__main__":
    raise SystemExit(main())
