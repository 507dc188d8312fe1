"""What there is to say of a checkpoint: why its tensors are not those of its config.json, and what was done with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from owl2.export.checkpoint.files import PREPROCESSOR, TOKENIZER_DEFAULTS
from owl2.export.checkpoint.naming import TABLE, Names
from owl2.runtime.config import ModelConfig
from owl2.runtime.foreign import cut, listed
from owl2.runtime.harmless import harmless

LAYER = re.compile(r"model\.layers\.(\d+)\..*")
BITSANDBYTES = re.compile(r"\.(absmax|quant_state|SCB)\b")
PLAIN_LLAMA = re.compile(r"\.self_attn\.(k_proj|v_proj)\.weight$")


def find_cause(missing: Sequence[str], unexpected: Sequence[str], config: ModelConfig, rows: int) -> str:
    """The end of a sentence: a cause that explains most of the tensors at fault, or nothing.

    Args:
        missing: official names of tensors that are not there.
        unexpected: names of tensors that are there, converted.
        config: of config.json.
        rows: of the token table.
    """
    layers, size = config.decoder.num_hidden_layers, config.decoder.vocab_size
    held = max((index + 1 for index in _layers(unexpected)), default=0)
    if held <= layers and (absent := _layers(missing)):
        held = min(absent) if absent == set(range(min(absent), layers)) else layers
    some = f"; it has {cut(harmless(unexpected[0]))}" if unexpected else ""
    causes = {
        "it is quantized by bitsandbytes, which cannot be read; export the original checkpoint": any(
            BITSANDBYTES.search(name) for name in unexpected
        ),
        "its decoder is a plain LLaMA (one k_proj and v_proj a layer), not mPLUG-Owl2's with two of each": any(
            PLAIN_LLAMA.search(name) for name in unexpected
        ),
        f"the language model is not in these files ({TABLE} is missing{some})": TABLE in missing,
        f"it has {held} decoder layers, config.json says {layers} (num_hidden_layers)": held not in (0, layers),
        f"its token table has {rows} rows, config.json says {size} (vocab_size)": rows < size,
    }
    return next((f"; {cause}" for cause, holds in causes.items() if holds), "")


def notes(folder: Path, names: Names, rows: int, config: ModelConfig) -> tuple[str, ...]:
    """What was converted, taken for granted or left out, a sentence each; ``rows`` are those of the token table."""
    missing = [name for name in TOKENIZER_DEFAULTS if not (folder / name).exists()]
    size = config.decoder.vocab_size
    said = {
        names.note: bool(names.note),
        f"not read, since no result depends on them: {listed(names.idle, 3)}": bool(names.idle),
        f"not read, since it changes nothing: a LoRA adapter of zeros ({listed(names.adapter, 2)})": bool(
            names.adapter
        ),
        f"{', '.join(missing)} is missing; the defaults of LLaMA's tokenizer are taken": bool(missing),
        f"{PREPROCESSOR} is missing; the values of mPLUG-Owl2 itself are taken": not (folder / PREPROCESSOR).exists(),
        f"the token table has {rows} rows, config.json a vocab_size of {size}; the rows after it are left out": rows
        > size,
    }
    return tuple(note for note, holds in said.items() if holds)


def _layers(names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := LAYER.fullmatch(name))}
