"""``owl2 serve``: a local server with OpenAI's interface."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import click
import platformdirs

from owl2.runtime.backends.choose import resolve_options
from owl2.runtime.bundle import Manifest, read_manifest
from owl2.runtime.cli.console import load_progress, notice, reports_errors
from owl2.runtime.cli.options import (
    backend_option,
    bundle_argument,
    context_option,
    device_option,
    kv_cache_option,
    memory_option,
    threads_option,
    verify_option,
)
from owl2.runtime.config import resolve_context
from owl2.runtime.engine import BackendName, EngineOptions
from owl2.runtime.errors import ConfigError
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.placement import Placement
from owl2.runtime.scoring.scale import USUAL
from owl2.runtime.spec import KvType

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _size(_context: click.Context, _option: click.Parameter, text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a size; write 512MiB or 2GiB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def _seconds(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{text!r} is not a time; write 90s, 10m or 2h")
    return float(found[1]) * TIMES[found[2] or "s"]


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="OWL2_API_KEY", help="Clients must send it; also from the variable OWL2_API_KEY.")
@click.option(
    "--allow-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Requests may name images in this folder.",
)
@click.option("--allow-fetch", is_flag=True, help="Requests may name images on the web, at public addresses.")
@click.option(
    "--cache", "cache_bytes", default="2GiB", show_default=True, callback=_size, help="Memory for past conversations."
)
@click.option(
    "--disk-cache",
    "disk_bytes",
    default="0",
    show_default="none",
    callback=_size,
    help="Room on the disk for those that the memory has none for, and for all when the server stops.",
)
@click.option("--max-active", type=click.IntRange(1, 256), default=16, show_default=True, help="Answers at a time.")
@click.option("--max-waiting", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait.")
@click.option("--max-body", default="64MiB", show_default=True, callback=_size, help="Size of a request.")
@click.option("--idle-unload", callback=_seconds, metavar="TIME", help="Give the memory back after this long (10m).")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    show_default="this user's data folder",
    help="Where the page keeps conversations.",
)
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@threads_option
@context_option
@device_option
@kv_cache_option
@backend_option
@memory_option
@verify_option
@reports_errors
def serve(  # noqa: PLR0913, PLR0917 - one parameter per option
    bundle: Path,
    host: str,
    port: int,
    api_key: str | None,
    allow_dir: Path | None,
    allow_fetch: bool,
    cache_bytes: int,
    disk_bytes: int,
    max_active: int,
    max_waiting: int,
    max_body: int,
    idle_unload: float | None,
    store: Path | None,
    open_page: bool,
    threads: int | None,
    context: int | None,
    device: str,
    kv_cache: KvType | None,
    backend: BackendName | None,
    check_memory: bool,
    verify: bool,
) -> None:
    """Serve a model to clients of OpenAI's interface, on this machine.

    \b
    Examples:
      owl2 serve bundle/
      owl2 serve bundle/ --cache 4GiB --idle-unload 10m
      OWL2_API_KEY=secret owl2 serve bundle/ --host 0.0.0.0
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
    """
    if api_key is not None and not api_key.strip():
        raise ConfigError("--api-key is empty; give one that cannot be guessed, or leave it out")
    if api_key is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in: give an --api-key, which they must send, or leave --host out"
        )
    try:
        from owl2.runtime.serve.app import ServedModel, ServeOptions
        from owl2.runtime.serve.run import run_server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("owl2"):
            raise
        raise ConfigError(f"owl2 serve needs another package ({error.name}): pip install 'owl2[serve]'") from error
    engine = EngineOptions(Placement.parse(device), threads, kv_cache, context, backend, warm=True)

    def load() -> Loaded:
        with load_progress() as progress:
            return open_bundle(bundle, engine, check_memory=check_memory, verify=verify, on_progress=progress)[1]

    store = store or platformdirs.user_data_path("owl2", appauthor=False) / "serve"
    options = ServeOptions(
        store=store,
        disk=(store / "caches", disk_bytes) if disk_bytes else None,
        api_key=api_key,
        allow_dir=allow_dir,
        allow_fetch=allow_fetch,
        active=max_active,
        waiting=max_waiting,
        body_bytes=max_body,
        cache_bytes=cache_bytes,
        idle_seconds=idle_unload,
    )
    manifest = read_manifest(bundle)
    name, facts = bundle.resolve().name, _facts(manifest, resolve_options(manifest, engine))
    model = ServedModel(name, Tokenizer.load(bundle), manifest.model.preprocess, facts, manifest.preset or USUAL)
    run_server(model, load, options, host, port, notice, open_page=open_page)


def _facts(manifest: Manifest, options: EngineOptions) -> dict[str, str]:
    backend = f", {options.backend}" if options.backend else ""
    return {
        "Weights": manifest.weights.decoder,
        "K/V cache": str(options.kv_cache),
        "Context": f"{resolve_context(manifest.model.decoder, options.context)} positions",
        "Device": f"{options.device}{backend}",
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
