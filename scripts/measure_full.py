"""Time, memory and size of exporting a model of full size (mPLUG-Owl2 7B, random weights).

With ``--method rtn`` the whole model is exported. With GPTQ, which takes hours on a CPU, only the first layers are: the
export is killed (SIGKILL) after the layer given by ``--kill``, started again, has to continue there, and is killed
again one layer later unless ``--finish`` is given; the time of the rest is extrapolated, and estimated for GPUs.

    measure_full.py /scratch --method rtn
    measure_full.py /scratch --kill 2
    measure_full.py /scratch --kill 2 --finish

The checkpoint (16 GB with 32 layers) stays in the scratch folder for the next run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure_layers import TOKENIZER, anonymous_memory
from random_checkpoint import write_checkpoint

from owl2.quant.calibration.samples import probe_samples
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import MAX_SAMPLED_ROWS

POLL_SECONDS = 0.05
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a device: float32 outside tensor cores (FLOP/s), memory (bytes/s)."""

    name: str
    flops: float
    bandwidth: float


# From NVIDIA's data sheets of A100 (80 GB, PCIe) and H100 (SXM) and its Ada architecture paper (RTX 4090).
GPUS = (
    Gpu("A100", 19.5e12, 1.935e12),
    Gpu("RTX 4090", 82.6e12, 1.008e12),
    Gpu("H100", 67e12, 3.35e12),
)
# Assumptions of the estimate.
EFFICIENCY = 0.5  # of the peak in matrix products and Cholesky decompositions of these sizes
LAUNCH_SECONDS = 6e-6  # of one small kernel, one after the other
LAUNCHES = 24  # per column, of GPTQ and of two sweeps of descent
PCIE = 12e9  # bytes/s
CLIP_PASSES = 30 * 6 * 2  # steps of the clip search, reads and writes of each, in GPTQ and in the rounding it reports


@dataclass(frozen=True)
class Work:
    """Arithmetic of one decoder layer, FLOP.

    Attributes:
        forward: passes of all rows; quantizing needs the inputs of four sites, after all that is quantized before.
        hessian: summing x x^T at these sites.
        factorize: two Cholesky decompositions per weight.
        update: the target, feedback of rounding errors, coordinate descent, and the errors that are reported.
    """

    forward: float
    hessian: float
    factorize: float
    update: float

    @property
    def total(self) -> float:
        return self.forward + self.hessian + self.factorize + self.update


def weights(width: int, inner: int) -> list[tuple[int, int]]:
    """Shapes N x K of a layer's weights."""
    return [(width, width)] * 6 + [(inner, width)] * 2 + [(width, inner)]


def gptq_work(width: int, inner: int, calibration: int, measured: int) -> Work:
    """Arithmetic of GPTQ in one layer, for these numbers of calibration rows and measured rows.

    Both pass through the quantized and the original layer.
    """
    attention, mlp = 4 * width**2, 3 * width * inner
    # inputs of o; of gate and up; of down; and the pass that moves the stream
    sites = 3 * width**2 + attention + (attention + 2 * width * inner) + (attention + mlp)
    shapes = weights(width, inner)
    # Feedback 1, sweeps 2 each, target 2 and its triangular solves 2; then five output errors of sampled rows.
    per_weight = 1.0 + 2.0 * QuantConfig().sweeps + 4.0
    return Work(
        forward=2.0 * (2 * calibration * sites + 2 * measured * (attention + mlp)),
        hessian=2.0 * 2.0 * calibration * (3 * width**2 + inner**2),
        factorize=sum(2 * k**3 / 3 for _, k in shapes),
        update=sum(per_weight * n * k**2 + 5 * 2.0 * min(n, MAX_SAMPLED_ROWS) * k**2 for n, k in shapes),
    )


def gpu_seconds(work: Work, width: int, inner: int, gpu: Gpu) -> float:
    """Estimated time of one layer on a GPU, without the work that stays on the CPU."""
    parameters = sum(n * k for n, k in weights(width, inner))
    columns = sum(k for _, k in weights(width, inner))
    return (
        work.total / (EFFICIENCY * gpu.flops)
        + columns * LAUNCHES * LAUNCH_SECONDS
        + 4 * parameters * CLIP_PASSES / gpu.bandwidth
        + 5 * parameters / PCIE  # float32 to the GPU, int8 codes back
    )


def checkpoint_of(scratch: Path, layers: int) -> Path:
    """A random checkpoint, from an earlier run or written now."""
    folder = scratch / f"checkpoint-{layers}"
    if not (folder / "pytorch_model.bin.index.json").exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        write_checkpoint(folder, TOKENIZER, layers, seed=0)
        gigabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        seconds = time.perf_counter() - began
        print(f"checkpoint: {gigabytes:.1f} GB in {seconds:.0f} s, {seconds / gigabytes:.1f} s a GB", flush=True)
    return folder


def journal_of(bundle: Path) -> dict[str, Any] | None:
    """Content of the journal of an unfinished export; None without one."""
    try:
        index = json.loads((bundle.parent / f".{bundle.name}.partial" / "journal" / "journal.json").read_text())
    except FileNotFoundError:
        return None
    content: dict[str, Any] = json.loads(index["content"])
    return content


