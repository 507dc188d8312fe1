"""Measure this project's runtime against others on the same shapes, interleaved, as ratios of medians.

Every peer that stays loaded runs in a process and an environment of its own; a round measures each thing with one peer
after the other, so that a noisy machine disturbs all of them alike. ik_llama.cpp is measured with its llama-bench, in a
new process each time. What is needed beside a bundle (``owl2 bench --shape 7b`` writes one of random weights):

* llama.cpp: ``CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python gguf`` in an
  environment of its own, and a model of the same shapes: ``random_gguf.py FILE``, run there. gcc 12 miscompiles its AMX
  kernels (``_tile_loadconfig`` says that it reads 8 bytes, and the stores of the others are dropped): every prompt
  ends in a segmentation fault. ``-DCMAKE_CXX_FLAGS="-fno-dse -fno-tree-dse"`` mends it.
* ik_llama.cpp: its source, ``cmake -G Ninja -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON`` and
  ``ninja -C build llama-bench``.

Run ``python benchmarks/peers.py BUNDLE --gguf MODEL --llama-python ENV/bin/python --ik-bench build/bin/llama-bench``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
PREFILLS = (32, 128, 512)
CONTEXTS = (128, 1024, 2047)
Samples = dict[str, dict[str, list[float]]]
"""Seconds by what was measured and by peer."""


@dataclass(frozen=True)
class Worker:
    """A peer that stays loaded; asked and answered in lines of JSON."""

    name: str
    process: subprocess.Popen[str]
    requests: IO[str]
    answers: IO[str]
    loaded: dict[str, float]

    def ask(self, *request: object) -> Any:  # noqa: ANN401 - JSON
        """Its answer."""
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        return json.loads(self.answers.readline())

    def close(self) -> None:
        """End it."""
        self.requests.close()
        self.process.wait()


def start(name: str, command: list[str]) -> Worker:
    """Start a worker and wait until it is loaded."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the worker has no pipes")
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended before it was loaded: {' '.join(command)}")
    return Worker(name, process, process.stdin, process.stdout, json.loads(line))


def ik_seconds(options: argparse.Namespace, *arguments: str) -> float:
    """Seconds of one test of ik_llama.cpp's llama-bench, per token where it generates."""
    command = [options.ik_bench, "-m", options.gguf, "-t", str(options.threads), "-rtr", "1", "-fa", "1"]
    command += ["-o", "json", "-r", "1", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = json.loads(run.stdout[run.stdout.index("[") :])
    return float(result["avg_ns"]) / 1e9 / (result["n_gen"] or 1)


def round_of_loads(commands: dict[str, list[str]], samples: Samples) -> None:
    """Load every peer in a new process."""
    for name, command in commands.items():
        worker = start(name, command)
        for what, seconds in worker.loaded.items():
            samples.setdefault(what, {}).setdefault(name, []).append(seconds)
        worker.close()


def memory_of(name: str, command: list[str]) -> dict[str, int]:
    """Bytes of a new process that holds one full context."""
    worker = start(name, command)
    answer = worker.ask("memory", CONTEXTS[-1])
    worker.close()
    return dict(answer)


def round_of_steps(workers: list[Worker], options: argparse.Namespace, samples: Samples) -> None:
    """Measure everything once with each peer."""

    def add(what: str, name: str, seconds: float) -> None:
        samples.setdefault(what, {}).setdefault(name, []).append(seconds)

    for count in PREFILLS:
        for worker in workers:
            add(f"prefill {count}", worker.name, worker.ask("prefill", count))
        if options.ik_bench and count >= 128:
            add(f"prefill {count}", "ik_llama.cpp", ik_seconds(options, "-p", str(count), "-n", "0"))
    for context in CONTEXTS:
        for worker in workers:
            add(f"decode at {context}", worker.name, worker.ask("decode", context))
        if options.ik_bench and context == 128:
            gp = ("-p", "0", "-n", "0", "-gp", f"{context},16")
            add(f"decode at {context}", "ik_llama.cpp", ik_seconds(options, *gp))
    for worker in workers:
        if worker.name.startswith("owl2"):
            for count in (1, 2, 4, 8, 16):
                add(f"a step of {count} rows", worker.name, worker.ask("rows", count))


def spread(values: list[float]) -> str:
    """Median, and least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(samples: Samples, memories: dict[str, dict[str, int]], reference: str) -> str:
    """A table in Markdown."""
    names = list(dict.fromkeys(name for measured in samples.values() for name in measured))
    lines = ["| seconds | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for what, measured in samples.items():
        cells = []
        for name in names:
            if name not in measured:
                cells.append("")
                continue
            ratio = statistics.median(measured[name]) / statistics.median(measured[reference])
            cells.append(spread(measured[name]) + ("" if name == reference else f", **{ratio:.2f} ×**"))
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for part in ("private", "mapped"):
        sizes = [f"{memories[name][part] / 2**20:.0f} MiB" if name in memories else "" for name in names]
        lines.append(f"| {part} memory, context of {CONTEXTS[-1]} | " + " | ".join(sizes) + " |")
    return "\n".join(lines)


def processor() -> str:
    """Its name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", help="of the shapes of --gguf")
    parser.add_argument("--gguf", help="the model for llama.cpp and ik_llama.cpp")
    parser.add_argument("--llama-python", help="Python of the environment with llama-cpp-python")
    parser.add_argument("--ik-bench", help="llama-bench of ik_llama.cpp")
    parser.add_argument("--onnxruntime", action="store_true", help="also this project's path in ONNX Runtime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every measurement there")
    options = parser.parse_args()
    owl2 = [sys.executable, str(HERE / "worker_owl2.py"), options.bundle]
    commands = {"owl2": [*owl2, "native", str(options.threads)]}
    if options.llama_python:
        worker = str(HERE / "worker_llama.py")
        commands["llama.cpp"] = [options.llama_python, worker, options.gguf, str(options.threads)]
    if options.onnxruntime:
        commands["owl2, ONNX Runtime"] = [*owl2, "onnxruntime", str(options.threads)]
    samples: Samples = {}
    for _ in range(options.rounds):
        round_of_loads(commands, samples)
    workers = [start(name, command) for name, command in commands.items()]
    round_of_steps(workers, options, {})  # does not count
    for number in range(options.rounds):
        round_of_steps(workers, options, samples)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    pictures = [one for one in workers if one.name.startswith("owl2")]
    for number in range(options.rounds + 1):
        for one in pictures:
            for what, seconds in zip(("image and question", "second question"), one.ask("picture")):
                if number:
                    samples.setdefault(what, {}).setdefault(one.name, []).append(seconds)
    for one in workers:
        one.close()
    memories = {name: memory_of(name, command) for name, command in commands.items()}
    if options.json:
        options.json.write_text(json.dumps({"samples": samples, "memory": memories}, indent=2))
    print(f"{processor()}, {options.threads} threads, {options.rounds} rounds; seconds as median (least to most)\n")
    print(report(samples, memories, "owl2"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
