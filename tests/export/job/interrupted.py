"""Run exports that are killed at given points; a program of its own, since a kill spares nothing.

usage: interrupted.py JOBS.json

Each job is ``{"config": {...}, "kill": [owner, name, calls, "before" | "after"] or null}``: the process that runs it
gets a SIGKILL right before or after that call of the function. Written is one JSON object per job: the notes that the
user was given, and how the process ended.
"""

import functools
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which torch would import in every process, when first needed

from owl2.export.config import ExportConfig
from owl2.export.job.progress import Silent
from owl2.export.pipeline import export_bundle


class Written(Silent):
    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text + "\n")


def plant(owner: str, name: str, calls: int, when: str) -> None:
    """Kill this process at a call of ``owner.name``."""
    module, _, kind = owner.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, kind) if kind else holder
    original, made = getattr(holder, name), 0

    @functools.wraps(original)
    def deadly(*args: Any, **settings: Any) -> Any:
        nonlocal made
        made += 1
        if made == calls and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **settings)
        if made == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, deadly)


def main() -> None:
    torch.set_num_threads(1)
    jobs_path = Path(sys.argv[1])
    for job in json.loads(jobs_path.read_text()):
        notes = jobs_path.with_suffix(".notes")
        notes.write_text("")
        process = os.fork()  # torch is imported once
        if process == 0:
            try:
                if job["kill"]:
                    plant(*job["kill"])
                settings: dict[str, Any] = {
                    name: Path(value) if name in ("checkpoint", "bundle") else value
                    for name, value in job["config"].items()
                }
                export_bundle(ExportConfig(**settings), Written(notes))
            except BaseException:
                # Not by an orderly exit: that waits for threads of ONNX Runtime, which a fork does not have.
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        ended = os.waitstatus_to_exitcode(status)
        sys.stdout.write(json.dumps({"notes": notes.read_text().splitlines(), "ended": ended}) + "\n")


if __name__ == "__main__":
    main()
