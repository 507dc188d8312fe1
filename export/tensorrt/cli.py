"""Command ``owl2-export engine``: TensorRT engines for an existing bundle."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from owl2.runtime.cli.console import duration, reports_errors, say, say_json, size
from owl2.runtime.cli.types import PATH, integer
from owl2.runtime.config import resolve_context
from owl2.runtime.engine import PREFILL_BLOCK
from owl2.runtime.fit.footprint import build_bytes
from owl2.runtime.fit.machine import this_cpu
from owl2.runtime.placement import EngineKind

if TYPE_CHECKING:
    from owl2.export.job.progress import Reporter
    from owl2.export.tensorrt.folder import EngineReport
    from owl2.export.tensorrt.target import BuildTarget
    from owl2.runtime.bundle import Bundle


@dataclass(frozen=True)
class Request:
    """The options as given; None for the default."""

    kind: EngineKind | None
    gpu: str | None
    context: int | None = None
    prefill: int | None = None
    images: int = 1
    workspace: int | None = None

    def target(self, dialect: str, weights: str) -> BuildTarget:
        """The module and the GPU, for a bundle of this dialect whose decoder has these weights."""
        from owl2.export.tensorrt.target import choose_target, find_gpu

        device, here = find_gpu(self.gpu)
        # Only one kind can be built elsewhere, and it comes last.
        usual: EngineKind = (device.engines or ("tensorrt",))[0 if here else -1]
        return choose_target(self.kind or usual, device, dialect, weights, here=here)


def _show_gpus(context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """List the GPUs and end if the user asks for that."""
    if value == "list":
        from owl2.export.tensorrt.target import gpu_table

        say(gpu_table())
        context.exit()
    return value


gpu_option = click.option(
    "--gpu",
    metavar="NAME|smNN|this|list",
    is_eager=True,
    callback=_show_gpus,
    help="GPU that engines are for: a name such as rtx3060, a compute capability such as sm86, or this machine's (the "
    "default); list shows all.",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("bundle", type=PATH)
@click.option(
    "--kind",
    type=click.Choice(get_args(EngineKind)),
    help="tensorrt for the GPU of this machine, with the installed TensorRT (Jetson, servers); tensorrt-rtx for "
    "GeForce and RTX cards, built on any machine. If not given, the first that the GPU can run.",
)
@gpu_option
@click.option("--context", type=integer, help="Positions of a conversation; the model's own if not given.")
@click.option(
    "--prefill",
    type=integer,
    show_default=f"{PREFILL_BLOCK}, or the context",
    help="New positions of one step; longer prompts take several.",
)
@click.option("--images", type=integer, default=1, show_default=True, help="Images that the engine encodes at a time.")
@click.option(
    "--workspace",
    type=click.IntRange(1, 1 << 24),
    metavar="MIB",
    help="Limit of TensorRT's scratch memory on the GPU; no limit if not given.",
)
@click.option("--json", "as_json", is_flag=True, help="Write the result as JSON and show no progress.")
@reports_errors
def engine(
    *,
    bundle: Path,
    kind: EngineKind | None,
    gpu: str | None,
    context: int | None,
    prefill: int | None,
    images: int,
    workspace: int | None,
    as_json: bool,
) -> None:
    """Build TensorRT engines from the graphs of BUNDLE, which was exported with --dialect onnx.

    They are written into the bundle (engines/) with TensorRT's version and the GPU they are for; a bundle may have
    engines for several GPUs. A 7B decoder takes minutes, and about four times the engine's size in memory.
    For a Jetson: export on a workstation, copy the bundle, and run this on the Jetson; it needs no torch.

    \b
    Examples:
      owl2-export engine owl2-trt/                                    # for the GPU of this machine
      owl2-export engine owl2-trt/ --kind tensorrt-rtx --gpu rtx4060
      owl2-export engine owl2-trt/ --context 1024 --workspace 1024    # less memory
      owl2-export engine owl2-trt/ --gpu list
    """
    from owl2.export.job.progress import Notes, Terminal
    from owl2.runtime.bundle import Bundle

    with ExitStack() as stack:
        reporter: Reporter = Notes() if as_json else stack.enter_context(Terminal())
        request = Request(kind, gpu, context, prefill, images, workspace)
        report = build(Bundle.open(bundle), request, reporter)
    if as_json:
        say_json(report.to_json())
    else:
        say(summary(report))


def build(bundle: Bundle, request: Request, reporter: Reporter) -> EngineReport:
    """Build the engines that were asked for."""
    from owl2.export.tensorrt.folder import build_engines
    from owl2.export.tensorrt.profiles import Limits

    manifest = bundle.manifest
    target = request.target(manifest.dialect, manifest.weights.decoder)
    context = resolve_context(manifest.model.decoder, request.context)
    prefill = min(PREFILL_BLOCK, context) if request.prefill is None else request.prefill
    limits = Limits(context, prefill, request.images)
    needed, cpu = build_bytes(manifest), this_cpu()
    available = "" if cpu is None else f", {size(cpu.available)} are available"
    short = cpu is not None and needed > cpu.available
    advice = "; that may not be enough: build on another machine, or add swap" if short else ""
    reporter.note(
        f"building the decoder's engine takes about {size(needed)} of this machine's memory{available}{advice}"
    )
    workspace = None if request.workspace is None else request.workspace << 20
    return build_engines(bundle, target, limits, workspace, reporter)


def summary(report: EngineReport) -> str:
    """The result, for people."""
    record = report.record
    capability = ".".join(map(str, record.compute_capability))
    lines = [
        f"{report.folder}: {record.kind} {record.tensorrt} for compute capability {capability}, {record.context} "
        f"positions, {record.prefill} of them in a step"
    ]
    for name, stats in report.built.items():
        parsed, built = duration(stats.parse_seconds), duration(stats.build_seconds)
        lines.append(f"  {name}: {size(stats.size)}, parsed in {parsed}, built in {built}")
    return "\n".join(lines)
