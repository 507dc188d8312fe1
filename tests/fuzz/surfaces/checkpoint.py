"""Checkpoints: every file of one in safetensors and of one in torch's own format, in shards and whole."""

import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fuzz import binary, mutate
from fuzz.bundles import CHECKPOINT, SHARDED
from fuzz.surface import Input, Surface
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.source import default_settings

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On copies: one with shards of safetensors, one with shards of pickles, and either in one file."""
    bases = {"safe": SHARDED, "pickled": CHECKPOINT}
    folders = {name: Path(shutil.copytree(base, scratch / name)) for name, base in bases.items()}
    for name, source in (("one-safe", "safe"), ("one-pickled", "pickled")):
        folders[name] = _joined(folders[source], scratch / name)
    files = [(name, path.name) for name, base in folders.items() for path in sorted(base.iterdir())]
    originals = {(name, file): (folders[name] / file).read_bytes() for name, file in files}
    tensors = {name: list(_weights(base)) for name, base in bases.items()}

    def make(rng: random.Random) -> Input:
        name, file = rng.choice(files)
        return Input(f"{name}.{file}", _changed(rng, file, originals[name, file]))

    def run(given: Input) -> None:
        name, file = given.target.split(".", 1)
        path = folders[name] / file
        path.write_bytes(given.content)
        try:
            default_settings(folders[name])
            with Checkpoint(folders[name]) as checkpoint:
                for tensor in tensors[name.removeprefix("one-")]:
                    if tensor in checkpoint:
                        checkpoint.tensor(tensor)
        finally:
            path.write_bytes(originals[name, file])

    return Surface(make, run)


def _changed(rng: random.Random, file: str, content: bytes) -> bytes:
    if file.endswith(".json"):
        return mutate.change_json(rng, content)
    if file.endswith(".safetensors"):
        return binary.change_safetensors(rng, content)
    if file.endswith(".bin"):
        return binary.change_zip(rng, content)
    return binary.change_protobuf(rng, content)


def _joined(source: Path, target: Path) -> Path:
    """A checkpoint with all weights in one file."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".model") and "index" not in path.name:
            shutil.copy(path, target)
    weights = _weights(source)
    if (source / f"{SAFE}.index.json").exists():
        save_file(weights, target / SAFE, metadata={"format": "pt"})
    else:
        torch.save(weights, target / PICKLED)
    return target


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of shards."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        elif path.suffix == ".bin":
            weights |= torch.load(path, weights_only=True)
    return weights
