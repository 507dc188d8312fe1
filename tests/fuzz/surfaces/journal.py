"""What an unfinished export left: its journal and the other files, taken up by the next export."""

import contextlib
import hashlib
import json
import random
import shutil
from pathlib import Path

from fuzz import mutate
from fuzz.bundles import CHECKPOINT
from fuzz.surface import Input, Surface
from owl2.export.config import ExportConfig
from owl2.export.job.progress import Silent
from owl2.export.pipeline import export_bundle

INDEX = "journal.json"


class StoppedError(Exception):
    """Ends an export before its last stage, like a full disk."""


class Stopping(Silent):
    """Stops where the checks of the bundle begin, once the decoder is finished."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        if name in ("comparing with torch", "int8 K/V cache"):
            raise StoppedError


def open_surface(_: Path, scratch: Path) -> Surface:
    """On an export that was stopped when all layers were finished."""
    config = ExportConfig(CHECKPOINT, scratch / "target", method="rtn")
    work, kept = scratch / ".target.partial", scratch / "kept"
    with contextlib.suppress(StoppedError):
        export_bundle(config, Stopping())
    shutil.copytree(work, kept)
    files = [str(path.relative_to(kept)) for path in sorted(kept.rglob("*")) if path.is_file() and path.name != "lock"]
    index = next(name for name in files if name.endswith(INDEX))

    def make(rng: random.Random) -> Input:
        name = index if rng.random() < 0.7 else rng.choice(files)
        content = (kept / name).read_bytes()
        if name != index:
            return Input(name.replace("/", "+"), mutate.change_bytes(rng, content))
        if rng.random() < 0.3:
            return Input(name.replace("/", "+"), mutate.change_json(rng, content))
        inner = mutate.change_json(rng, json.loads(content)["content"].encode()).decode(errors="replace")
        signed = {"sha256": hashlib.sha256(inner.encode()).hexdigest(), "content": inner}
        return Input(name.replace("/", "+"), json.dumps(signed).encode())

    def run(given: Input) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(kept, work)
        (work / given.target.replace("+", "/")).write_bytes(given.content)
        with contextlib.suppress(StoppedError):
            export_bundle(config, Stopping())

    return Surface(make, run)
