"""Golden cases of the original implementation, each with a bundle of its checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import GOLDEN
from numpy.typing import NDArray

from owl2 import Owl2
from owl2.runtime.engine import BackendName

CASES = {
    "a1": "a1_base_bin",
    "a2": "a2_fp16_safetensors",
    "a1_ort": "a1_base_bin",
    "a2_ort": "a2_fp16_safetensors",
    "a1_onnx": "a1_base_bin",
    "a2_onnx": "a2_fp16_safetensors",
}


class Case:
    """A golden case with its bundle, loaded."""

    def __init__(self, folder: Path, bundle: Path, backend: BackendName | None = None) -> None:
        self.folder, self.bundle = folder, bundle
        self.owl = Owl2.load(bundle, backend=backend)
        images = GOLDEN / "images"
        self.files: list[Path] = [images / name for name in json.loads((folder / "checks.json").read_text())["images"]]
        prompts = {entry["id"]: entry["prompt"] for entry in json.loads((folder / "prompts.json").read_text())}
        index = json.loads((folder / "forward_index.json").read_text())
        self.prompts: dict[str, str] = {entry["name"]: prompts[entry["prompt_id"]] for entry in index}
        self.images: dict[str, list[Path]] = {
            entry["name"]: [images / name for name in entry["images"]] for entry in index
        }

    def array(self, file: str, name: str) -> NDArray[Any]:
        """An array that the original recorded."""
        array: NDArray[Any] = np.load(self.folder / file)[name]
        return array
