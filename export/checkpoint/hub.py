"""Finding a checkpoint: a local folder, or a model of the Hugging Face hub that the user asks to download."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from owl2.export.checkpoint.files import ADAPTER_FILES, OPTIONAL_FILES, REQUIRED_FILES
from owl2.export.checkpoint.gptq_format import CONFIG_FILE
from owl2.runtime.errors import CheckpointError
from owl2.runtime.foreign import shorten
from owl2.runtime.spec import TOKENIZER_FILES

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
JSON_FILES = (*REQUIRED_FILES, *TOKENIZER_FILES, *OPTIONAL_FILES, ADAPTER_FILES[0], CONFIG_FILE, "*.index.json")


def local_checkpoint(name: str, *, download: bool) -> Path:
    """The folder of a checkpoint; downloads it only when asked to.

    Raises:
        CheckpointError: the folder does not exist, or the download failed.
    """
    if not download:
        folder = Path(name)
        if not folder.exists() and HUB_ID.fullmatch(name):
            raise CheckpointError(f"folder {name} does not exist; if it is a hub id, add --download")
        return folder
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{shorten(name)} is not a hub id; expected OWNER/MODEL, as in MAGAer13/mplug-owl2-llama2-7b"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError("downloading needs huggingface_hub: pip install 'owl2[hub]'")
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().list_repo_files(name)
        weights = "*.safetensors" if any("/" not in f and f.endswith(".safetensors") for f in files) else "*.bin"
        # Subfolders hold checkpoints of the training run.
        return Path(snapshot_download(name, allow_patterns=[*JSON_FILES, weights], ignore_patterns=["*/*"]))
    except Exception as error:  # its errors come from several libraries below it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name} cannot be downloaded: {reason}") from error
