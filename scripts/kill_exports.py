"""Kill exports at random moments, and compare what becomes of them with an export that was left alone.

Each export is started again until it ends by itself. Every second one replaces a bundle, which must be whole or put
back whenever the export was killed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from owl2.runtime import spec
from owl2.runtime.bundle import Bundle

TIMED = (spec.REPORT, spec.MANIFEST)
"""Files with times and memory, or with the hash of these."""


@dataclass(frozen=True)
class Case:
    """One export: where it goes, and what it must become."""

    command: list[str]
    target: Path
    expected: dict[str, bytes]


def files(bundle: Path) -> dict[str, bytes]:
    Bundle.open(bundle, force=True)
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name not in TIMED}


def run(command: list[str], seconds: float | None) -> bool:
    """Run a command, for some seconds at most; returns whether it ended by itself."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return False
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {said}")
    return True


def kills(case: Case, moments: list[float], former: Path | None) -> int:
    """Export with a kill after each of these seconds; returns how many of them hit. Raises if the result differs."""
    target = case.target
    if former is not None:
        shutil.copytree(former, target)
    hit = 0
    for moment in moments:
        if run(case.command, moment):
            break
        hit += 1
        aside = target.parent / f".{target.name}.partial" / "replaced"
        if former is not None:
            files(target if target.exists() else aside)
    else:
        run(case.command, None)
    if files(target) != case.expected:
        raise RuntimeError(f"{target} differs")
    if {path.name for path in target.parent.iterdir()} != {target.name}:
        raise RuntimeError(f"{target.parent} holds more than the bundle")
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="a new folder to work in")
    parser.add_argument("--exports", type=int, default=40)
    parser.add_argument("--kills", type=int, default=3, help="of one export, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of owl2-export; the rest of the line")
    given = parser.parse_args()
    given.folder.mkdir()
    chance = random.Random(given.seed)

    def command(target: Path) -> list[str]:
        arguments = [str(given.checkpoint), str(target), "--overwrite", *given.options]
        return [sys.executable, "-m", "owl2.export", *arguments]

    whole = given.folder / "whole"
    began = time.monotonic()
    run(command(whole), None)
    duration = time.monotonic() - began
    expected, total = files(whole), 0
    for number in range(given.exports):
        target = given.folder / str(number) / "bundle"
        target.parent.mkdir()
        moments = [chance.uniform(0, 1.05 * duration) for _ in range(chance.randint(1, given.kills))]
        total += kills(Case(command(target), target, expected), moments, whole if number % 2 else None)
        shutil.rmtree(target.parent)
        print(f"{number + 1} exports, killed {total} times: all identical", flush=True)


if __name__ == "__main__":
    main()
