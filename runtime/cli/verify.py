"""``owl2 verify``: whether a bundle is intact and this device computes the right logits."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path

import click

from owl2.runtime.cli.console import duration, load_progress, reports_errors, say, say_json
from owl2.runtime.cli.options import backend_option, bundle_argument, device_option, memory_option, threads_option
from owl2.runtime.cli.table import table
from owl2.runtime.engine import BackendName
from owl2.runtime.evaluation.verify import Verdict, verify
from owl2.runtime.harmless import harmless


@click.command("verify")
@bundle_argument
@device_option
@threads_option
@backend_option
@memory_option
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@reports_errors
def verify_command(
    *, bundle: Path, device: str, threads: int | None, backend: BackendName | None, check_memory: bool, as_json: bool
) -> None:
    """Hash every file, and replay the bundle's golden prompts on this device.

    A bundle holds a few prompts with the logits they must lead to: text, one image, several. The logits of this device
    may differ by the limit in the bundle's report, as KL divergence in nats; next to it is the KL divergence of the
    exporting machine. The exit code is 0 for pass and 1 for FAIL.

    \b
    Examples:
      owl2 verify bundle/
      owl2 verify bundle/ --threads 2 --json
      owl2 verify bundle/ --device cuda
    """
    with load_progress() as progress:
        verdict = verify(
            bundle, device=device, threads=threads, backend=backend, check_memory=check_memory, progress=progress
        )
    if as_json:
        times = {"load_seconds": verdict.load_seconds, "replay_seconds": verdict.replay_seconds}
        goldens = [
            # JSON has no NaN.
            asdict(replay) | {"kl": None if math.isnan(replay.kl) else replay.kl, "passed": replay.passed}
            for replay in verdict.replays
        ]
        told = {"problems": verdict.problems, "differences": verdict.differences, "notes": verdict.notes}
        say_json({"passed": verdict.passed, **told, "goldens": goldens, **times})
    else:
        say(_table(bundle, verdict))
    sys.exit(0 if verdict.passed else 1)


def _table(folder: Path, verdict: Verdict) -> str:
    if verdict.problems:
        lines = [f"  {harmless(problem)}" for problem in verdict.problems]
        return "\n".join([f"{folder}: files differ from the export; nothing was replayed", *lines, "FAIL"])
    rows = [("golden", "KL (nats)", "limit", "exporter", "same best token", "")]
    for replay in verdict.replays:
        figures = f"{replay.kl:.2e}", f"{replay.limit:.1e}", f"{replay.exported_kl:.1e}", f"{replay.top1_agreement:.1%}"
        shown = ("", "", "", "") if replay.problem else figures
        rows.append((replay.name, *shown, "pass" if replay.passed else "FAIL"))
    problems = [harmless(f"{replay.name}: {replay.problem}") for replay in verdict.replays if replay.problem]
    times = f"loaded in {duration(verdict.load_seconds)}, replayed in {duration(verdict.replay_seconds)}"
    result = "pass" if verdict.passed else "FAIL"
    told = [*problems, *verdict.differences, *(f"note: {note}" for note in verdict.notes)]
    return "\n".join([table(rows, "<>>>>"), *told, "", f"all files verified; {times}", result])
