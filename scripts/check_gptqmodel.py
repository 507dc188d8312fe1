"""Exchange checkpoints with GPTQModel in both directions and compare every number.

Needs an environment with both gptqmodel and owl2[export], which the project's own is not:

    TORCHDYNAMO_DISABLE=1 python scripts/check_gptqmodel.py CHECKPOINT WORK [--record FOLDER]

GPTQModel does not know mPLUG-Owl2, so each branch of the decoder is given to it as a LLaMA of the same shapes: text
keys and values in one, image keys and values in another. CHECKPOINT should be tiny; WORK is a new folder for all files.
GPTQModel writes to stdout, too; the lines of this script come together at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.gptq_checkpoint import export_gptq
from owl2.export.pipeline import export_bundle
from owl2.quant.grid import QuantizedWeight
from owl2.quant.layer import LINEARS
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.config import DecoderConfig

BRANCHES = (0, 1)
VISION = ("model.vision_model.", "model.visual_abstractor.")
RECORDED = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj.multiway.1")


@dataclass(frozen=True)
class Variant:
    """Settings of one quantization by GPTQModel."""

    bits: int = 4
    group_size: int = 16
    desc_act: bool = False
    sym: bool = True
    version: int = 1
    recorded: bool = False

    @property
    def name(self) -> str:
        group = "rows" if self.group_size == -1 else f"g{self.group_size}"
        zeros, order = "sym" if self.sym else "asym", "_act" if self.desc_act else ""
        return f"int{self.bits}_{group}_{zeros}_v{self.version}{order}"


VARIANTS = (
    Variant(recorded=True),
    Variant(desc_act=True, recorded=True),
    Variant(sym=False, desc_act=True, recorded=True),
    Variant(sym=False, version=2, recorded=True),
    Variant(version=2),
    Variant(sym=False, version=2, desc_act=True),
    Variant(bits=8),
    Variant(bits=8, sym=False, version=2, desc_act=True),
    Variant(group_size=-1),
    Variant(group_size=-1, desc_act=True, sym=False),
)


def llama_config(decoder: DecoderConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_hidden_layers,
        num_attention_heads=decoder.num_attention_heads,
        num_key_value_heads=decoder.num_attention_heads,
        max_position_embeddings=decoder.max_position_embeddings,
        rms_norm_eps=decoder.rms_norm_eps,
        rope_theta=decoder.rope_theta,
        tie_word_embeddings=False,
        torch_dtype="float16",
    )


def llama_tensors(tensors: Mapping[str, Tensor], branch: int) -> dict[str, Tensor]:
    """One branch of the decoder under LLaMA's names."""
    other, own = f".multiway.{1 - branch}", f".multiway.{branch}"
    return {
        name.replace(own, ""): value
        for name, value in tensors.items()
        if other not in name and not name.startswith(VISION)
    }


