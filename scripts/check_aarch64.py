"""Check that a bundle computes the same on aarch64 as here, with the versions of ONNX Runtime for a Jetson.

The installed wheel runs in an emulated aarch64 Debian (see emulated.py; about 1.1 GB in SCRATCH, kept for the next
run), on processors with the instructions of Jetson's CPUs. Compared are the logits of the bundle's golden prompts and
of the sample's images, the greedy answers, ``owl2 verify``, ``owl2 eval``, and a float32 bundle with the recorded
logits of the original implementation. Emulation says nothing about speed, and has no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import numpy as np
from check_wheels import CROSS, PURE, ROOT, build_wheel
from emulated import (
    AARCH64_WHEELS,
    Interpreter,
    aarch64_python,
    check_tools,
    debian_mirror,
    host_python,
    make_qemu,
    make_site,
    make_tree,
    run,
)
from numpy.typing import NDArray

from owl2.runtime.evaluation.divergence import IMAGE, TEXT, row_kl

# The last version with wheels for Python 3.10 on aarch64, which JetPack 6 has.
OLD = "onnxruntime==1.23.2"
NEWEST = "onnxruntime"
# qemu's cortex-a76 has what Orin's Cortex-A78AE has (int8 dot products, fp16), its neoverse-n2 what Thor's
# Neoverse-V3AE adds (SVE2, int8 matrix products, bf16).
ORIN, THOR, HOST = "cortex-a76", "neoverse-n2", "host"
NATIVE, PURE_WHEEL = "native", "onnxruntime"
MACHINES = (
    (HOST, NEWEST, NATIVE),
    (HOST, OLD, PURE_WHEEL),
    (ORIN, OLD, PURE_WHEEL),
    (ORIN, OLD, NATIVE),
    (ORIN, NEWEST, PURE_WHEEL),
    (THOR, NEWEST, NATIVE),
)
"""Processors, versions of ONNX Runtime, and what runs the decoder; the others are compared with the first.

The wheel with the native core uses it; the one without has ONNX Runtime do everything.
"""

CONVERSATIONS, CONVERSATIONS_SEED = 24, 7

GOLDEN = ROOT / "tests" / "golden"
GOLDEN_TOLERANCE = 1e-3
"""As in tests/test_end_to_end.py."""
KL_LIMIT = 1e-2
"""Nats per position by which a device may differ from float activations; as in export/checks/goldens.py."""


@dataclass(frozen=True)
class Recording:
    """Output of scripts/record_run.py, which describes ``arrays``."""

    onnxruntime: str
    answers: Mapping[str, str]
    ids: Mapping[str, Sequence[int]]
    names: Sequence[str]
    arrays: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of two recordings, over all prompts.

    Attributes:
        positions: text positions compared, in one pass and step by step.
        kl_text, kl_image, kl_steps: mean divergence in nats, of text and image positions of a whole prompt, and of
            text positions at the end of a prompt that is run step by step.
        largest_kl: at any text position.
        largest: absolute difference of a logit at any position.
        same_best: share of text positions with the same most likely token.
        other_answers: prompts with another greedy answer.
        answers: prompts that were answered.
    """

    positions: int
    kl_text: float
    kl_image: float
    kl_steps: float
    largest_kl: float
    largest: float
    same_best: float
    other_answers: tuple[str, ...]
    answers: int


