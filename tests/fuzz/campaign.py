"""Many inputs on many surfaces: workers are started, watched and replaced, their answers counted."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fuzz.outcome import CPU_SECONDS, ROOT, WALL_SECONDS, Finding, as_json, place_in_dump
from fuzz.surface import PLANS
from fuzz.worker import Work

CHUNK = 4_000
"""Most inputs of a process, so that what one leaves behind does not add up."""
ROUND = 4_000
"""Inputs of all surfaces together between two looks at the clock."""

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """What became of the inputs of one surface."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return sum(self.outcomes.values())


@dataclass
class Found:
    """A finding, how often it was met, and the number and the file of the first input that led to it."""

    surface: str
    finding: Finding
    index: int
    file: str
    count: int = 0


class Campaign:
    """Runs inputs; may be used by several threads.

    Attributes:
        tallies: by surface.
        found: by surface, kind, what and place.
        broken: why a worker could not even begin, by surface.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.tallies: dict[str, Tally] = {}
        self.found: dict[tuple[str, ...], Found] = {}
        self.broken: dict[str, str] = {}
        self._folder, self._seed = folder, seed
        self._lock = threading.Lock()

    def run_inputs(self, surfaces: list[str], count: int, jobs: int) -> None:
        """Run this many inputs, divided among the surfaces by their shares."""
        self._run([work for name in surfaces for work in self._works(name, 0, share(name, surfaces, count))], jobs)

    def run_minutes(self, surfaces: list[str], minutes: float, jobs: int) -> None:
        """Run as many inputs as there is time for."""
        deadline, begun = time.monotonic() + 60 * minutes, dict.fromkeys(surfaces, 0)
        while time.monotonic() < deadline and not set(surfaces) <= set(self.broken):
            works: list[Work] = []
            for name in surfaces:
                count = share(name, surfaces, ROUND)
                works += self._works(name, begun[name], begun[name] + count, deadline)
                begun[name] += count
            self._run(works, jobs)

    def repeat(self, surface: str, path: Path, wall: float = WALL_SECONDS, cpu: float = CPU_SECONDS) -> None:
        """Run a kept input, with limits in seconds."""
        self._follow(Work(surface, str(self._folder), repeat=str(path), wall_seconds=wall, cpu_seconds=cpu))

    def _works(self, name: str, start: int, stop: int, deadline: float = 0.0) -> Iterator[Work]:
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            yield Work(name, str(self._folder), self._seed, first, last, deadline)

    def _run(self, works: list[Work], jobs: int) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            # list() raises what a thread raised.
            list(pool.map(self._follow, works))

    def _follow(self, work: Work) -> None:
        """See a worker through its inputs; one that ends before is replaced by one that skips what ended it."""
        while work.repeat or work.start < work.stop:
            reached = self._one_process(work)
            if reached is None:
                break
            work = replace(work, start=reached, skip_first=True)
        tally = self.tallies.get(work.surface, Tally())
        log.info("%s: %s inputs, %s", work.surface, tally.inputs, dict(tally.outcomes))

    def _one_process(self, work: Work) -> int | None:
        """Run a worker; returns the input that ended it, or None if all went well."""
        dump = self._folder / f"dump-{work.surface}-{work.start}-{os.getpid()}"
        command = [sys.executable, "-m", "fuzz.worker", json.dumps(asdict(work)), str(dump)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
        reached, said, problem = work.start + work.skip_first, set[str](), ""
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                for line in process.stdout:
                    answer = json.loads(line)
                    said |= answer.keys()
                    if "saved" in answer:
                        self._keep(work.surface, answer)
                    elif "verdict" in answer:
                        self._count(work.surface, answer)
                        reached = answer["index"] + 1
                    problem = answer.get("broken", problem)
                problem = problem or process.stderr.read()
            except BaseException:
                process.kill()
                raise
        text = dump.read_text(errors="replace") if dump.exists() else ""
        dump.unlink(missing_ok=True)
        if "done" in said:
            return None
        if "begun" not in said:
            with self._lock:
                self.broken[work.surface] = (problem or text)[-2_000:]
            return None
        hung = "Timeout" in text
        what = "hang" if hung else signal.Signals(-process.returncode).name if process.returncode < 0 else "exit"
        if PLANS[work.surface].trusted and not hung and process.returncode < 0:
            self._count(work.surface, {"verdict": "crash", "index": reached, "seconds": 0.0})
            return None if work.repeat else reached
        finding = Finding("hang" if hung else "crash", what, place_in_dump(text), text[:2_000])
        self._count(work.surface, {
            "verdict": "finding", "error": finding.kind, "finding": as_json(finding), "index": reached,
            "file": work.repeat, "seconds": 0.0,
        })  # fmt: skip
        return None if work.repeat else reached

    def _keep(self, surface: str, answer: dict[str, Any]) -> None:
        """Note where the input that ended a process was saved, if it is the first of its kind."""
        with self._lock:
            for found in self.found.values():
                if (found.surface, found.index) == (surface, answer["index"]) and not found.file:
                    found.file = answer["saved"]

    def _count(self, surface: str, answer: dict[str, Any]) -> None:
        with self._lock:
            tally = self.tallies.setdefault(surface, Tally())
            described = answer.get("finding")
            tally.outcomes[described["kind"] if described else answer["verdict"]] += 1
            tally.seconds += answer["seconds"]
            if answer["verdict"] == "refused":
                tally.errors[answer["error"]] += 1
            if described:
                finding = Finding(**described)
                known = self.found.setdefault(
                    (surface, *finding.key), Found(surface, finding, answer["index"], answer["file"])
                )
                known.count += 1
                if known.count > 1 and answer["file"] != known.file and Path(answer["file"]).parent.name == surface:
                    Path(answer["file"]).unlink(missing_ok=True)


def share(name: str, surfaces: list[str], count: int) -> int:
    """Inputs of a surface among ``count`` of some surfaces."""
    whole = sum(PLANS[other].share for other in surfaces)
    return max(1, round(count * PLANS[name].share / whole)) if whole else count
