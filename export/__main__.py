"""Command ``owl2-export``: an official checkpoint becomes a bundle."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from owl2.export.config import ExportConfig, Layout, VisionType, WeightType
from owl2.export.tensorrt.cli import Request, build, engine, gpu_option, summary
from owl2.quant.config import GROUP_SIZES, Method
from owl2.runtime.cli.console import duration, notice, reports_errors, size
from owl2.runtime.config import require
from owl2.runtime.placement import EngineKind
from owl2.runtime.spec import DialectName, FloatType
from owl2.runtime.version import __version__

if TYPE_CHECKING:
    from owl2.export.job.progress import Reporter
    from owl2.export.report import Report
    from owl2.export.tensorrt.folder import EngineReport

DEFAULTS = {
    name: ExportConfig.__dataclass_fields__[name].default
    for name in ("weights", "method", "group_size", "samples", "device")
}

LISTED_PARTS = 3


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="owl2-export")
@click.argument("checkpoint")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    type=click.Choice(get_args(WeightType)),
    show_default=f"{DEFAULTS['weights']}, or as in a quantized CHECKPOINT",
    help="How the decoder's weights are stored.",
)
@click.option(
    "--vision",
    type=click.Choice(get_args(VisionType)),
    help="How the vision side's weights are stored; int8 beside integer weights if not given.",
)
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    default=DEFAULTS["method"],
    show_default=True,
    help="How integer weights are found: gptq needs calibration data, rtn rounds to nearest.",
)
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    callback=lambda _context, _option, value: value and int(value),
    show_default=f"{DEFAULTS['group_size']}, or as in a quantized CHECKPOINT",
    help="Columns that share a scale.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="A folder of images (each optionally with a .txt beside it), or a JSONL file of conversations in "
    "the fine-tuning format of mPLUG-Owl2; a small built-in set if not given.",
)
@click.option(
    "--samples", type=int, default=DEFAULTS["samples"], show_default=True, help="Most calibration samples used."
)
@click.option(
    "--layout",
    type=click.Choice(get_args(Layout)),
    default="bundle",
    show_default=True,
    help="What is written: a bundle for the command owl2, or a quantized checkpoint (qweight, qzeros, scales, g_idx) "
    "for GPTQModel, AutoGPTQ and Optimum.",
)
@click.option(
    "--dialect",
    type=click.Choice(get_args(DialectName)),
    show_default="ort, or onnx with --engine or --gpu",
    help="Operators of the graphs: ort for ONNX Runtime, onnx (the standard's own) for TensorRT.",
)
@click.option(
    "--activations",
    type=click.Choice(get_args(FloatType)),
    help="Type in which the graphs compute, K/V cache included: fp32 for CPUs, fp16 for GPUs; fp32 in the dialect ort "
    "and fp16 in the dialect onnx if not given.",
)
@click.option(
    "--device",
    default=DEFAULTS["device"],
    show_default=True,
    metavar="cpu|cuda|cuda:N",
    help="Where decoder layers are computed and quantized.",
)
@click.option(
    "--engine",
    "kind",
    type=click.Choice(get_args(EngineKind)),
    help="Build TensorRT engines too (and export with --dialect onnx): tensorrt-rtx for GeForce and RTX cards, on any "
    "machine; tensorrt for the GPU of this machine.",
)
@gpu_option
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("--fresh", is_flag=True, help="Start over where an interrupted export could be continued.")
@click.option("--download", is_flag=True, help="CHECKPOINT is a hub id: download it first.")
@click.option("--json", "as_json", is_flag=True, help="Write the report as JSON; no progress is shown.")
@reports_errors
def export(  # noqa: PLR0913 - one parameter per option
    *,
    checkpoint: str,
    bundle: Path,
    weights: WeightType | None,
    vision: VisionType | None,
    method: Method,
    group_size: int | None,
    calibration: Path | None,
    samples: int,
    layout: Layout,
    dialect: DialectName | None,
    activations: FloatType | None,
    device: str,
    kind: EngineKind | None,
    gpu: str | None,
    overwrite: bool,
    fresh: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Convert an official mPLUG-Owl2 checkpoint to a bundle that the command owl2 runs.

    CHECKPOINT is a folder in the official layout (config.json, weights as .bin or .safetensors, tokenizer.model);
    Q-Align, OneAlign and DeQA have the same. BUNDLE is the folder to write; it appears when everything is
    complete and checked. An export that was stopped, even by a power failure, goes on at the last finished decoder
    layer when the same command is given again.

    A checkpoint that GPTQModel or AutoGPTQ has quantized keeps its integers and scales exactly; layers that it
    left in floating point are quantized here. With --layout gptq, such a checkpoint is what is written;
    that starts over after an interruption.

    A second command, owl2-export engine BUNDLE, builds TensorRT engines for a bundle that is there.

    \b
    Examples:
      owl2-export mplug-owl2-llama2-7b/ owl2-int4/
      owl2-export one-align/ one-align-int4/ --calibration photos/
      owl2-export checkpoint/ bundle/ --calibration talks.jsonl --weights int8
      owl2-export checkpoint/ exact/ --weights fp32
      owl2-export checkpoint/ checkpoint-gptq/ --layout gptq
      owl2-export checkpoint-gptq/ bundle/
      owl2-export checkpoint/ bundle/ --device cuda
      owl2-export checkpoint/ bundle-cuda/ --activations fp16
      owl2-export checkpoint/ bundle-tensorrt/ --dialect onnx            # then, on a Jetson: owl2-export engine
      owl2-export checkpoint/ bundle-rtx/ --engine tensorrt-rtx --gpu rtx3060
      owl2-export MAGAer13/mplug-owl2-llama2-7b owl2-int4/ --download
    """
    # Not before: these need what only the extra brings, and take a while to import.
    from owl2.export.checkpoint.hub import local_checkpoint
    from owl2.export.checkpoint.source import default_settings
    from owl2.export.gptq_checkpoint import export_gptq
    from owl2.export.job.progress import Notes, Terminal
    from owl2.export.job.staging import Staging
    from owl2.export.pipeline import export_bundle

    require(not (kind or gpu) or layout == "bundle", "engines are built from a bundle; leave --layout gptq out")
    require(not (kind or gpu) or dialect != "ort", "engines are built from graphs of --dialect onnx, not of ort")
    Staging(bundle, overwrite=overwrite)  # before anything long begins
    with ExitStack() as stack:
        reporter: Reporter = Notes() if as_json else stack.enter_context(Terminal())
        folder = local_checkpoint(checkpoint, download=download)
        usual_weights, usual_group_size = default_settings(folder)
        config = ExportConfig(
            checkpoint=folder,
            bundle=bundle,
            weights=weights or usual_weights,
            vision=vision,
            method=method,
            group_size=group_size or usual_group_size,
            calibration=calibration,
            samples=samples,
            device=device,
            overwrite=overwrite,
            layout=layout,
            dialect=dialect or ("onnx" if kind or gpu else "ort"),
            activations=activations,
            fresh=fresh,
        )
        request = Request(kind, gpu) if kind or gpu else None
        if request is not None:
            request.target(config.dialect, config.weights)  # before anything long begins, too
        report = export_gptq(config, reporter) if layout == "gptq" else export_bundle(config, reporter)
        if not as_json:
            click.echo(_summary(bundle, report))
        engines = None if request is None else _engines(bundle, request, reporter)
    if as_json:
        built = {} if engines is None else {"engines": engines.to_json()}
        click.echo(json.dumps({"bundle": str(bundle), **report.to_json(), **built}, indent=2))
        return
    if engines is not None:
        click.echo(summary(engines))
    for note in report.calibration.notes:
        notice(f"note: {note}")


