"""Hostile inputs on every way into the project, and what became of them; ``make fuzz`` runs this.

Every input must be accepted, or refused with one of the project's errors in a sentence, within bounded time and memory.
Everything else is a finding: it is told once, its input is kept, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from fuzz.bundles import make_base
from fuzz.campaign import Campaign, Found
from fuzz.outcome import ROOT, as_json
from fuzz.surface import PLANS, SURFACES

INPUTS = 100_000


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--inputs", type=int, default=INPUTS, help=f"over all surfaces; {INPUTS} by default")
    amount.add_argument("--minutes", type=float, help="run for this long instead")
    parser.add_argument("--surfaces", default=",".join(SURFACES), help="separated by commas; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="for base files and findings")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="run one kept input again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    surfaces = options.surfaces.split(",")
    if unknown := set(surfaces) - set(PLANS):
        parser.error(f"surfaces {', '.join(sorted(unknown))}: choose from {', '.join(SURFACES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    make_base(options.folder)
    campaign, began = Campaign(options.folder, options.seed), time.perf_counter()
    if options.repeat is not None:
        campaign.repeat(options.repeat.resolve().parent.name, options.repeat.resolve())
    elif options.minutes is not None:
        campaign.run_minutes(surfaces, options.minutes, options.jobs)
    else:
        campaign.run_inputs(surfaces, options.inputs, options.jobs)
    seconds = time.perf_counter() - began
    print(json.dumps(record(campaign, seconds)) if options.json else table(campaign, seconds))
    return int(bool(campaign.found or campaign.broken))


def record(campaign: Campaign, seconds: float) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "seconds": round(seconds, 1),
        "surfaces": {
            name: {"inputs": tally.inputs, "outcomes": tally.outcomes, "errors": tally.errors, "seconds": tally.seconds}
            for name, tally in sorted(campaign.tallies.items())
        },
        "findings": [
            {"surface": found.surface, "count": found.count, "index": found.index, "repeat": command(found)}
            | as_json(found.finding)
            for found in campaign.found.values()
        ],
        "broken": campaign.broken,
    }


def command(found: Found) -> str:
    """The command that repeats a finding."""
    return f"make fuzz REPEAT={found.file}"


def table(campaign: Campaign, seconds: float) -> str:
    """Counts by surface and outcome, then every finding."""
    kinds = sorted({kind for tally in campaign.tallies.values() for kind in tally.outcomes} - {"accepted", "refused"})
    columns = ["inputs", "accepted", "refused", *kinds, "seconds"]
    lines = [f"{'surface':12}" + "".join(f"{name:>11}" for name in columns)]
    for name, tally in sorted(campaign.tallies.items()):
        numbers = [tally.inputs, *(tally.outcomes[kind] for kind in columns[1:-1]), round(tally.seconds)]
        lines.append(f"{name:12}" + "".join(f"{number:>11}" for number in numbers))
    total = [sum(tally.outcomes[kind] for tally in campaign.tallies.values()) for kind in columns[1:-1]]
    lines.append(f"{'all':12}" + "".join(f"{number:>11}" for number in (sum(total), *total, round(seconds))))
    for found in sorted(campaign.found.values(), key=lambda found: (found.surface, found.finding.key)):
        finding = found.finding
        shown = finding.detail.strip().splitlines()
        last = f"{shown[-1][:200]!r}" if shown else ""
        lines += [
            f"\n{found.surface}: {finding.kind}, {finding.what}, {found.count} times, at {finding.place or '?'}",
            f"  {last}",
            f"  {command(found)}",
        ]
    lines += [f"\n{name} could not be run:\n{problem}" for name, problem in campaign.broken.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