def write_llama(folder: Path, decoder: DecoderConfig, tensors: dict[str, Tensor], quantization: object = None) -> None:
    """Write a LLaMA checkpoint, with a tokenizer, which GPTQModel requires."""
    folder.mkdir(parents=True)
    llama_config(decoder).save_pretrained(folder)
    if quantization is not None:
        config = json.loads((folder / "config.json").read_text())
        config |= {"quantization_config": quantization, "architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "quantize_config.json").write_text(json.dumps(quantization))
    save(tensors, folder)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(decoder.vocab_size)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2", pad_token="t0")
    tokenizer.save_pretrained(folder)


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    whole = {name: value.contiguous() for name, value in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def quantize(source: Path, target: Path, variant: Variant, vocabulary: int) -> None:
    torch.manual_seed(0)
    rows = [torch.randint(3, vocabulary, (64,)).tolist() for _ in range(32)]
    model = GPTQModel.load(
        str(source),
        QuantizeConfig(
            bits=variant.bits,
            group_size=variant.group_size,
            desc_act=variant.desc_act,
            sym=variant.sym,
            act_group_aware=not variant.desc_act and variant.group_size != -1,
            format="gptq" if variant.version == 1 else "gptq_v2",
        ),
        backend=BACKEND.TORCH,
        dtype=torch.float16,
    )
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(str(target))


def load(folder: Path) -> Any:  # noqa: ANN401 - GPTQModel has no types
    return GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model


def quant_linears(model: Any, branch: int) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """GPTQModel's modules by the official names of this branch."""
    for index in range(model.config.num_hidden_layers):
        for name in LINEARS:
            if f".multiway.{1 - branch}" not in name:
                plain = name.replace(f".multiway.{branch}", "")
                yield f"model.layers.{index}.{name}", model.get_submodule(f"model.layers.{index}.{plain}")


def integers(module: Any) -> Tensor:  # noqa: ANN401
    """Code minus zero point as GPTQModel reads them, [N, K]: its own dequantization with scales of 1."""
    scales = module.scales.clone()
    module.scales.fill_(1)
    values: Tensor = module.dequantize_weight().T.clone()
    module.scales.copy_(scales)
    return values


def our_integers(weight: QuantizedWeight) -> Tensor:
    """Code minus zero point as owl2 reads them, [N, K]."""
    return replace(weight, scales=torch.ones_like(weight.scales)).dequantize()


def join(text: Path, image: Path, official: Path, target: Path) -> None:
    """Write two quantized LLaMAs under the official names, with the vision side of the official checkpoint."""
    target.mkdir()
    for path in official.iterdir():
        if path.suffix in (".json", ".model") and "index" not in path.name:
            shutil.copyfile(path, target / path.name)
    quantization = json.loads((text / "quantize_config.json").read_text())
    config = json.loads((official / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    shutil.copyfile(text / "quantize_config.json", target / "quantize_config.json")
    with Checkpoint(official) as checkpoint:
        with torch.device("meta"):
            names = Owl2Model(checkpoint.config).state_dict()
        vision = [name for name in names if name.startswith(VISION) and name in checkpoint]
        tensors = {name: checkpoint.tensor(name) for name in vision}
    for branch, folder in enumerate((text, image)):
        for name, value in load_file(folder / "model.safetensors").items():
            official_name = branch_name(name, branch)
            if branch == 0 or ".multiway.1." in official_name:
                tensors[official_name] = value
    save(tensors, target)


def branch_name(name: str, branch: int) -> str:
    for part in ("k_proj", "v_proj", "input_layernorm", "post_attention_layernorm"):
        name = name.replace(f".{part}.", f".{part}.multiway.{branch}.")
    return name


def compare(checkpoint: Checkpoint, models: Mapping[int, Any]) -> tuple[int, int]:
    """Number of weights compared, and of their values that differ from GPTQModel's."""
    layers = different = 0
    for branch, model in models.items():
        for name, module in quant_linears(model, branch):
            if branch == 1 and ".multiway.1" not in name:
                continue
            ours = checkpoint.quantized_weight(name)
            different += int((our_integers(ours) != integers(module)).sum())
            different += int((ours.dequantize().half() != module.dequantize_weight().T).sum())
            layers += 1
    return layers, different


def check_reading(official: Path, work: Path, variant: Variant, record: Path | None, results: list[str]) -> bool:
    with Checkpoint(official) as checkpoint:
        decoder = checkpoint.config.decoder
    folders = [work / variant.name / f"branch{branch}" for branch in BRANCHES]
    for branch, folder in zip(BRANCHES, folders):
        quantize(work / f"dense{branch}", folder, variant, decoder.vocab_size)
    joined = work / variant.name / "joined"
    join(folders[0], folders[1], official, joined)
    models = {branch: load(folder) for branch, folder in zip(BRANCHES, folders)}
    with Checkpoint(joined) as checkpoint:
        layers, different = compare(checkpoint, models)
        permuted = sum(checkpoint.quantized_weight(n).columns is not None for n in checkpoint.quantized)
        zeros = sum(checkpoint.quantized_weight(n).zero_points is not None for n in checkpoint.quantized)
        settings = checkpoint.gptq
        assert settings is not None
        if record is not None and variant.recorded:
            record_variant(joined, models, record / variant.name)
    report = export_bundle(
        ExportConfig(joined, work / variant.name / "bundle", weights=f"int{settings.bits}", group_size=settings.block)  # type: ignore[arg-type]
    )
    results.append(
        f"read {variant.name}: {layers} weights, {different} values differ from GPTQModel's; {zeros} with zero "
        f"points, {permuted} with another order of columns; bundle equals torch within {report.parity[1].exact:.1e}"
    )
    return different == 0


def record_variant(joined: Path, models: Mapping[int, Any], target: Path) -> None:
    """Keep two weights, and the first as GPTQModel dequantizes it, for tests that run without it."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(joined / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if name.rsplit(".", 1)[0] in RECORDED}
    first = models[0].get_submodule(RECORDED[0])
    kept[f"{RECORDED[0]}.dequantized"] = first.dequantize_weight().T.contiguous()
    save_file(kept, target / "layer.safetensors", {"format": "pt"})
    config = json.loads((joined / "quantize_config.json").read_text())
    config["meta"].pop("offload_to_disk_path", None)
    (target / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_writing(official: Path, work: Path, bits: int, results: list[str]) -> bool:
    """Compare what GPTQModel reads from a checkpoint written by owl2: integers, weights, logits."""
    folder = work / f"written{bits}"
    export_gptq(ExportConfig(official, folder, weights=f"int{bits}", group_size=16, layout="gptq"))  # type: ignore[arg-type]
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: value for shard in shards for name, value in load_file(shard).items()}
    quantization = json.loads((folder / "quantize_config.json").read_text())
    equal = True
    with Checkpoint(folder) as checkpoint:
        decoder = checkpoint.config.decoder
        for branch in BRANCHES:
            source = work / f"written{bits}_branch{branch}"
            write_llama(source, decoder, llama_tensors(tensors, branch), quantization)
            model = load(source)
            layers = different = 0
            for name, module in quant_linears(model, branch):
                ours = checkpoint.quantized_weight(name)
                different += int((our_integers(ours) != integers(module)).sum())
                different += int((ours.dequantize().half() != module.dequantize_weight().T).sum())
                layers += 1
            plain = LlamaForCausalLM(llama_config(decoder)).float()
            names = llama_names(checkpoint, branch)
            plain.load_state_dict({llama: checkpoint.tensor(official) for llama, official in names.items()})
            ids = torch.randint(3, decoder.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected, got = plain(ids).logits, model(ids).logits.float()
            off = float((got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())
            equal = equal and different == 0 and off < 1e-2
            results.append(
                f"written int{bits}, {len(shards)} files, branch {branch}: GPTQModel reads {layers} weights, "
                f"{different} values differ; its fp16 logits differ from ours in float32 by {off:.1e} of their RMS"
            )
    return equal


def llama_names(checkpoint: Checkpoint, branch: int) -> dict[str, str]:
    """The official name of each tensor of a branch, by LLaMA's."""
    with torch.device("meta"):
        state = Owl2Model(checkpoint.config).state_dict()
    return {
        name.replace(f".multiway.{branch}", ""): name
        for name in state
        if f".multiway.{1 - branch}" not in name and not name.startswith(VISION)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--record", type=Path, help="folder for a few tensors that the tests read")
    parser.add_argument("--only", help="variants whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True)
    checkpoint, work = arguments.checkpoint.resolve(), arguments.work.resolve()
    record = None if arguments.record is None else arguments.record.resolve()
    os.chdir(work)  # GPTQModel leaves logs where it runs
    with Checkpoint(checkpoint) as source:
        for branch in BRANCHES:
            tensors = {llama: source.tensor(name).half() for llama, name in llama_names(source, branch).items()}
            write_llama(work / f"dense{branch}", source.config.decoder, tensors)
    results: list[str] = []
    equal = [check_writing(checkpoint, work, bits, results) for bits in (4, 8)]
    for variant in VARIANTS:
        if arguments.only is None or arguments.only in variant.name:
            equal.append(check_reading(checkpoint, work, variant, record, results))
    print("\n".join([*results, "all equal" if all(equal) else "DIFFERENT"]))
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
