"""LoRA adapters: their config and their weights, in safetensors and in torch's own format."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save

from fuzz import binary, mutate
from fuzz.bundles import CHECKPOINT
from fuzz.surface import Input, Surface
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
FRONT = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "use_rslora": True,
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {r".*\.gate_proj": 4},
    "modules_to_save": ["norm"],
    "init_lora_weights": True,
    "base_model_name_or_path": "MAGAer13/mplug-owl2-llama2-7b",
    "target_modules": ["q_proj"],
}


def open_surface(_folder: Path, scratch: Path) -> Surface:
    """On an adapter of the checkpoint, once with each kind of weights."""
    with Checkpoint(CHECKPOINT) as checkpoint:
        rows, columns = checkpoint.tensor(QUERY).shape
        norm = checkpoint.tensor(NORM)
    module = QUERY.removesuffix(".weight")
    tensors = {
        f"{FRONT}{module}.lora_A.weight": torch.ones(2, columns),
        f"{FRONT}{module}.lora_B.weight": torch.ones(rows, 2).half(),
        f"{FRONT}{NORM}": norm,
    }
    safe, pickled = ADAPTER_WEIGHTS
    originals = {ADAPTER_CONFIG: json.dumps(CONFIG).encode(), safe: save(tensors)}
    torch.save(tensors, scratch / pickled)
    originals[pickled] = (scratch / pickled).read_bytes()
    (scratch / pickled).unlink()

    def make(rng: random.Random) -> Input:
        name = rng.choice((ADAPTER_CONFIG, ADAPTER_CONFIG, safe, pickled))
        if name == ADAPTER_CONFIG:
            return Input(name, mutate.change_json(rng, originals[name]))
        change = binary.change_safetensors if name == safe else binary.change_zip
        return Input(name, change(rng, originals[name]))

    def run(given: Input) -> None:
        weights = pickled if given.target == pickled else safe
        for name in (ADAPTER_CONFIG, weights):
            (scratch / name).write_bytes(given.content if name == given.target else originals[name])
        try:
            with Checkpoint(CHECKPOINT, adapter=scratch) as checkpoint:
                for name in (QUERY, NORM):
                    checkpoint.tensor(name)
        finally:
            (scratch / weights).unlink()

    return Surface(make, run)
