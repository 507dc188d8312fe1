"""Whether what happened to an input is what was promised."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import owl2.export
import owl2.quant
import owl2.runtime
from owl2.runtime.errors import Owl2Error, Owl2Warning

LONGEST_LINE, LONGEST_MESSAGE = 2_000, 50_000
"""Characters of a sentence, and of a message that lists what is wrong line by line."""
CPU_SECONDS, WALL_SECONDS = 20.0, 60.0
"""That an input may take; it is stopped after the latter. A strip of 30,000 pixels takes 10 to square."""
ROOT = Path(__file__).resolve().parents[2]
OUR_FOLDERS = tuple(
    f"{Path(folder)}/" for package in (owl2.runtime, owl2.export, owl2.quant) for folder in package.__path__
)
# A list has its entries in lines of their own.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class TooLongError(BaseException):
    """An input took too long; no ``except Exception`` catches it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise.

    Attributes:
        kind: ``exception``, ``message``, ``warning``, ``stderr``, ``cpu``, ``memory``, ``hang`` or ``crash``.
        what: type of the exception, or the like; findings of the same kind, ``what`` and place are one.
        place: innermost frame of this project's code.
        detail: for people.
    """

    kind: str
    what: str
    place: str
    detail: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.what, self.place


@dataclass(frozen=True, slots=True)
class Outcome:
    """``accepted``, ``refused`` or a finding, with the type of the error where there was one."""

    verdict: str
    error: str = ""
    finding: Finding | None = None


def judge(error: BaseException | None, warned: Sequence[warnings.WarningMessage]) -> Outcome:
    """The outcome of an input that led to ``error`` and to warnings; time and memory are the worker's business."""
    for warning in warned:
        if not issubclass(warning.category, Owl2Warning):
            place = _place_of_file(warning.filename, warning.lineno)
            return _found("warning", warning.category.__name__, place, str(warning.message))
        problem = message_problem(str(warning.message))
        if problem:
            return _found("message", problem, _place_of_file(warning.filename, warning.lineno), str(warning.message))
    if error is None:
        return Outcome("accepted")
    name, place = type(error).__name__, innermost(error.__traceback__)
    if isinstance(error, TooLongError):
        return _found("hang", "hang", place, "".join(traceback.format_exception(error))[-2_000:])
    if not isinstance(error, Owl2Error):
        return _found("exception", name, place, "".join(traceback.format_exception(error))[-2_000:])
    text = str(error)
    problem = message_problem(text)
    return _found("message", f"{name}: {problem}", place, text) if problem else Outcome("refused", name)


def _found(kind: str, what: str, place: str, detail: str) -> Outcome:
    return Outcome("finding", what, Finding(kind, what, place, detail[:2_000]))


def message_problem(text: str) -> str:
    """What is wrong with a message for people; empty if nothing is."""
    longest = max((len(line) for line in text.split("\n")), default=0)
    if not text.strip():
        return "empty"
    if longest > LONGEST_LINE or len(text) > LONGEST_MESSAGE:
        return "too long"
    if CONTROL.search(text):
        return "control characters"
    # A list is indented, anything else is somebody else's text.
    if any(not line.startswith("  ") for line in text.split("\n")[1:]):
        return "several lines"
    return ""


def innermost(trace: TracebackType | None) -> str:
    """The innermost frame of this project's code in a traceback."""
    ours = [
        _place(frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(trace)
        if frame.f_code.co_filename.startswith(OUR_FOLDERS)
    ]
    return ours[-1] if ours else "?"


def place_in_dump(text: str) -> str:
    """The innermost frame of this project's code in a dump of faulthandler, which has it first."""
    for file, line, name in re.findall(r'File "([^"]+)", line (\d+) in (\S+)', text):
        if file.startswith(OUR_FOLDERS):
            return _place(file, int(line), name)
    return "?"


def _place(file: str, line: int, name: str) -> str:
    return f"{_short(file)}:{line} {name}"


def _place_of_file(file: str, line: int) -> str:
    return f"{_short(file)}:{line}"


def _short(file: str) -> str:
    folder = next((folder for folder in OUR_FOLDERS if file.startswith(folder)), None)
    return Path(file).name if folder is None else str(Path(file).relative_to(Path(folder).parent))


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding as plain values."""
    return {"kind": finding.kind, "what": finding.what, "place": finding.place, "detail": finding.detail}
