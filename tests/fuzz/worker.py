"""A process that runs the inputs of one surface and tells what became of each, a line of JSON for every input.

Whatever an input does ends here: a crash, a hang and an allocation beyond the limit end this process at most, whose
parent sees which input it was at. What libraries write to stdout and stderr is caught.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from fuzz.outcome import CONTROL, CPU_SECONDS, WALL_SECONDS, Finding, Outcome, TooLongError, as_json, judge
from fuzz.surface import PLANS, Input, Plan, Surface, numbers

ADDRESS_SPACE = 6 << 30
"""Bytes that a process may map beyond what it has mapped before its first input."""
DUMP = "dump"
"""File in the working folder in which a crash or a hang leaves its traceback."""


@dataclass(frozen=True, slots=True)
class Work:
    """Part of a campaign.

    Attributes:
        surface, seed, start, stop: which inputs.
        folder: for the base files, shared and kept; findings go to ``findings`` in it.
        deadline: on the monotonic clock, after which no input begins; 0 for none.
        skip_first: save the first input as one that ended a process, and do not run it.
        repeat: a kept input to run instead of those made from numbers.
        wall_seconds, cpu_seconds: that an input may take.
    """

    surface: str
    folder: str
    seed: int = 0
    start: int = 0
    stop: int = 0
    deadline: float = 0.0
    skip_first: bool = False
    repeat: str = ""
    wall_seconds: float = WALL_SECONDS
    cpu_seconds: float = CPU_SECONDS


def main() -> None:
    """Run the work that is described on the command line."""
    work = Work(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        scratch = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        os.environ["OMP_NUM_THREADS"] = "1"
        written = os.open(scratch / "written", os.O_RDWR | os.O_CREAT)
        os.dup2(written, 1)
        os.dup2(written, 2)
        with Path(sys.argv[2]).open("w") as dump:
            faulthandler.enable(dump)
            try:
                module = importlib.import_module(f"fuzz.surfaces.{PLANS[work.surface].module}")
                surface: Surface = module.open_surface(Path(work.folder), scratch)
            except Exception:
                answers.write(json.dumps({"broken": traceback.format_exc()}) + "\n")
                raise
            _limit_address_space()
            answers.write('{"begun": true}\n')
            for index, given in _inputs(work, surface, answers):
                # For what the alarm does not interrupt.
                faulthandler.dump_traceback_later(work.wall_seconds + 5, exit=True, file=dump)
                began, limits = time.perf_counter(), (work.wall_seconds, work.cpu_seconds)
                outcome = run_input(surface, given, PLANS[work.surface], written, limits)
                faulthandler.cancel_dump_traceback_later()
                _tell(answers, work, index, given, outcome, time.perf_counter() - began)
            answers.write('{"done": true}\n')


def _inputs(work: Work, surface: Surface, answers: TextIO) -> Iterator[tuple[int, Input]]:
    if work.repeat:
        yield 0, Input.read(Path(work.repeat))
        return
    for index in range(work.start, work.stop):
        if work.deadline and time.monotonic() > work.deadline:
            return
        given = surface.make(numbers(work.surface, work.seed, index))
        if work.skip_first and index == work.start:
            answers.write(json.dumps({"index": index, "saved": _save(work, given)}) + "\n")
        else:
            yield index, given


def run_input(
    surface: Surface,
    given: Input,
    plan: Plan,
    written: int,
    limits: tuple[float, float] = (WALL_SECONDS, CPU_SECONDS),
) -> Outcome:
    """Give an input to a surface in this process, and judge what becomes of it.

    Args:
        plan: what it may take, and whether libraries may write.
        written: handle of the file that stdout and stderr go to.
        limits: seconds that it may take, by the clock and of the CPU.
    """
    held, began = _resident("VmRSS"), time.process_time()
    _forget_peak()
    error: BaseException | None = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        former = signal.signal(signal.SIGALRM, _alarm)
        signal.setitimer(signal.ITIMER_REAL, limits[0])
        try:
            surface.run(given)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as problem:
            error = problem
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
    seconds, grown = time.process_time() - began, _resident("VmHWM") - held
    outcome = judge(error, warned)
    text = _taken(written)
    if outcome.finding is not None:
        return outcome
    if seconds > limits[1]:
        return _limit("cpu", f"{outcome.verdict} {outcome.error}", f"took {seconds:.1f} s of the CPU")
    if grown > plan.memory:
        detail = f"took {grown >> 20} MiB, bound {plan.memory >> 20}"
        return _limit("memory", f"{outcome.verdict} {outcome.error}", detail)
    if text and not plan.trusted and not (plan.remarks and not CONTROL.search(text)):
        words = re.sub(r"\x1b\[[\d;]*m|[-\d.:]+", "", text).split()
        return _limit("stderr", f"{outcome.verdict} {' '.join(words[:6])!r}", text)
    return outcome


def _alarm(_: int, __: FrameType | None) -> None:
    raise TooLongError


def _limit(kind: str, what: str, detail: str) -> Outcome:
    return Outcome("finding", kind, Finding(kind, what.strip(), "", detail[:2_000]))


def _tell(answers: TextIO, work: Work, index: int, given: Input, outcome: Outcome, seconds: float) -> None:
    line: dict[str, Any] = {
        "index": index, "verdict": outcome.verdict, "error": outcome.error, "target": given.target, "seconds": seconds,
    }  # fmt: skip
    if outcome.finding is not None:
        line |= {"finding": as_json(outcome.finding), "file": work.repeat or _save(work, given)}
    answers.write(json.dumps(line) + "\n")


def _save(work: Work, given: Input) -> str:
    path = Path(work.folder) / "findings" / work.surface / given.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(given.content)
    return str(path)


def _taken(handle: int) -> str:
    """What was written to stdout and stderr since the last call."""
    sys.stdout.flush()
    sys.stderr.flush()
    size = os.fstat(handle).st_size
    if not size:
        return ""
    text = os.pread(handle, min(size, 4_000), 0).decode(errors="replace")
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    return text


def _resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM``, the resident size of this process or its peak, or ``VmSize``: bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) << 10


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _limit_address_space() -> None:
    limit = _resident("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
