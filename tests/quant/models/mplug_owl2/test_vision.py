"""The vision side of golden a4, which has no CLS token, and position tables of other sizes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from numpy.typing import NDArray
from safetensors.torch import load_file

from owl2.export.checkpoint.hf_config import model_config
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor
from owl2.quant.models.mplug_owl2.vision import Embeddings
from owl2.runtime.config import VisionConfig

Array = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def owl21() -> tuple[VisionModel, VisualAbstractor, Arrays]:
    """Vision parts of golden case a4, which has no CLS token, an exact GELU and a 16x16 table of positions.

    tests/golden/a4_owl21_qwen holds these parts of the recorded case a4: its config.json unchanged, the tensors
    named transformer.vision_model.* and transformer.visual_abstractor.* of its model.safetensors, and three arrays
    of its qwen21.npz. Its decoder is a different model.
    """
    folder = GOLDEN / "a4_owl21_qwen"
    visual = json.loads((folder / "model" / "config.json").read_text())["visual_config"]
    foreign = {"model_type": "mplug_owl2", "visual_config": visual, "hidden_size": 64, "num_attention_heads": 4}
    config = model_config(foreign, {"size": 56, "crop_size": 56}, {})
    tower, abstractor = VisionModel(config.vision), VisualAbstractor(config.abstractor, decoder_width=64)
    tensors = load_file(folder / "model" / "vision.safetensors")
    for part, prefix in ((tower, "transformer.vision_model."), (abstractor, "transformer.visual_abstractor.")):
        part.requires_grad_(False).load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
    return tower, abstractor, dict(np.load(folder / "vision.npz"))


def test_tower_and_abstractor_without_cls_token(owl21: tuple[VisionModel, VisualAbstractor, Arrays]) -> None:
    tower, abstractor, recorded_arrays = owl21
    assert not hasattr(tower.embeddings, "cls_token")
    rows = tower(torch.from_numpy(recorded_arrays["pixel_values"]))
    np.testing.assert_allclose(rows, recorded_arrays["vision_last_hidden"], rtol=0, atol=1e-5)
    tokens = abstractor(torch.from_numpy(recorded_arrays["vision_last_hidden"]))
    np.testing.assert_allclose(tokens, recorded_arrays["image_tokens"], rtol=0, atol=1e-5)


def cubic(distance: float) -> float:
    """The cubic convolution kernel (Keys 1981) with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resized(table: Array, grid: int) -> Array:
    """[S, S, C] -> [grid, grid, C]: bicubic, half-pixel centres, edges repeated, no smoothing when shrinking."""
    side = len(table)
    weights = np.zeros((grid, side))
    for target in range(grid):
        centre = (target + 0.5) * side / grid - 0.5
        for source in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[target, min(max(source, 0), side - 1)] += cubic(centre - source)
    return np.asarray(np.einsum("ts,sac,ua->tuc", weights, table, weights))


@pytest.mark.parametrize("grid", [1, 5, 15, 16, 17, 32])
def test_position_table_is_resized_to_the_grid(grid: int) -> None:
    config = VisionConfig(hidden_size=8, num_attention_heads=1, image_size=2 * grid, patch_size=2, use_cls_token=False)
    embeddings = Embeddings(config).requires_grad_(False)
    table = np.random.default_rng(0).normal(size=(16, 16, 8)).astype(np.float32)
    embeddings.position_embedding.copy_(torch.from_numpy(table.reshape(256, 8)))
    expected = resized(table.astype(np.float64), grid).reshape(1, grid**2, 8)
    np.testing.assert_allclose(embeddings.positions(), expected, rtol=0, atol=1e-5)
