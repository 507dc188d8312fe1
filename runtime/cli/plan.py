"""``owl2 plan``: whether a bundle fits a device, before anything is loaded or bought."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import click

from owl2.runtime.cli.console import notice, reports_errors, say, say_json, size
from owl2.runtime.cli.options import backend_option
from owl2.runtime.cli.table import section, table
from owl2.runtime.cli.types import PATH, integer
from owl2.runtime.engine import BackendName
from owl2.runtime.fit.machine import gpus, this_cpu
from owl2.runtime.fit.plan import THIS, Plan, plan
from owl2.runtime.fit.products import GIB, PRODUCTS
from owl2.runtime.spec import KvType


@click.command("plan")
@click.argument("bundle", type=PATH, required=False)
@click.option(
    "--device",
    default=THIS,
    show_default=True,
    help="A product of --list, or gpu or cpu of this machine; this: its GPU, or its CPU without one.",
)
@click.option("--context", type=integer, show_default="the model's own limit", help="Positions of a conversation.")
@click.option(
    "--kv-cache",
    type=click.Choice(get_args(KvType)),
    show_default="that which a load chooses",
    help="Type of keys and values.",
)
@backend_option
@click.option("--images", type=integer, default=1, show_default=True, help="Images in the conversation.")
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@click.option("--list", "list_devices", is_flag=True, help="List the known products and the devices of this machine.")
@reports_errors
def plan_command(
    bundle: Path | None,
    device: str,
    context: int | None,
    kv_cache: KvType | None,
    backend: BackendName | None,
    images: int,
    *,
    as_json: bool,
    list_devices: bool,
) -> None:
    """Estimate whether a bundle fits a device, and how fast it can be there.

    Nothing is loaded; only owl2.json is read. Each figure says where it comes from: computed from shapes and file
    sizes, measured on CPUs, or assumed (nothing has run on a GPU yet). For a bundle that does not fit, changes that
    make it fit are computed. The ceiling on the speed is the device's memory bandwidth over the bytes that every token
    reads; real programs are slower.

    The exit code is 0 if the bundle fits and 1 if not, whether or not its engine can be built on the device.

    \b
    Examples:
      owl2 plan bundle/
      owl2 plan bundle/ --device orin-nano-8gb
      owl2 plan bundle/ --device rtx3060 --context 4096 --images 4
      owl2 plan bundle/ --device agx-orin-32gb --json
      owl2 plan --list
    """
    if list_devices:
        _list(as_json)
        return
    if bundle is None:
        raise click.UsageError("give a bundle to plan for, or --list to see the devices")
    found = plan(bundle, device=device, context=context, kv_cache=kv_cache, images=images, backend=backend)
    for note in found.notes:
        notice(note)
    if as_json:
        say_json(found.to_json())
    else:
        say(_table(found))
    if not found.fits:
        notice(f"error: {bundle} on {found.budget.device.product}: {found.verdict}")
        sys.exit(1)


def _list(as_json: bool) -> None:
    here = [budget.device for budget in (*gpus(), this_cpu()) if budget is not None]
    devices = [*((device, True) for device in here), *((device, False) for device in PRODUCTS.values())]
    if as_json:
        say_json([device.to_json() | {"here": is_here} for device, is_here in devices])
        return
    rows = [("name", "product", "SM", "memory", "bandwidth", "engines")]
    for device, is_here in devices:
        name = f"{device.name} (here)" if is_here else device.name
        memory = f"{device.memory / GIB:.0f} GiB{' shared' if device.shared else ''}"
        bandwidth = "" if device.bandwidth is None else f"{device.bandwidth / 1e9:.0f} GB/s"
        rows.append((name, device.product, str(device.compute or ""), memory, bandwidth, ", ".join(device.engines)))
    say(table(rows))


def _table(plan: Plan) -> str:
    device = plan.budget.device
    product = f"{device.product} (SM{device.compute})" if device.compute else device.product
    memory: list[tuple[str, ...]] = [(part.name, size(part.size), part.basis) for part in plan.parts]
    basis = f"of {size(device.memory)}, {'now' if plan.budget.here else 'less system and desktop (assumed)'}"
    memory += [("needed", size(plan.needed), ""), ("available", size(plan.available), basis)]
    blocks = [
        f"{plan.bundle} on {product}: {plan.verdict if plan.fits else plan.verdict.upper()}\n"
        f"run by {plan.runner}, {plan.context} positions, {plan.kv_type} K/V cache, images: {plan.images}",
        section("memory", table(memory, "<>")),
    ]
    if plan.building is not None:
        host = "" if plan.budget.host is None else f", {size(plan.budget.host)} are available"
        if plan.budget.host is not None and plan.building > plan.budget.host:
            swap = "add swap on a disk for it, or " if plan.runner == "tensorrt" else ""
            host += f"; {swap}build it on another machine and copy the bundle"
        blocks.append(section("building the engine", f"takes about {size(plan.building)} of the CPU's memory{host}"))
    blocks.append(section("speed", _speed(plan)))
    if plan.problem is not None:
        blocks.append(section("problem", plan.problem))
    if not plan.fits:
        changes = plan.suggestions.items()
        rows = [(change, size(after.needed), f"of {size(after.available)}") for change, after in changes]
        nothing = "no option and no other export makes it fit"
        blocks.append(section("to make it fit", table(rows, "<>") if rows else nothing))
    return "\n\n".join(blocks)


def _speed(plan: Plan) -> str:
    weights, kv = (size(count) for count in plan.bytes_per_token)
    reads = f"every token reads {weights} of weights, and {kv} of keys and values at {plan.context} positions\n"
    bandwidth, speed = plan.budget.device.bandwidth, plan.tokens_per_second
    if bandwidth is None or speed is None:
        return f"{reads}no ceiling: the bandwidth of this memory is not known"
    source = "measured now, while other programs run" if plan.budget.device.family == "cpu" else "the data sheet's peak"
    start, full = speed
    ceiling = f"at most {full:.1f} tokens/s, {start:.1f} at the start of a chat"
    return f"{reads}{ceiling}: {bandwidth / 1e9:.0f} GB/s, {source}"