def _engines(bundle: Path, request: Request, reporter: Reporter) -> EngineReport:
    """Build engines for a bundle that is just finished; whatever happens to them, it stays."""
    from owl2.runtime.bundle import Bundle

    try:
        return build(Bundle.open(bundle), request, reporter)
    except BaseException:
        options = "".join(
            f" {option} {value}" for option, value in (("--kind", request.kind), ("--gpu", request.gpu)) if value
        )
        reporter.note(f"{bundle} is complete; only its engines are missing: owl2-export engine {bundle}{options}")
        raise


def _summary(bundle: Path, report: Report) -> str:
    """What was written and how good it is."""
    accuracy, calibration = report.accuracy, report.calibration
    lines = [
        f"{bundle}: {size(report.size)} in {duration(report.seconds)}, {_mean(report.layer_seconds)} a decoder layer",
        _memory(report),
        *(
            f"  {p.graph}: equals torch within {p.exact:.1e} of the RMS; stored weights change it by {p.weights:.2%}, "
            f"{_activations(report)} activations by {p.activations:.2%}"
            for p in report.parity
        ),
    ]
    source = report.recipe["source"]
    if source["kind"] == "gptq checkpoint":
        here = f", {len(source['quantized_here'])} quantized here" if source["quantized_here"] else ""
        by = source["quantizer"] or "an unnamed program"
        lines.append(f"  source: GPTQ checkpoint by {by}, {source['kept']} linear layers kept{here}")
    if calibration.samples:
        lines.append(
            f"  calibration: {calibration.source}, {calibration.samples} samples with {calibration.images} images, "
            f"{calibration.text_rows} text and {calibration.image_rows} image rows"
        )
    if report.modules:
        error = sum(module.error for module in report.modules.values()) / len(report.modules)
        rounding = sum(module.rtn_error for module in report.modules.values()) / len(report.modules)
        lines.append(f"  GPTQ: mean output error of a layer {error:.2e}, rounding would leave {rounding:.2e}")
    lines.append(
        f"  against the checkpoint ({accuracy.measured_on}): KL {accuracy.kl_text:.2e} nats at text positions, "
        f"same best token {accuracy.top1_agreement_text:.1%}, mean logit difference "
        f"{accuracy.mean_abs_logit_difference:.3f}"
    )
    if not report.goldens:  # a GPTQ checkpoint, which runs elsewhere
        return "\n".join(lines)
    kept = [part for part in report.vision if part.kept]
    if kept:
        parts = ", ".join(f"{part.part} ({part.effect:.2%})" for part in kept[:LISTED_PARTS])
        more = f" and {len(kept) - LISTED_PARTS} more" if len(kept) > LISTED_PARTS else ""
        lines.append(f"  vision parts kept in fp16, with what int8 would change: {parts}{more}")
    worst = max(golden.kl for golden in report.goldens)
    return "\n".join(
        [
            *lines,
            _kv_line(report),
            f"  certificate: {len(report.goldens)} golden prompts, KL of at most {worst:.1e} nats on this machine; "
            "owl2 verify replays them on a device",
        ]
    )


