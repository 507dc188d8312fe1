"""``owl2 info``: the content of a bundle, and whether it is intact."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from owl2.runtime import spec
from owl2.runtime.backends.native.support import native_kernels, reason_against
from owl2.runtime.backends.ort.installation import check_onnxruntime, is_older, onnxruntime_version
from owl2.runtime.backends.tensorrt.records import EngineRecord, check_all
from owl2.runtime.bundle import Manifest, check_files, read_manifest
from owl2.runtime.cli.console import load_progress, notice, reports_errors, say, say_json, size
from owl2.runtime.cli.options import bundle_argument, verify_option
from owl2.runtime.cli.table import section, table
from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.foreign import cut, read_json
from owl2.runtime.harmless import harmless

Row = tuple[str, str]


@dataclass(frozen=True)
class Inspection:
    """The files of a bundle that describe it, and its problems.

    Attributes:
        figures: numbers and texts of some entries of its ``report.json``; empty where they cannot be read.
        goldens: result of the exporting machine on each golden prompt, and the limit for a device.
        engines: records of the TensorRT engines, by the name of their folder.
        onnxruntime: version of the installed one; None if none can be imported.
    """

    manifest: Manifest
    figures: dict[str, dict[str, Any]]
    goldens: list[dict[str, Any]]
    engines: dict[str, EngineRecord]
    onnxruntime: str | None
    problems: list[str]

    @property
    def obstacle(self) -> str | None:
        """Why the native core cannot run the bundle here; None if it can."""
        return reason_against(self.manifest)


@click.command()
@bundle_argument
@verify_option
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@reports_errors
def info(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show the content of a bundle, and verify its files.

    The exit code is 1 if a file is missing or damaged, or if ONNX Runtime is too old or, for a bundle without engines,
    not installed.

    \b
    Examples:
      owl2 info bundle/
      owl2 info bundle/ --verify
      owl2 info bundle/ --json
    """
    found = _inspect(bundle, verify)
    count = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
    if as_json:
        say_json(_record(found))
    else:
        verified = f"all {len(found.manifest.files)} files verified"
        verdict = section(f"{count}:", "\n".join(map(harmless, found.problems))) if found.problems else verified
        say("\n\n".join([*_sections(bundle, found), verdict]))
    if found.problems:
        notice(f"error: {bundle}: {count} found")
        sys.exit(1)


def _inspect(folder: Path, force: bool) -> Inspection:
    manifest = read_manifest(folder)
    with load_progress() as progress:
        problems = check_files(folder, manifest, force=force, on_progress=progress)
    installed = None
    try:
        installed = onnxruntime_version()
        check_onnxruntime(manifest.minimum_onnxruntime)
    except BackendUnavailableError as error:
        if installed is not None or not manifest.engines:  # engines run without it
            problems.append(str(error))
    try:
        report = read_json(folder / spec.REPORT)
    except (OSError, ValueError):
        report = {}  # the hashes report the damage
    engines, engine_problems = check_all(folder, manifest)
    report = report if isinstance(report, dict) else {}
    figures = {name: _plain(report.get(name)) for name in ("accuracy", "kv_int8", "calibration")}
    entries = report.get("goldens")
    goldens = [_plain(entry) for entry in entries] if isinstance(entries, list) else []
    return Inspection(manifest, figures, goldens, engines, installed, problems + engine_problems)


