"""Write a checkpoint of full-size shapes with random weights, to measure time and memory without the real one.

The shapes are those of mPLUG-Owl2 7B, with any number of decoder layers. Files are named as by the authors' converter:
one per decoder layer, the last one for everything else.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch

from owl2.export.checkpoint.hf_config import model_config
from owl2.quant.models.mplug_owl2 import Owl2Model

CONFIG = {
    "model_type": "mplug_owl2",
    "architectures": ["MPLUGOwl2LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "visual_config": {},
}
PREPROCESSOR = {"size": 448, "crop_size": 448}


def write_checkpoint(folder: Path, tokenizer: Path, layers: int, seed: int) -> None:
    """Write the checkpoint shard by shard, with the memory of one."""
    config = CONFIG | {"num_hidden_layers": layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder / name)
    with torch.device("meta"):
        parameters = dict(Owl2Model(model_config(config, PREPROCESSOR, {})).named_parameters())
    total = layers + 1
    files: dict[str, list[str]] = {}
    for name in parameters:
        number = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else total
        files.setdefault(f"pytorch_model-{number}-of-{total}.bin", []).append(name)
    generator = torch.Generator().manual_seed(seed)
    for file, names in files.items():
        shard = {name: random_tensor(name, parameters[name].shape, generator) for name in names}
        torch.save(shard, folder / file)
        print(folder / file, flush=True)
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """float16 values of the magnitude of trained weights."""
    values = torch.randn(shape, generator=generator)
    if name.endswith(("norm.weight", "norm1.weight", "normk.weight", "norm2.weight", "ffn_ln.weight")) or (
        "layernorm" in name and name.endswith("weight")
    ):
        return (1.0 + 0.1 * values).half()
    return (values / math.sqrt(max(1, shape[-1]))).half()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default 32, as in the real model)")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parents[1] / "sample" / "checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_checkpoint(options.folder, options.tokenizer, options.layers, options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