@dataclass(frozen=True, slots=True)
class Result:
    """Results of one machine.

    Attributes:
        cpu: of qemu, or host.
        onnxruntime: its version.
        decoder: what runs it.
        difference: of the bundle's logits and answers, from those of the first machine.
        verified: whether ``owl2 verify`` passes.
        verified_kl: the largest divergence from float activations that it finds, nats; None if it is not a number.
        nats_per_token: by ``owl2 eval`` on conversations of the sample.
        golden: largest difference of a logit of the float32 golden bundle from the original implementation's.
        golden_answers: whether its greedy ids are the recorded ones.
    """

    cpu: str
    onnxruntime: str
    decoder: str
    difference: Difference
    verified: bool
    verified_kl: float | None
    nats_per_token: float
    golden: float
    golden_answers: bool

    @property
    def problems(self) -> list[str]:
        """Why this machine fails; empty if it does not."""
        prefill, steps = self.difference.kl_text, self.difference.kl_steps
        # Written so that NaN fails.
        checks = {
            "owl2 verify fails": not self.verified,
            f"mean KL {prefill:.1e} nats of whole prompts is above {KL_LIMIT:.0e}": not prefill <= KL_LIMIT,
            f"mean KL {steps:.1e} nats of single steps is above {KL_LIMIT:.0e}": not steps <= KL_LIMIT,
            f"float32 logits are off by {self.golden:.1e}": not self.golden <= GOLDEN_TOLERANCE,
            "float32 greedy ids differ from the recorded ones": not self.golden_answers,
        }
        return [problem for problem, applies in checks.items() if applies]


def read_recording(folder: Path) -> Recording:
    """Read the output of scripts/record_run.py."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    answers = [entry for entry in record["answers"] if entry["text"] is not None]
    with np.load(folder / "logits.npz", allow_pickle=False) as arrays:
        return Recording(
            record["onnxruntime"],
            {entry["name"]: entry["text"] for entry in answers},
            {entry["name"]: entry["ids"] for entry in answers},
            [entry["name"] for entry in record["answers"]],
            dict(arrays),
        )


def compare(reference: Recording, actual: Recording) -> Difference:
    """Difference of ``actual`` from ``reference``.

    Raises:
        ValueError: they are not of the same prompts.
    """
    if reference.names != actual.names:
        raise ValueError(f"recordings of different prompts: {reference.names} and {actual.names}")
    text, image, steps, same, largest = [], [], [], [], []
    for index in range(len(reference.names)):
        modality = reference.arrays[f"{index}.modality"]
        prefill, actual_prefill = reference.arrays[f"{index}.prefill"], actual.arrays[f"{index}.prefill"]
        kl = row_kl(prefill, actual_prefill)
        text.append(kl[modality == TEXT])
        image.append(kl[modality == IMAGE])
        same.append((prefill.argmax(-1) == actual_prefill.argmax(-1))[modality == TEXT])
        cached, actual_cached = reference.arrays[f"{index}.steps"], actual.arrays[f"{index}.steps"]
        steps.append(row_kl(cached, actual_cached))
        largest += [np.abs(prefill - actual_prefill).max(), np.abs(cached - actual_cached).max()]
    divergences = np.concatenate([*text, *steps])
    return Difference(
        positions=len(divergences),
        kl_text=_mean(text),
        kl_image=_mean(image),
        kl_steps=_mean(steps),
        largest_kl=float(divergences.max()),
        largest=float(np.max(largest)),
        same_best=_mean(same),
        other_answers=tuple(name for name, text in reference.answers.items() if actual.answers[name] != text),
        answers=len(reference.answers),
    )


def _mean(rows: Iterable[NDArray[Any]]) -> float:
    joined = np.concatenate(list(rows))
    return float(joined.mean()) if joined.size else 0.0


def golden_difference(recording: Recording, folder: Path) -> tuple[float, bool]:
    """Largest difference of a logit from the original implementation's, and whether the greedy ids are equal.

    Args:
        recording: of the cases of :func:`golden_cases`.
        folder: the golden data.

    Raises:
        ValueError, KeyError: a golden prompt was not recorded.
    """
    with np.load(folder / "forward.npz") as forward, np.load(folder / "decode.npz") as decode:
        indices = {name: recording.names.index(name) for name in _prompts(forward, "logits")}
        differences = [
            np.abs(recording.arrays[f"{index}.prefill"] - forward[f"{name}/logits"]).max()
            for name, index in indices.items()
        ]
        names = _prompts(decode, "new_ids")
        equal = [list(recording.ids[name]) == decode[f"{name}/new_ids"].tolist() for name in names]
    return float(np.max(differences)), all(equal)


def _prompts(arrays: Iterable[str], suffix: str) -> list[str]:
    return [name.removesuffix(f"/{suffix}") for name in arrays if name.endswith(f"/{suffix}")]


def sample_cases() -> list[dict[str, Any]]:
    """A prompt about each of the sample's images."""
    folder = ROOT / "sample" / "pictures"
    entries = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    return [
        {
            "name": entry["file"],
            "prompt": entry["prompt"],
            "images": [str(folder / entry["file"])],
            "max_new_tokens": 64,
        }
        for entry in entries
    ]