def run(command: list[str], bundle: Path, kill: int | None) -> int:
    """Run an export, killing it after layer ``kill``; returns the peak of its own memory, in bytes."""
    process, peak, changed = subprocess.Popen(command), 0, 0.0
    index = bundle.parent / f".{bundle.name}.partial" / "journal" / "journal.json"
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(POLL_SECONDS)
        if kill is None or not index.exists() or index.stat().st_mtime == changed:
            continue
        changed = index.stat().st_mtime
        decoder = (journal_of(bundle) or {}).get("decoder")
        if decoder is not None and decoder["layers"] >= kill:
            process.kill()
            process.wait()
            print(f"killed after layer {decoder['layers']}", flush=True)
            return peak
    if process.returncode:
        sys.exit(process.returncode)
    return peak


def rows_of(arrays: list[Any], width: int) -> tuple[int, int]:
    """Calibration and measured rows of a journal, which has the rows of both twice, then those of the probes."""
    lengths = [shape[0] for _, shape in arrays if len(shape) == 2 and shape[1] == width]
    probes = len(probe_samples())
    both = lengths[:-probes]
    for measured in range(probes, len(both) // 2 + 1):
        calibration = len(both) // 2 - measured
        first, second = both[: 2 * calibration], both[2 * calibration :]
        halves_equal = first[:calibration] == first[calibration:] and second[:measured] == second[measured:]
        if halves_equal and second[:probes] == lengths[-probes:]:
            return sum(first[:calibration]), sum(second[:measured])
    raise SystemExit("the journal does not have the rows that this script expects")


def print_gptq(journal: dict[str, Any], config: dict[str, Any]) -> None:
    """Print the seconds per layer, extrapolated to the whole model, and the estimate for GPUs."""
    layers, width, inner = (config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    seconds = journal["usage"]["layer_seconds"]
    mean = sum(seconds) / len(seconds)
    calibration, measured = rows_of(journal["decoder"]["rows"]["arrays"], width)
    work = gptq_work(width, inner, calibration, measured)
    print(f"seconds a layer: {', '.join(f'{s:.0f}' for s in seconds)}; {layers} layers: {mean * layers / 60:.0f} min")
    print(
        f"a layer, {calibration} calibration rows and {measured} measured ones: {work.total / 1e12:.1f} TFLOP "
        f"(passes {work.forward / 1e12:.1f}, Hessians {work.hessian / 1e12:.1f}, Cholesky {work.factorize / 1e12:.1f}, "
        f"GPTQ {work.update / 1e12:.1f}), so {work.total / mean / 1e9:.0f} GFLOP/s here"
    )
    for gpu in GPUS:
        estimate = gpu_seconds(work, width, inner, gpu)
        print(
            f"estimated on {gpu.name}: {estimate:.1f} s a layer, {estimate * layers / 60:.1f} min for all, in addition "
            "to the work of the CPU (reading, packing, the journal: about a layer of --method rtn here)"
        )


def print_bundle(bundle: Path) -> None:
    """Print size, time and memory from the report of a finished export."""
    report = json.loads((bundle / "report.json").read_text())
    seconds = report["layer_seconds"]
    print(
        f"bundle: {report['size'] / GIB:.2f} GiB in {report['seconds'] / 60:.1f} min, "
        f"{sum(seconds) / len(seconds):.1f} s a layer; {report['peak_own_memory'] / GIB:.2f} GiB of its own memory, "
        f"{report['peak_memory'] / GIB:.2f} GiB with mapped files"
    )


def main() -> int:
    """Command line; unknown options go to owl2-export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for the checkpoint and the bundle")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default 32)")
    parser.add_argument("--checkpoint", type=Path, help="measure this one instead of random weights")
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--kill", type=int, default=1, help="layer after which GPTQ is killed (default 1)")
    parser.add_argument("--finish", action="store_true", help="let GPTQ finish after it was killed once")
    given, options = parser.parse_known_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = given.checkpoint or checkpoint_of(given.scratch, given.layers)
    bundle = given.scratch / f"bundle-{given.method}"
    options = [*options, "--method", given.method, "--overwrite"]
    command = [sys.executable, "-m", "owl2.export", str(checkpoint), str(bundle), *options]
    kills = [None] if given.method == "rtn" else [given.kill, None if given.finish else given.kill + 1]
    peaks = []
    for number, kill in enumerate(kills):
        before = journal_of(bundle) if number else None
        peaks.append(run([*command, *([] if number else ["--fresh"])], bundle, kill))
        print(f"its own memory, at most: {peaks[-1] / GIB:.2f} GiB", flush=True)
        journal = journal_of(bundle) or before
        if before is not None and journal is not None:
            kept = before["usage"]["layer_seconds"]
            if journal["usage"]["layer_seconds"][: len(kept)] != kept:
                sys.exit("the second run did not continue where the first was killed")
            print_gptq(journal, json.loads((checkpoint / "config.json").read_text()))
    if kills[-1] is None:
        print_bundle(bundle)
    print(f"peak: {max(peaks) / GIB:.2f} GiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
