"""Turn a LLaMA model in GGUF into a checkpoint folder: config.json, model.safetensors, tokenizer files.

The stored values are those of the GGUF, dequantized, rounded to float16 and written as float32: they ARE the reference
model from then on, whatever the model was before it was quantized. transformers can load the folder.

Needs two packages that owl2 does not need: ``pip install gguf tokenizers``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # token type of special tokens


def half_layout(weight: Tensor, heads: int) -> Tensor:
    """Undo the row order that GGUF gives LLaMA's q and k: [N, K] -> [N, K].

    GGUF rotates neighbouring rows of a head (0 with 1, 2 with 3, …), transformers and owl2 the two halves
    (0 with D/2, 1 with D/2 + 1, …).
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def convert(tensors: Mapping[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """GGUF tensors by their names -> transformers' names and row order, float32 values exact in float16."""
    converted = {}
    for name, tensor in tensors.items():
        values = tensor.half().float()
        if name.startswith("blk."):
            _, index, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                values = half_layout(values, heads if part == "attn_q" else kv_heads)
            converted[f"model.layers.{index}.{LAYER_NAMES[part]}.weight"] = values.contiguous()
        elif name == "token_embd.weight":
            converted["model.embed_tokens.weight"] = values
        elif name == "output_norm.weight":
            converted["model.norm.weight"] = values
        else:
            raise SystemExit(
                f"{name}: this script does not know this tensor; give a LLaMA with tied embeddings and without biases"
            )
    return converted


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()

    from gguf import GGUFReader, dequantize

    reader = GGUFReader(options.gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    options.folder.mkdir(parents=True)
    save_file(convert(tensors, heads, kv_heads), options.folder / "model.safetensors", metadata={"format": "pt"})
    (options.folder / "config.json").write_text(json.dumps(_config(fields), indent=2))
    _write_tokenizer(fields, options.folder)
    return 0


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        # The field is a float32; its shortest decimal form is what the authors wrote.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (name := (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise SystemExit(f"tokenizer {name} is not known; expected ('gpt2', 'smollm')")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, type_ in zip(tokens, types) if type_ == CONTROL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    raise SystemExit(main())