def _activations(report: Report) -> str:
    """What the graphs round activations to while they run."""
    integer = report.recipe["dialect"] == "ort" and report.recipe["weights"] in ("int4", "int8")
    return "int8" if integer else str(report.recipe["activations"])


def _mean(seconds: Sequence[float]) -> str:
    return duration(sum(seconds) / max(1, len(seconds)))


def _memory(report: Report) -> str:
    most = size(report.peak_memory)
    if report.peak_own_memory is None:
        return f"  memory: at most {most}, files mapped from the checkpoint included"
    return (
        f"  memory: at most {size(report.peak_own_memory)}; {most} with pages of the checkpoint's files, which the "
        "system drops where memory is short"
    )


def _kv_line(report: Report) -> str:
    loss = report.kv_int8
    if loss is None and (report.recipe["dialect"], report.recipe["activations"]) != ("ort", "fp32"):
        return "  int8 K/V cache: none, it goes with --dialect ort --activations fp32"
    if loss is None:
        return "  int8 K/V cache: left out, since the installed onnxruntime is too old to check it"
    return (
        f"  int8 K/V cache: {size(loss.bytes_per_position)} per position instead of "
        f"{size(loss.bytes_per_position_fp32)} ({size(loss.bytes_per_position_fp16)} in float16); against fp32 "
        f"K/V: KL {loss.kl_text:.2e} nats at text positions, same best token {loss.agreement:.1%}"
    )


def main(arguments: Sequence[str] | None = None, name: str = "owl2-export") -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 wrong usage, 130 stopped by Ctrl-C.

    Args:
        arguments: those of the process if not given.
        name: of the command, for its messages.
    """
    # A polite kill cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = list(sys.argv[1:] if arguments is None else arguments)
    extra = "cpu,export"
    try:
        if given[:1] == ["engine"]:
            extra = "tensorrt' or 'owl2[tensorrt-rtx"
            engine(args=given[1:], prog_name=f"{name} engine")
        export(args=given, prog_name=name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("owl2"):
            raise
        sys.exit(f"{name}: error: {error.name} is not installed; this needs: pip install 'owl2[{extra}]'")


if __name__ == "__main__":
    main()