def _plain(entry: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    items = entry.items() if isinstance(entry, dict) else ()
    plain = [(cut(harmless(name)), value) for name, value in items if isinstance(value, str | int | float)]
    return {name: cut(harmless(value)) if isinstance(value, str) else value for name, value in plain}


def _kv_caches(found: Inspection) -> dict[str, dict[str, Any]]:
    manifest, installed = found.manifest, found.onnxruntime
    return {
        kv_type: {
            "bytes_per_position": (per_position := manifest.kv_bytes(kv_type)),
            "bytes_full_context": per_position * manifest.model.decoder.max_position_embeddings,
            "minimum_onnxruntime": manifest.kv_cache[kv_type],
            "usable": installed is not None and not is_older(installed, manifest.kv_cache[kv_type]),
        }
        for kv_type in spec.DECODER_GRAPHS
        if kv_type in manifest.kv_cache
    }


def _record(found: Inspection) -> dict[str, Any]:
    manifest, caches = found.manifest, _kv_caches(found)
    default = caches[manifest.activations]
    return {
        "usable": not found.problems,
        "problems": found.problems,
        "size": manifest.size,
        "context": manifest.model.decoder.max_position_embeddings,
        "positions_per_image": manifest.model.rows_per_image,
        "kv_bytes_per_position": default["bytes_per_position"],
        "kv_bytes_full_context": default["bytes_full_context"],
        "kv_cache": caches,
        "kv_int8": found.figures["kv_int8"],
        "onnxruntime": found.onnxruntime,
        "native": {"usable": found.obstacle is None, "obstacle": found.obstacle, "kernels": native_kernels()},
        "accuracy": found.figures["accuracy"],
        "calibration": found.figures["calibration"],
        "goldens": found.goldens,
        "engines": {name: record.to_json() for name, record in found.engines.items()},
        "digest": manifest.digest,
        "manifest": manifest.to_json(),
    }


def _sections(folder: Path, found: Inspection) -> list[str]:
    manifest = found.manifest
    needs = f"{manifest.minimum_onnxruntime} or newer needed, {found.onnxruntime or 'none'} installed"
    head = [
        ("bundle", str(folder)),
        ("format", f"version {manifest.format}, written by {harmless(manifest.producer)}"),
        ("graphs", f"{manifest.dialect} operators"),
        ("onnxruntime", needs),
        ("on the CPU", _native(found)),
        ("family", manifest.family),
        ("scores", f"images, with the preset {harmless(manifest.preset)}" if manifest.preset else "not known to"),
    ]
    weights = manifest.weights
    grouped = f", groups of {weights.group_size}" if weights.group_size else ""
    method = f" ({weights.method}{grouped})" if weights.method != "none" else ""
    losses = {name: value for name, value in found.figures["kv_int8"].items() if not name.startswith("bytes_")}
    files = [(name, size(entry.size)) for name, entry in manifest.files.items()]
    sections = {
        "model": _model(manifest),
        "weights": [
            ("decoder", weights.decoder + method),
            ("head", weights.head),
            ("vision", weights.vision),
            ("embeddings", weights.embeddings),
        ],
        "K/V cache": _kv_rows(found),
        "accuracy": _figures(found.figures["accuracy"]),
        "int8 K/V cache against fp32": _figures(losses),
        "calibration": _figures(found.figures["calibration"]),
        "golden prompts": [(str(golden.get("name")), _golden(golden)) for golden in found.goldens],
        "TensorRT engines": [(name, _engine(record)) for name, record in found.engines.items()],
        "files": [*files, ("total", size(manifest.size))],
    }
    return [table(head), *(section(title, table(rows)) for title, rows in sections.items() if rows)]


def _native(found: Inspection) -> str:
    """What runs the bundle on the CPU."""
    kernels = native_kernels()
    if found.obstacle is not None:
        return f"ONNX Runtime: {found.obstacle}"
    return f"the native core, with kernels for {kernels}"


def _model(manifest: Manifest) -> list[Row]:
    model = manifest.model
    decoder, vision, queries, images = model.decoder, model.vision, model.abstractor, model.preprocess
    scaling = decoder.rope_scaling
    stretch = f", {scaling.type} rope scaling by {scaling.factor:g}" if scaling else ""
    return [
        (
            "decoder",
            f"{decoder.num_hidden_layers} layers, width {decoder.hidden_size}, {decoder.num_attention_heads} heads, "
            f"feed-forward {decoder.intermediate_size}, vocabulary {decoder.vocab_size}",
        ),
        (
            "vision",
            f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, {vision.num_attention_heads} heads, "
            f"patches of {vision.patch_size} pixels",
        ),
        (
            "abstractor",
            f"{queries.num_hidden_layers} layers, width {queries.hidden_size}, {queries.num_learnable_queries} queries",
        ),
        (
            "images",
            f"{images.crop_size} x {images.crop_size} pixels, mode {images.mode}, "
            f"{model.rows_per_image} positions each",
        ),
        ("context", f"{decoder.max_position_embeddings} positions{stretch}"),
    ]


def _kv_rows(found: Inspection) -> list[Row]:
    rows = []
    for kv_type, entry in _kv_caches(found).items():
        text = f"{size(entry['bytes_per_position'])} per position, {size(entry['bytes_full_context'])} at full context"
        if kv_type == "int8":
            text += f" (float16 would take {size(found.manifest.kv_bytes('fp16'))} per position)"
        if found.onnxruntime is not None and not entry["usable"]:
            text += f"; needs onnxruntime {entry['minimum_onnxruntime']} or newer"
        rows.append((kv_type, text))
    return rows


def _figures(entry: dict[str, Any]) -> list[Row]:
    return [(name, _figure(value)) for name, value in entry.items() if value != ""]


def _golden(golden: dict[str, Any]) -> str:
    """Result of the exporting machine; ``owl2 verify`` measures that of this one."""
    kl, limit = (_figure(golden.get(name, "?")) for name in ("kl", "limit"))
    return f"KL {kl} nats where it was exported, at most {limit} on a device"


def _engine(record: EngineRecord) -> str:
    total = size(sum(entry.size for entry in record.files.values()))
    built = f"built on {record.gpu}" if record.gpu else "built without a GPU"
    return f"{total}, TensorRT {record.tensorrt}, {built}; {record.context} positions, {record.prefill} in a step"


def _figure(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
