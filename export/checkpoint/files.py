"""Files of a checkpoint: their names, what is wrong with a folder of them, and what stands for a missing one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from owl2.runtime.config import PreprocessConfig, VisionConfig
from owl2.runtime.errors import CheckpointError
from owl2.runtime.foreign import listed, read_json, reading, shorten
from owl2.runtime.harmless import harmless
from owl2.runtime.spec import TOKENIZER_FILES

PREPROCESSOR = "preprocessor_config.json"
REQUIRED_FILES = ("config.json", PREPROCESSOR, TOKENIZER_FILES[0])
# The original does without these too; what it then takes is known.
TOKENIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "legacy": True},
    "special_tokens_map.json": {},  # names none: tokenizer_config.json may, and else <s>, </s> and <unk> are meant
}
BASE_MODEL = "https://huggingface.co/MAGAer13/mplug-owl2-llama2-7b"

# Weight files in the order transformers prefers them: index or single file.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# AutoGPTQ's name for its one file.
AUTOGPTQ_FILES = "gptq_model-*bit-*g.safetensors"
GPTQ_INDEX = WEIGHT_FILES[0]
"""The index of a checkpoint that is written in the GPTQ layout."""
GENERATION = "generation_config.json"
OPTIONAL_FILES = (GENERATION, "added_tokens.json", "tokenizer.json")
"""Files that such a checkpoint takes over as they are, where there are any."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_FILES = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
WHOLE_WEIGHTS = "non_lora_trainables.bin"
"""What was trained as a whole beside an adapter, under the name that LLaVA's training program gave it."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def find_weights(folder: Path, *, base_preprocessor: bool) -> str:
    """Name of the index or of the one file with the weights, once all files that an export reads are there.

    Args:
        folder: of the checkpoint.
        base_preprocessor: whether preprocessor_config.json may be missing.

    Raises:
        CheckpointError: it is no whole checkpoint; the message begins with the cause.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; expected a checkpoint in the official layout (config.json, weights, "
            "tokenizer.model, …)"
        )
    _refuse_adapter(folder)
    check_pointers(folder, (*REQUIRED_FILES, *TOKENIZER_FILES, *OPTIONAL_FILES))
    problems = [
        name + ("" if not os.path.lexists(folder / name) else " (it is there, but not a regular file)")
        for name in REQUIRED_FILES
        if not (folder / name).is_file() and not (name == PREPROCESSOR and base_preprocessor)
    ]
    weights = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    weights += sorted(path.name for path in folder.glob(AUTOGPTQ_FILES))
    if not weights:
        problems.append(f"weights (one of {', '.join(WEIGHT_FILES)})")
    if problems:
        where = (
            f"; copy {PREPROCESSOR} into the folder from the model that this one was trained from ({BASE_MODEL}); an "
            "export, but nothing else, can do without it: owl2-export --base-preprocessor takes that model's values"
        )
        raise CheckpointError(
            f"{folder} is not an official mPLUG-Owl2 checkpoint; missing: {', '.join(problems)}"
            f"{where if PREPROCESSOR in problems else ''}"
        )
    check_pointers(folder, weights)
    return weights[0]


def check_pointers(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if any of these files, where they are there, is a pointer of Git LFS."""
    pointers = [name for name in dict.fromkeys(names) if _is_pointer(folder / name)]
    if pointers:
        raise CheckpointError(
            f"{folder} was copied without the files that Git LFS keeps: {listed(pointers)} only name them; run "
            "git lfs install and git lfs pull there, or download the model again"
        )


def json_object(path: Path, limit: int = 256 << 20) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; an index of a million names takes 100 MB.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    with reading(path, CheckpointError, "copy or download it again from the source of the checkpoint"):
        value = read_json(path, limit)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def preprocessor_of_base(config: dict[str, Any]) -> dict[str, Any]:
    """What mPLUG-Owl2's own preprocessor_config.json says, at the resolution of the model with this config.json."""
    visual = config.get("visual_config")
    model = visual.get("visual_model") if isinstance(visual, dict) else None
    size = model.get("image_size") if isinstance(model, dict) else None
    edge = size or VisionConfig().image_size
    values = PreprocessConfig()
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": edge,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": edge,
        "do_normalize": True,
        "image_mean": list(values.mean),
        "image_std": list(values.std),
        "do_convert_rgb": True,
    }


def _refuse_adapter(folder: Path) -> None:
    found = [name for name in ADAPTER_FILES if os.path.lexists(folder / name)]
    if not found:
        return
    base = None
    if found[0] == ADAPTER_FILES[0]:
        base = json_object(folder / found[0]).get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder} is a LoRA adapter ({listed(found)}), not a whole model: give its base"
        f"{f' {shorten(base)}' if base else ', which it does not name,'} as the checkpoint and this folder with "
        "--lora; if these weights are merged already, move the adapter's files away"
    )


def _is_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    with reading(harmless(str(path)), CheckpointError, "make it readable"), path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
