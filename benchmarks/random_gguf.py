"""Write a GGUF file of the 7B shapes with random Q4_0 weights: as fast and as large as a real one, and it says nothing.

``python random_gguf.py FILE``, in an environment with gguf and numpy.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np
from numpy.typing import NDArray

WIDTH, INNER, HEADS, LAYERS, VOCABULARY = 4096, 11008, 32, 32, 32000
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: a float16 scale and 32 codes of 4 bits
SCALE = 0.003
UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1


def matrix(random: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random blocks [rows, columns / 32 * 18]."""
    blocks = random.integers(0, 256, (rows * columns // BLOCK, BLOCK_BYTES), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(SCALE).tobytes(), np.uint8)
    return blocks.reshape(rows, columns // BLOCK * BLOCK_BYTES)


def main(path: str) -> None:
    """Write the file."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_file_type(2)
    writer.add_vocab_size(VOCABULARY)
    rest = VOCABULARY - 259
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"\u2581t{i}".encode() for i in range(rest))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * rest])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", matrix(random, rows, columns), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd", VOCABULARY, WIDTH)
    add("output", VOCABULARY, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
