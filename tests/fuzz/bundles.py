"""The small models that are attacked, and what makes a changed bundle consistent again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from fuzz.outcome import CONTROL, ROOT
from owl2.runtime.cli.commands import cli
from owl2.runtime.spec import MANIFEST
from owl2.runtime.verification import hash_file

BUNDLE = "bundle"
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT = GOLDEN / "a1_base_bin" / "model"
SHARDED = GOLDEN / "a2_fp16_safetensors" / "model"
PICTURE = GOLDEN / "images" / "00_rgb_landscape_97x61.png"


def make_base(folder: Path) -> None:
    """Export the bundle that all surfaces start from."""
    from owl2.export.config import ExportConfig
    from owl2.export.pipeline import export_bundle

    export_bundle(ExportConfig(CHECKPOINT, folder / BUNDLE, method="rtn", overwrite=True, fresh=True))


def own_copy(folder: Path, scratch: Path) -> Path:
    """A copy of the base bundle that a process may change."""
    return Path(shutil.copytree(folder / BUNDLE, scratch / BUNDLE))


def sign(bundle: Path, *names: str) -> None:
    """Make the manifest agree with files that were changed, as an attacker would."""
    manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    for name in names:
        path = bundle / name
        manifest["files"][name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    write_manifest(bundle, manifest)


def write_manifest(bundle: Path, manifest: Any) -> None:
    """Write a manifest whose own digest, if it has one, is right."""
    (bundle / MANIFEST).write_text(json.dumps(signed(manifest)))


def signed(manifest: Any) -> Any:
    """A manifest, or what a change made of it, with the digest that it should have."""
    if not isinstance(manifest, dict) or "digest" not in manifest:
        return manifest
    content = {key: value for key, value in manifest.items() if key != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"digest": hashlib.sha256(canonical.encode()).hexdigest()}


def command(*arguments: object) -> None:
    """Run ``owl2``; raises what it did not expect, and what it printed with a control character."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="owl2")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if CONTROL.search(result.output):
        raise ControlCharacterError(repr(result.output[:500]))


class ControlCharacterError(Exception):
    """A command wrote a control character that came from a file."""