def golden_cases(folder: Path) -> list[dict[str, Any]]:
    """The prompts that were recorded from the original implementation."""
    prompts = {entry["id"]: entry["prompt"] for entry in json.loads((folder / "prompts.json").read_text())}
    return [
        {
            "name": entry["name"],
            "prompt": prompts[entry["prompt_id"]],
            "images": [str(GOLDEN / "images" / name) for name in entry["images"]],
            "preprocess": "resize",
            "max_new_tokens": 16,
        }
        for entry in json.loads((folder / "forward_index.json").read_text())
    ]


def interpreters(scratch: Path, mirror: str) -> dict[tuple[str, str, str], Interpreter]:
    """A Python for every machine, with this project's wheel."""
    tree, qemu = make_tree(scratch, mirror), make_qemu(scratch, mirror)
    pythons = {}
    for machine in MACHINES:
        cpu, onnxruntime, decoder = machine
        kind, wheels = (HOST, ()) if cpu == HOST else ("aarch64", AARCH64_WHEELS)
        site = make_site(scratch / f"site-{kind}-{onnxruntime}", [*_dependencies(), onnxruntime], wheels)
        path = (_installed(scratch, kind, decoder), site)
        pythons[machine] = host_python(path) if cpu == HOST else aarch64_python(tree, qemu, cpu, path)
    return pythons


def _installed(scratch: Path, kind: str, decoder: str) -> Path:
    """Folder of this project's wheel, built for a kind of machine; anew, unless another machine has it too."""
    name = f"owl2-{decoder}" if decoder == PURE_WHEEL else f"owl2-{decoder}-{kind}"
    if name not in _BUILT:
        shutil.rmtree(scratch / name, ignore_errors=True)
        settings = PURE if decoder == PURE_WHEEL else {} if kind == HOST else CROSS
        wheel = build_wheel(scratch / f"wheel-{name}", settings)
        foreign = (*AARCH64_WHEELS, "--platform", "linux_aarch64") if settings is CROSS else ()
        _BUILT[name] = make_site(scratch / name, [str(wheel)], ["--no-deps", *foreign])
    return _BUILT[name]


_BUILT: dict[str, Path] = {}


def _dependencies() -> list[str]:
    """Requirements of the plain install."""
    return [need for need in requires("owl2") or [] if ";" not in need]


def prepare(scratch: Path) -> Path:
    """The prompts, the conversations and the float32 golden bundle: their folder."""
    data = scratch / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    (data / "bundle.json").write_text(json.dumps(sample_cases()), encoding="utf-8")
    (data / "golden.json").write_text(json.dumps(golden_cases(GOLDEN / "a1_base_bin")), encoding="utf-8")
    talks = ["--count", CONVERSATIONS, "--seed", CONVERSATIONS_SEED]
    run(sys.executable, ROOT / "sample" / "make_calibration.py", data / "talks", *talks)
    checkpoint = GOLDEN / "a1_base_bin" / "model"
    run(sys.executable, "-m", "owl2.export", checkpoint, data / "golden", "--weights", "fp32", "--json")
    return data


def record(python: Interpreter, bundle: Path, cases: Path, out: Path) -> Recording:
    """Run scripts/record_run.py; exits if it fails."""
    finished(python.run(ROOT / "scripts" / "record_run.py", bundle, cases, out))
    return read_recording(out)


