"""``owl2 plan``: whether a bundle fits a device, before anything is loaded or bought."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click

from owl2.runtime.bundle import Manifest, read_manifest
from owl2.runtime.cli.console import notice, reports_errors, size
from owl2.runtime.config import require, resolve_context
from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.fit.footprint import Building, BundleSizes, Ceiling, MemoryBudget, Scenario, Settings
from owl2.runtime.fit.machine import gpus, host_memory, read_bandwidth, this_cpu
from owl2.runtime.fit.plan import Plan, make_plan
from owl2.runtime.fit.products import GIB, PRODUCTS, Product
from owl2.runtime.spec import KvType

THIS, CPU = "this", "cpu"
Row = tuple[str, str, str]

RUNNERS = {
    "onnxruntime-cpu": "ONNX Runtime on the CPU",
    "onnxruntime-cuda": "ONNX Runtime with CUDA",
    "tensorrt": "a TensorRT engine",
    "tensorrt-rtx": "an engine of TensorRT for RTX",
}


@click.command("plan")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--device", default=THIS, show_default=True, help="A name of --list; this: this machine's GPU or else CPU; cpu."
)
@click.option("--context", type=int, help="Positions of a conversation; the model's own limit if not given.")
@click.option(
    "--kv-cache",
    type=click.Choice(get_args(KvType)),
    help="Type of keys and values; that of the bundle's activations if not given.",
)
@click.option("--images", type=int, default=1, show_default=True, help="Images in the conversation.")
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@click.option("--list", "listing", is_flag=True, help="Show the devices that are known, and what is found here.")
@reports_errors
def plan_command(
    bundle: Path | None,
    device: str,
    context: int | None,
    kv_cache: KvType | None,
    images: int,
    *,
    as_json: bool,
    listing: bool,
) -> None:
    """Estimate the memory a bundle takes on a device, whether it fits, and the most tokens a second.

    Nothing is loaded; owl2.json is all that is read. Beside each figure stands where it comes from: computed from
    shapes and file sizes, measured on CPUs, or assumed (nothing here has run on a GPU). Where it does not fit, what to
    change is computed too. The ceiling is the device's memory bandwidth over the bytes that every token has to read: no
    program is faster, real ones are slower. cpu instead of this plans for this machine's CPU even if it has a GPU.

    The exit code is 0 if running it fits and 1 if not; building an engine on the device is a figure of its own.

    \b
    Examples:
      owl2 plan bundle/
      owl2 plan bundle/ --device orin-nano-8gb
      owl2 plan bundle/ --device rtx3060 --context 4096 --kv-cache fp16 --images 4
      owl2 plan bundle/ --device agx-orin-32gb --json
      owl2 plan --list
    """
    if listing:
        click.echo(json.dumps(_device_records(), indent=2) if as_json else _device_table())
        return
    if bundle is None:
        raise click.UsageError("give a bundle to plan for, or --list to see the devices")
    manifest = read_manifest(bundle)
    plan = make_plan(_scenario(manifest, device, context, kv_cache, images))
    click.echo(json.dumps(_record(plan), indent=2) if as_json else _table(bundle, plan))
    if not plan.fits:
        verdict = "cannot run on" if plan.problems else "does not fit"
        notice(f"error: {bundle} {verdict} {plan.scenario.target.device.product}")
        sys.exit(1)


def _scenario(manifest: Manifest, device: str, context: int | None, kv_cache: KvType | None, images: int) -> Scenario:
    stored = BundleSizes.of(manifest)
    positions = resolve_context(manifest.model.decoder, context)
    return Scenario(stored, _target(device), Settings(positions, kv_cache or stored.activations, images))


def _target(name: str) -> MemoryBudget:
    """The device of that name, or what this machine has; says which of several GPUs, or that there is none.

    Raises:
        ConfigError: no such device.
        BackendUnavailableError: this machine does not tell what it has.
    """
    if name in PRODUCTS:
        return MemoryBudget.of_table(PRODUCTS[name])
    require(name in (THIS, CPU), f"device {name!r} is not known; known: {', '.join((THIS, CPU, *PRODUCTS))}")
    here = gpus() if name == THIS else []
    if len(here) > 1:
        notice(f"{len(here)} GPUs are found; planning for number 0, {here[0].device.product}")
    elif name == THIS and not here:
        notice("no GPU is found (no Jetson's device tree, no answer of nvidia-smi); planning for the CPU")
    found = here[0] if here else this_cpu()
    if found is None:
        raise BackendUnavailableError(
            "this system does not tell how much memory it has (no /proc/meminfo); name a device of owl2 plan --list"
        )
    target = MemoryBudget.of_machine(found, host_memory())
    measured = found.device.family == "cpu"
    return replace(target, device=replace(found.device, bandwidth=read_bandwidth())) if measured else target


def _device_records() -> list[dict[str, Any]]:
    here = [found for found in (*gpus(), this_cpu()) if found is not None]
    return [
        *({**_device(found.device), "here": True, "available": found.available} for found in here),
        *({**_device(device), "here": False} for device in PRODUCTS.values()),
    ]


def _device(device: Product) -> dict[str, Any]:
    return {**asdict(device), "engines": list(device.engines), "int4_engines": device.int4_engines}


def _device_table() -> str:
    rows = [("name", "product", "SM", "memory", "bandwidth", "engines")]
    here = [found.device for found in (*gpus(), this_cpu()) if found is not None]
    for device in (*here, *PRODUCTS.values()):
        sm, speed = device.compute, device.bandwidth
        bandwidth = "" if speed is None else f"{speed / 1e9:.0f} GB/s"
        name = f"{device.name} (here)" if device in here else device.name
        memory = f"{device.memory / GIB:.0f} GiB{' shared' if device.shared else ''}"
        rows.append((name, device.product, str(sm or ""), memory, bandwidth, ", ".join(device.engines)))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def _record(plan: Plan) -> dict[str, Any]:
    target, made, limit = plan.scenario.target, plan.building, plan.ceiling
    return {
        "fits": plan.fits,
        "needed": plan.needed,
        "available": target.available,
        "runner": plan.runner,
        "device": _device(target.device),
        "settings": asdict(plan.scenario.settings),
        "parts": [{"name": part.name, "size": part.size, "basis": part.basis} for part in plan.parts],
        "problems": list(plan.problems),
        "building": None if made is None else {**asdict(made), "fits": made.fits},
        "ceiling": {
            "weight_bytes_per_token": limit.weights,
            "kv_bytes_per_token": limit.kv,
            "tokens_per_second": limit.full,
            "tokens_per_second_empty": limit.empty,
        },
        "changes": [
            {
                "words": change.words,
                "needed": change.needed,
                "available": change.scenario.target.available,
                "settings": asdict(change.scenario.settings),
            }
            for change in plan.changes
        ],
        "fits_on": None if plan.elsewhere is None else plan.elsewhere.name,
    }


def _table(folder: Path, plan: Plan) -> str:
    settings, target = plan.scenario.settings, plan.scenario.target
    verdict = "fits" if plan.fits else "CANNOT RUN" if plan.problems else "DOES NOT FIT"
    title = [
        f"{folder} on {_named(target.device)}: {verdict}",
        f"run by {RUNNERS[plan.runner]}, {settings.context} positions, {settings.kv_cache} K/V cache, "
        f"images: {settings.images}",
    ]
    sections = [
        ("memory", _memory_rows(plan)),
        ("building the engine", [] if plan.building is None else _building_rows(plan.building, target)),
        ("speed", _speed_rows(plan.ceiling, settings.context, measured=target.device.family == "cpu")),
        ("cannot run there", [("", "", problem) for problem in plan.problems]),
        ("what would do" if plan.problems else "what would fit", [] if plan.fits else _change_rows(plan)),
    ]
    return "\n\n".join(["\n".join(title), *(_section(name, rows) for name, rows in sections if rows)])


def _named(device: Product) -> str:
    return f"{device.product} (SM{device.compute})" if device.compute else device.product


def _section(title: str, rows: list[Row]) -> str:
    """A title and its rows: name, figure, remark; a row of a remark alone is a sentence."""
    names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{name:{names}}  {figure:>{figures}}  {text}" if name else text for name, figure, text in rows]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _memory_rows(plan: Plan) -> list[Row]:
    target, bundle = plan.scenario.target, plan.scenario.bundle
    rows: list[Row] = [(part.name, size(part.size), part.basis) for part in plan.parts]
    decoder = bundle.model.decoder
    table = decoder.vocab_size * decoder.hidden_size * (2 if bundle.weights.embeddings == "fp16" else 4)
    rows.append(("token table", size(0), f"{size(table)} on disk, mapped; the rows in use are read"))
    rows.append(("needed", size(plan.needed), ""))
    total = size(target.device.memory)
    if target.here:
        basis = f"of {total}, now"
    elif target.device.family == "datacenter":
        basis = f"of {total}, less error correction and driver (assumed)"
    else:
        basis = f"of {total}, less the system and a desktop (assumed)"
    return [*rows, ("available", size(target.available), basis)]


def _building_rows(made: Building, target: MemoryBudget) -> list[Row]:
    rows: list[Row] = [
        ("CPU memory", size(made.needed), "an estimate: 3.9 times the engine, as seen in one build of 7B shapes")
    ]
    if made.available is None:
        return rows
    rows.append(("available", size(made.available), ""))
    if not made.fits and made.kind == "tensorrt" and target.device.shared:
        missing = size(made.needed - made.available)
        rows.append(("", "", f"does not fit: add {missing} of swap on a disk for it, and close the desktop"))
    elif not made.fits:
        rows.append(("", "", "does not fit: build it on another machine and copy the bundle"))
    return rows


def _speed_rows(limit: Ceiling, context: int, *, measured: bool) -> list[Row]:
    read = ("read per token", size(limit.weights), f"of weights, and {size(limit.kv)} of K/V at {context} positions")
    if limit.bandwidth is None or limit.full is None or limit.empty is None:
        return [read, ("ceiling", "unknown", "the bandwidth of this memory is not known")]
    source = "measured just now, beside what else is running" if measured else "the data sheet's peak"
    speed = f"{limit.bandwidth / 1e9:.0f} GB/s, {source}"
    return [read, ("ceiling", f"{limit.full:.1f}", f"tokens/s, {limit.empty:.1f} at the start of a chat; {speed}")]


def _change_rows(plan: Plan) -> list[Row]:
    rows: list[Row] = [
        (change.words, size(change.needed), f"of {size(change.scenario.target.available)}") for change in plan.changes
    ]
    if not rows:
        rows.append(("", "", "nothing that can be changed makes it fit this device"))
    if plan.elsewhere is not None:
        rows.append(("", "", f"as it is: {plan.elsewhere.product} (--device {plan.elsewhere.name}) or larger"))
    return rows
