"""Names of the files of a checkpoint."""

from __future__ import annotations

from owl2.runtime.spec import TOKENIZER_FILES

REQUIRED_FILES = ("config.json", "preprocessor_config.json", *TOKENIZER_FILES)

# Weight files in the order transformers prefers them: index or single file.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
GPTQ_INDEX = WEIGHT_FILES[0]
"""The index of a checkpoint that is written in the GPTQ layout."""
COPIED_FILES = (
    *(name for name in REQUIRED_FILES if name != "config.json"),
    "generation_config.json",
    "added_tokens.json",
    "tokenizer.json",
)
"""Files that such a checkpoint takes over as they are; the first ones must exist."""
