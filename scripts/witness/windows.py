"""Token windows of a text; needs ``pip install tokenizers``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def token_windows(model: Path, text: Path, count: int, length: int) -> Tensor:
    """``count`` windows of ``length`` tokens, spread evenly over the text: int64 [count, length].

    Raises:
        SystemExit: the text is too short.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids)
    windows = len(tokens) // length
    if windows < count:
        raise SystemExit(f"{text}: {len(tokens)} tokens make {windows} windows of {length}; expected {count}")
    chosen = torch.arange(count) * windows // count
    return tokens[: windows * length].view(windows, length)[chosen]
