"""``owl2 info``: what is in a bundle, and whether it is whole."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from owl2.runtime import spec
from owl2.runtime.backends.ort.installation import check_onnxruntime, is_older, onnxruntime_version
from owl2.runtime.backends.tensorrt.records import EngineRecord, check_all
from owl2.runtime.bundle import Manifest, WeightFormat, check_files, read_manifest
from owl2.runtime.cli.console import notice, reports_errors, size
from owl2.runtime.cli.options import bundle_argument
from owl2.runtime.config import DecoderConfig
from owl2.runtime.errors import BackendUnavailableError

Row = tuple[str, str]


@dataclass(frozen=True)
class Findings:
    """What a bundle says of itself and what is wrong with it.

    Attributes:
        manifest: its ``owl2.json``.
        accuracy, calibration: named figures of its report; empty if it has none.
        kv_int8: the same of the int8 K/V cache, which it compares with the float32 one.
        goldens: what the exporting machine reached on each golden prompt, and the limit for a device.
        engines: what is recorded of the TensorRT engines, by the name of their folder.
        onnxruntime: version of the installed one; None if there is none that can be imported.
        problems: a sentence each; empty if the bundle can be used.
    """

    manifest: Manifest
    accuracy: dict[str, Any]
    calibration: dict[str, Any]
    kv_int8: dict[str, Any]
    goldens: list[dict[str, Any]]
    engines: dict[str, EngineRecord]
    onnxruntime: str | None
    problems: list[str]


@click.command()
@bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@reports_errors
def info(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle and check every file's hash.

    The exit code is 1 if a file is missing or damaged, or if ONNX Runtime is too old or, for a bundle without engines,
    not installed.

    \b
    Examples:
      owl2 info bundle/
      owl2 info bundle/ --json
    """
    findings = _inspect(bundle)
    click.echo(json.dumps(_record(findings), indent=2) if as_json else _table(bundle, findings))
    if findings.problems:
        notice(f"error: {bundle}: {_problem_count(findings)} found")
        sys.exit(1)


def _inspect(folder: Path) -> Findings:
    """Read and check a bundle.

    Raises:
        BundleError: there is no manifest that can be read.
    """
    manifest = read_manifest(folder)
    problems = check_files(folder, manifest)
    installed = _installed(manifest, problems)
    report = _report(folder / spec.REPORT)
    accuracy, calibration, kv_int8 = (_plain(report.get(part)) for part in ("accuracy", "calibration", "kv_int8"))
    entries = report.get("goldens")
    goldens = [_plain(entry) for entry in entries] if isinstance(entries, list) else []
    engines = _engines(folder, manifest, problems)
    return Findings(manifest, accuracy, calibration, kv_int8, goldens, engines, installed, problems)


def _installed(manifest: Manifest, problems: list[str]) -> str | None:
    """The installed ONNX Runtime; adds to ``problems`` if the bundle cannot run without another."""
    try:
        version = onnxruntime_version()
    except BackendUnavailableError as error:
        # Engines do without it.
        if not manifest.engines:
            problems.append(str(error))
        return None
    try:
        check_onnxruntime(manifest.minimum_onnxruntime)
    except BackendUnavailableError as error:
        problems.append(str(error))
    return version


def _engines(folder: Path, manifest: Manifest, problems: list[str]) -> dict[str, EngineRecord]:
    """The records of all engines, verified; adds to ``problems`` what is wrong with them."""
    records, found = check_all(folder, manifest)
    problems += found
    return records


def _report(path: Path) -> dict[str, Any]:
    """The report, if there is one: damage is told by the hashes."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _plain(entry: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Numbers and words directly under an entry of the report; nothing if it is no object."""
    items = entry.items() if isinstance(entry, dict) else ()
    return {name: value for name, value in items if isinstance(value, str | int | float)}


def _kv_caches(findings: Findings) -> dict[str, dict[str, Any]]:
    """Memory and needs of every type of K/V cache that the bundle offers, by its name."""
    manifest, installed = findings.manifest, findings.onnxruntime
    decoder = manifest.model.decoder
    return {
        kind: {
            "bytes_per_position": (per_position := manifest.kv_bytes(kind)),
            "bytes_full_context": per_position * decoder.max_position_embeddings,
            "minimum_onnxruntime": manifest.kv_cache[kind],
            "usable": installed is not None and not is_older(installed, manifest.kv_cache[kind]),
        }
        for kind in spec.DECODER_GRAPHS
        if kind in manifest.kv_cache
    }


def _record(findings: Findings) -> dict[str, Any]:
    manifest = findings.manifest
    decoder = manifest.model.decoder
    caches = _kv_caches(findings)
    default = caches[manifest.activations]
    return {
        "verified": not findings.problems,
        "problems": findings.problems,
        "size": manifest.size,
        "context": decoder.max_position_embeddings,
        "positions_per_image": manifest.model.rows_per_image,
        "kv_bytes_per_position": default["bytes_per_position"],
        "kv_bytes_full_context": default["bytes_full_context"],
        "kv_cache": caches,
        "kv_int8": findings.kv_int8,
        "installed_onnxruntime": findings.onnxruntime,
        "accuracy": findings.accuracy,
        "calibration": findings.calibration,
        "goldens": findings.goldens,
        "engines": {name: record.to_json() for name, record in findings.engines.items()},
        "manifest": manifest.to_json(),
    }


