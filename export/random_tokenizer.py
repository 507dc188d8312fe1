"""A tokenizer that says nothing, for bundles of random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from owl2.runtime import spec

PIECES = 300
"""The control pieces, the 256 bytes, the letters and a few pairs of them."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_random_tokenizer(folder: Path, size: int) -> None:
    """Write the files of a tokenizer of ``size`` tokens: letters, bytes, and pieces that no text has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(LETTERS)] * 8),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    pieces: Any = vars(sentencepiece_model_pb2)["ModelProto"].FromString(model.getvalue())  # made at run time
    for number in range(len(pieces.pieces), size):
        pieces.pieces.add(piece=f"\u2581\u2581{number}", score=-float(number))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    contents = {
        "tokenizer.model": pieces.SerializeToString(),
        "special_tokens_map.json": json.dumps(special).encode(),
        "tokenizer_config.json": json.dumps({"add_bos_token": True, "add_eos_token": False, **special}).encode(),
    }
    for name in spec.TOKENIZER_FILES:
        (folder / name).write_bytes(contents[name])
