"""A report as a few lines on the terminal."""

from __future__ import annotations

from pathlib import Path

from owl2.export.checkpoint.source import GPTQ_CHECKPOINT
from owl2.export.report import Report
from owl2.runtime.cli.console import duration, size

LISTED_PARTS = 3


def summary(bundle: Path, report: Report) -> str:
    """Size, cost and accuracy of an export."""
    accuracy, calibration, recipe = report.accuracy, report.calibration, report.recipe
    layer = duration(sum(report.layer_seconds) / max(1, len(report.layer_seconds)))
    rounded = "int8" if recipe["dialect"] == "ort" and recipe["weights"] in ("int4", "int8") else recipe["activations"]
    peak, own = size(report.peak_memory), report.peak_own_memory
    memory = f"  memory: at most {peak}, files mapped from the checkpoint included"
    if own is not None:
        memory = (
            f"  memory: at most {size(own)}; {peak} with pages of the checkpoint's files, which the system drops where "
            "memory is short"
        )
    lines = [
        f"{bundle}: {size(report.size)} in {duration(report.seconds)}, {layer} a decoder layer",
        memory,
        *(
            f"  {p.graph}: equals torch within {p.exact:.1e} of the RMS; stored weights change it by {p.weights:.2%}, "
            f"{rounded} activations by {p.activations:.2%}"
            for p in report.parity
        ),
    ]
    source = recipe["source"]
    if source["kind"] == GPTQ_CHECKPOINT:
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
    kept = [part for part in report.vision if part.kept]
    if kept:
        parts = ", ".join(f"{part.part} ({part.effect:.2%})" for part in kept[:LISTED_PARTS])
        more = f" and {len(kept) - LISTED_PARTS} more" if len(kept) > LISTED_PARTS else ""
        lines.append(f"  vision parts kept in fp16, with what int8 would change: {parts}{more}")
    if report.goldens:  # a bundle; a GPTQ checkpoint runs elsewhere
        worst = max(golden.kl for golden in report.goldens)
        lines += [
            _kv_int8(report),
            f"  golden prompts: {len(report.goldens)}, KL of at most {worst:.1e} nats on this machine; "
            "owl2 verify replays them on a device",
        ]
    return "\n".join(lines)


def _kv_int8(report: Report) -> str:
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