def _table(folder: Path, findings: Findings) -> str:
    manifest = findings.manifest
    files = [(name, size(entry.size)) for name, entry in manifest.files.items()]
    losses = {name: value for name, value in findings.kv_int8.items() if not name.startswith("bytes_")}
    sections = [
        ("", [("bundle", str(folder)), *_origin(findings)]),
        ("model", _model(manifest)),
        ("weights", _weights(manifest.weights)),
        ("K/V cache", _kv_rows(findings)),
        ("accuracy", _figures(findings.accuracy)),
        ("int8 K/V cache against fp32", _figures(losses)),
        ("calibration", _figures(findings.calibration)),
        ("certificate", [(str(golden.get("name")), _golden(golden)) for golden in findings.goldens]),
        ("TensorRT engines", [(name, _engine(record)) for name, record in findings.engines.items()]),
        ("files", [*files, ("total", size(manifest.size))]),
    ]
    blocks = [_section(title, rows) for title, rows in sections if rows]
    return "\n\n".join([*blocks, _verdict(findings)])


def _engine(record: EngineRecord) -> str:
    total = size(sum(entry.size for entry in record.files.values()))
    where = f"built on {record.gpu}" if record.gpu else "built without a GPU"
    return f"{total}, TensorRT {record.tensorrt}, {where}; {record.context} positions, {record.prefill} in a step"


def _verdict(findings: Findings) -> str:
    if not findings.problems:
        return f"all {len(findings.manifest.files)} files verified"
    return "\n".join([f"{_problem_count(findings)}:", *(f"  {problem}" for problem in findings.problems)])


def _problem_count(findings: Findings) -> str:
    count = len(findings.problems)
    return "1 problem" if count == 1 else f"{count} problems"


def _section(title: str, rows: list[Row]) -> str:
    width = max(len(name) for name, _ in rows)
    indent = "  " if title else ""
    lines = [f"{indent}{name:{width}}  {value}" for name, value in rows]
    return "\n".join([title, *lines] if title else lines)


def _origin(findings: Findings) -> list[Row]:
    manifest = findings.manifest
    return [
        ("format", f"version {manifest.format}, written by {manifest.producer}"),
        ("graphs", f"{manifest.dialect} operators"),
        (
            "onnxruntime",
            f"{manifest.minimum_onnxruntime} or newer needed, {findings.onnxruntime or 'none'} installed",
        ),
        ("family", manifest.family),
    ]


def _model(manifest: Manifest) -> list[Row]:
    model = manifest.model
    decoder, vision, queries = model.decoder, model.vision, model.abstractor
    return [
        (
            "decoder",
            f"{decoder.num_hidden_layers} layers, width {decoder.hidden_size}, "
            f"{decoder.num_attention_heads} heads, feed-forward {decoder.intermediate_size}, "
            f"vocabulary {decoder.vocab_size}",
        ),
        (
            "vision",
            f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, "
            f"{vision.num_attention_heads} heads, patches of {vision.patch_size} pixels",
        ),
        (
            "abstractor",
            f"{queries.num_hidden_layers} layers, width {queries.hidden_size}, {queries.num_learnable_queries} queries",
        ),
        (
            "images",
            f"{model.preprocess.crop_size} x {model.preprocess.crop_size} pixels, mode "
            f"{model.preprocess.mode}, {model.rows_per_image} positions each",
        ),
        ("context", f"{decoder.max_position_embeddings} positions{_stretch(decoder)}"),
    ]


def _kv_rows(findings: Findings) -> list[Row]:
    manifest = findings.manifest
    fp16 = size(manifest.kv_bytes("fp16"))
    rows = []
    for kind, entry in _kv_caches(findings).items():
        text = f"{size(entry['bytes_per_position'])} per position, {size(entry['bytes_full_context'])} at full context"
        if kind == "int8":
            text += f" (float16 would take {fp16} per position)"
        if findings.onnxruntime is not None and not entry["usable"]:
            text += f"; needs onnxruntime {entry['minimum_onnxruntime']} or newer"
        rows.append((kind, text))
    return rows


def _stretch(decoder: DecoderConfig) -> str:
    scaling = decoder.rope_scaling
    return f", {scaling.type} rope scaling by {scaling.factor:g}" if scaling else ""


def _weights(weights: WeightFormat) -> list[Row]:
    grouped = f", groups of {weights.group_size}" if weights.group_size else ""
    method = f" ({weights.method}{grouped})" if weights.method != "none" else ""
    return [
        ("decoder", weights.decoder + method),
        ("head", weights.head),
        ("vision", weights.vision),
        ("embeddings", weights.embeddings),
    ]


def _figures(entry: dict[str, Any]) -> list[Row]:
    return [(name, _figure(value)) for name, value in entry.items() if value != ""]


def _golden(golden: dict[str, Any]) -> str:
    """What the exporting machine reached; ``owl2 verify`` measures this one."""
    reached, most = (_figure(golden.get(name, "?")) for name in ("kl", "limit"))
    return f"KL {reached} nats where it was exported, at most {most} on a device"


def _figure(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