def measure(
    cpu: str, decoder: str, python: Interpreter, folders: tuple[Path, Path, Path], reference: Recording | None
) -> Result:
    """Run everything on one machine.

    Args:
        cpu: its name.
        decoder: what runs it.
        python: runs on it.
        folders: of the bundle, of :func:`prepare`, and for the recordings.
        reference: the first machine's recording; None if this is the first.
    """
    bundle, data, out = folders
    recording = record(python, bundle, data / "bundle.json", out / "bundle")
    largest, equal = golden_difference(
        record(python, data / "golden", data / "golden.json", out / "golden"), GOLDEN / "a1_base_bin"
    )
    # 1 means that the bundle does not pass, which is a result.
    verified = json.loads(finished(python.run("-m", "owl2.runtime", "verify", bundle, "--json"), codes=(0, 1)))
    divergences = [golden["kl"] for golden in verified["goldens"]]
    talks = data / "talks" / "calibration.jsonl"
    evaluated = json.loads(finished(python.run("-m", "owl2.runtime", "eval", bundle, "--data", talks, "--json")))
    return Result(
        cpu=cpu,
        onnxruntime=recording.onnxruntime,
        decoder=decoder,
        difference=compare(reference or recording, recording),
        verified=verified["passed"],
        verified_kl=None if not divergences or None in divergences else max(divergences),
        nats_per_token=evaluated["tasks"]["conversation"]["scores"]["nats_per_token"]["value"],
        golden=largest,
        golden_answers=equal,
    )


def finished(done: subprocess.CompletedProcess[str], codes: Sequence[int] = (0,)) -> str:
    """Output of a program; exits with its last messages if it failed."""
    if done.returncode not in codes or (not done.stdout and done.returncode):
        sys.exit(f"{' '.join(done.args[-6:])} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return done.stdout


def table(results: Sequence[Result]) -> str:
    """Plain text: a line per machine, then failed checks and different answers."""
    titles = (
        "processor,onnxruntime,decoder,verify,KL text,KL steps,KL image,largest KL,logit,same best,answers,nats/token,"
        "golden"
    )
    lines = [tuple(titles.split(",")), *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    for result in results:
        machine = f"{result.cpu}, onnxruntime {result.onnxruntime}, decoder in {result.decoder}"
        text += [f"FAIL: {machine}: {problem}" for problem in result.problems]
        if result.difference.other_answers:
            text.append(f"{machine}: other greedy answers: {', '.join(result.difference.other_answers)}")
    return "\n".join(text)


def _row(result: Result) -> tuple[str, ...]:
    difference = result.difference
    verified = "-" if result.verified_kl is None else f"{result.verified_kl:.1e}"
    return (
        result.cpu,
        result.onnxruntime,
        result.decoder,
        f"{verified} {'pass' if result.verified else 'FAIL'}",
        *(f"{kl:.1e}" for kl in (difference.kl_text, difference.kl_steps, difference.kl_image, difference.largest_kl)),
        f"{difference.largest:.1e}",
        f"{difference.same_best:.1%}",
        f"{difference.answers - len(difference.other_answers)}/{difference.answers}",
        f"{result.nats_per_token:.4f}",
        f"{result.golden:.1e} {'ids equal' if result.golden_answers else 'ids DIFFER'}",
    )


def main() -> int:
    """Command line; 1 if a machine fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for everything that is downloaded")
    parser.add_argument("bundle", type=Path, help="of the sample checkpoint, for instance from make demo")
    parser.add_argument("--mirror", metavar="URL", help="mirror of Debian; that of this machine's apt if not given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    check_tools()
    scratch = arguments.scratch.resolve()
    data = prepare(scratch)
    results: list[Result] = []
    reference: Recording | None = None
    machines = interpreters(scratch, arguments.mirror or debian_mirror())
    for number, ((cpu, _, decoder), python) in enumerate(machines.items()):
        out = scratch / "recordings" / str(number)
        results.append(measure(cpu, decoder, python, (arguments.bundle.resolve(), data, out), reference))
        print(f"{cpu}, onnxruntime {results[-1].onnxruntime}, decoder in {decoder}: done", file=sys.stderr, flush=True)
        reference = reference or read_recording(out / "bundle")
    if arguments.json:
        print(json.dumps([asdict(entry) | {"problems": entry.problems} for entry in results], indent=2))
    else:
        print(table(results))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
