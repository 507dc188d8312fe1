"""Command ``owl2-export convert``: an official checkpoint becomes a bundle."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from owl2.export.config import ExportConfig, Layout, Purpose
from owl2.export.tensorrt.cli import Request, build, gpu_option, summary as engine_summary
from owl2.quant.config import GROUP_SIZES, Method
from owl2.runtime.cli.console import notice, reports_errors, say, say_json
from owl2.runtime.cli.types import PATH, Location, integer
from owl2.runtime.config import require
from owl2.runtime.placement import EngineKind
from owl2.runtime.scoring.scale import PRESETS
from owl2.runtime.spec import DialectName, FloatType, VisionType, WeightType

if TYPE_CHECKING:
    from owl2.export.job.progress import Reporter
    from owl2.export.tensorrt.folder import EngineReport

DEFAULTS = {
    name: ExportConfig.__dataclass_fields__[name].default
    for name in ("weights", "method", "group_size", "samples", "layout", "device", "purpose")
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("checkpoint", type=Location(path_type=str))
@click.argument("bundle", type=PATH)
@click.option(
    "--weights",
    type=click.Choice(get_args(WeightType)),
    show_default=f"{DEFAULTS['weights']}, or as in a quantized CHECKPOINT",
    help="How the decoder's weights are stored.",
)
@click.option(
    "--vision",
    type=click.Choice(get_args(VisionType)),
    show_default="int8 with integer --weights, or fp16 where the graph cannot compute with it; else as --weights",
    help="How the vision side's weights are stored.",
)
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    default=DEFAULTS["method"],
    show_default=True,
    help="How weights are rounded to integers: gptq needs calibration data, rtn rounds to nearest.",
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
    type=PATH,
    show_default="a small built-in set",
    help="A folder of images (each optionally with a .txt of the same name), or a JSONL file of conversations in "
    "the fine-tuning format of mPLUG-Owl2.",
)
@click.option(
    "--samples", type=integer, default=DEFAULTS["samples"], show_default=True, help="Calibration samples used, at most."
)
@click.option(
    "--layout",
    type=click.Choice(get_args(Layout)),
    default=DEFAULTS["layout"],
    show_default=True,
    help="What to write: a bundle for the command owl2, or a quantized checkpoint (qweight, qzeros, scales, g_idx) "
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
    show_default="fp32 in the dialect ort, fp16 in the dialect onnx",
    help="Type in which the graphs compute, K/V cache included: fp32 for CPUs, fp16 for GPUs.",
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
@click.option(
    "--lora",
    type=PATH,
    help="A folder with a LoRA adapter in PEFT's layout that was trained on CHECKPOINT; it is merged into the weights.",
)
@click.option(
    "--for",
    "purpose",
    type=click.Choice(get_args(Purpose)),
    default=DEFAULTS["purpose"],
    show_default=True,
    help="What the model is for. scoring calibrates it on images that are asked as owl2 score asks: int4 weights then "
    "give scores as close to the original's as int8 ones.",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    show_default="what its name tells, as in one-align",
    help="How owl2 score asks the model.",
)
@click.option(
    "--base-preprocessor",
    is_flag=True,
    help="Prepare images as mPLUG-Owl2 itself does, where CHECKPOINT has no preprocessor_config.json.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--fresh", is_flag=True, help="Start over where an interrupted export could be continued.")
@click.option("--download", is_flag=True, help="CHECKPOINT is a hub id: download it first.")
@click.option("--json", "as_json", is_flag=True, help="Write the report as JSON; no progress is shown.")
@reports_errors
def convert(
    *,
    checkpoint: str,
    bundle: Path,
    kind: EngineKind | None,
    gpu: str | None,
    download: bool,
    as_json: bool,
    **settings: Any,  # noqa: ANN401 - fields of ExportConfig, by their names
) -> None:
    """Convert an official mPLUG-Owl2 checkpoint to a bundle that the command owl2 runs.

    CHECKPOINT is a folder in the official layout (config.json, weights as .bin or .safetensors, tokenizer.model);
    Q-Align, OneAlign and DeQA have the same. BUNDLE is the folder to write; it appears when everything is
    complete and checked. After an interruption, even by a power failure, the same command continues at the last
    finished decoder layer.

    A checkpoint that GPTQModel or AutoGPTQ has quantized keeps its integers and scales exactly; layers that it
    left in floating point are quantized here. With --layout gptq such a checkpoint is written, which starts over
    after an interruption.

    \b
    Examples:
      owl2-export mplug-owl2-llama2-7b/ owl2-int4/
      owl2-export one-align/ one-align-int4/ --for scoring --calibration photos/
      owl2-export mplug-owl2-llama2-7b/ ours-int4/ --lora our-adapter/
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
    # Imported here, since they need the extra "export" and take seconds.
    from owl2.export.checkpoint.hub import local_checkpoint
    from owl2.export.checkpoint.source import default_settings
    from owl2.export.cli.summary import summary
    from owl2.export.gptq_checkpoint import export_gptq
    from owl2.export.job.progress import Notes, Terminal
    from owl2.export.job.staging import Staging
    from owl2.export.pipeline import export_bundle

    given = {name: value for name, value in settings.items() if value is not None}
    request = Request(kind, gpu) if kind or gpu else None
    if request is not None:
        require(given["layout"] == "bundle", "engines are built from a bundle; leave --layout gptq out")
        given.setdefault("dialect", "onnx")
        require(given["dialect"] == "onnx", "engines are built from graphs of --dialect onnx, not of ort")
    Staging(bundle, overwrite=given["overwrite"])  # before anything long begins
    with ExitStack() as stack:
        reporter: Reporter = Notes() if as_json else stack.enter_context(Terminal())
        folder = local_checkpoint(checkpoint, download=download)
        config = ExportConfig(folder, bundle, **default_settings(folder) | given)
        if request is not None:
            request.target(config.dialect, config.weights)  # before anything long begins, too
        report = (export_gptq if config.layout == "gptq" else export_bundle)(config, reporter)
        if not as_json:
            say(summary(bundle, report))
        engines = None if request is None else _build_engines(bundle, request, reporter)
    if as_json:
        built = {} if engines is None else {"engines": engines.to_json()}
        say_json({"bundle": str(bundle), **report.to_json(), **built})
        return
    if engines is not None:
        say(engine_summary(engines))
    for note in report.calibration.notes:
        notice(f"note: {note}")


def _build_engines(bundle: Path, request: Request, reporter: Reporter) -> EngineReport:
    """Build engines for a bundle that is just finished, and stays whatever happens to them."""
    from owl2.runtime.bundle import Bundle

    try:
        return build(Bundle.open(bundle), request, reporter)
    except BaseException:
        options = "".join(
            f" {option} {value}" for option, value in (("--kind", request.kind), ("--gpu", request.gpu)) if value
        )
        reporter.note(f"{bundle} is complete; only its engines are missing: owl2-export engine {bundle}{options}")
        raise
