"""The torch model computes what the original recorded, from the prompt's text and the image's file on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from numpy.typing import NDArray
from torch import Tensor

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.quant.models.mplug_owl2 import Owl2Model, VisionModel
from owl2.runtime.config import IMAGE_TOKEN_ID, PreprocessConfig
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.preprocess import AS_ORIGINAL, load_image, preprocess

CASES = ["a1_base_bin", "a2_fp16_safetensors"]
ATOL = 1e-4  # the logits' standard deviation is about 2.7

Arrays = dict[str, NDArray[Any]]


class Original:
    """One golden case: its checkpoint in the model under test, its prompts and images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with Checkpoint(folder / "model") as checkpoint:
            self.config = checkpoint.config
            self.model = Owl2Model(self.config).requires_grad_(False)
            checkpoint.load_into(self.model, "")
        self.tokenizer = Tokenizer.load(folder / "model")
        self.files = self.json("checks")["images"]
        self.forward_index = {entry["name"]: entry for entry in self.json("forward_index")}
        self.arrays = cache(lambda file: ARRAYS[file](self))

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def prompt_ids(self, name: str) -> Tensor:
        """Ids of the prompt of a group in forward.npz."""
        prompt_id = self.forward_index[name]["prompt_id"]
        prompt = next(entry["prompt"] for entry in self.json("prompts") if entry["id"] == prompt_id)
        return torch.tensor(self.tokenizer.encode_prompt(prompt))

    def image_indices(self, name: str) -> list[int]:
        return [self.files.index(image) for image in self.forward_index[name]["images"]]

    @cached_property
    def pixels(self) -> dict[str, Tensor]:
        images = [load_image(self.folder.parent / "images" / name, AS_ORIGINAL) for name in self.files]
        return {
            mode: torch.from_numpy(np.stack([preprocess(image, self.config.preprocess, mode) for image in images]))
            for mode in ("resize", "pad", "crop")
        }

    @cached_property
    def blocks(self) -> dict[str, list[Tensor]]:
        """Decoder rows of every image."""
        return {mode: list(self.model.encode_images(pixels)) for mode, pixels in self.pixels.items()}

    def merged(self, name: str) -> reference.Merged:
        blocks = [self.blocks["resize"][index] for index in self.image_indices(name)]
        return reference.merge(self.model, self.prompt_ids(name)[None], blocks)

    def logits(self, merged: reference.Merged) -> Tensor:
        return self.model.head(self.model.decode(merged.embeds, merged.modality)[0])


def as_bytes(pixels: Tensor, config: PreprocessConfig) -> NDArray[np.uint8]:
    """Undo the normalisation."""
    mean, std = np.array(config.mean)[:, None, None], np.array(config.std)[:, None, None]
    values: NDArray[np.uint8] = np.rint((pixels.numpy() * std + mean) * 255).astype(np.uint8)
    return values


def vision_arrays(original: Original) -> Arrays:
    tower, abstractor = original.model.model.vision_model, original.model.model.visual_abstractor
    arrays: Arrays = {}
    for mode, pixels in original.pixels.items():
        arrays[f"pixel_values_{mode}"] = pixels.numpy()
        arrays[f"uint8_{mode}"] = as_bytes(pixels, original.config.preprocess)
    for mode in ("resize", "pad"):
        arrays[f"vision_last_hidden_{mode}"] = tower(original.pixels[mode]).numpy()
        arrays[f"image_tokens_{mode}"] = original.model.encode_images(original.pixels[mode]).numpy()
    first = original.pixels["resize"][:1]
    arrays["vision_hidden_states_image0"] = torch.cat(tower.hidden_states(first)).numpy()
    arrays["abstractor_hidden_states_image0"] = torch.cat(abstractor.hidden_states(tower(first))).numpy()
    return arrays


def forward_arrays(original: Original) -> Arrays:
    model = original.model
    arrays: Arrays = {}
    for name in original.forward_index:
        merged = original.merged(name)
        arrays[f"{name}/input_ids"] = original.prompt_ids(name).numpy()
        arrays[f"{name}/image_index"] = np.array(original.image_indices(name), np.int64)
        arrays[f"{name}/modality_indicators"] = merged.modality[0].numpy()
        arrays[f"{name}/logits"] = original.logits(merged)[0].numpy()
    merged, after_layer = original.merged("image"), list[Tensor]()
    hooks = [layer.register_forward_hook(lambda _, __, out: after_layer.append(out[0])) for layer in model.model.layers]
    normed, keys_values = model.decode(merged.embeds, merged.modality)
    for hook in hooks:
        hook.remove()
    arrays["image/inputs_embeds"] = merged.embeds[0].numpy()
    arrays["image/hidden_states"] = torch.stack([merged.embeds[0], *after_layer[:-1], normed[0]]).numpy()
    arrays["image/last_layer_output_before_norm"] = after_layer[-1].numpy()
    for which, (key, value) in (("first", keys_values[0]), ("last", keys_values[-1])):
        arrays[f"image/past_key_{which}"] = key[0].numpy()
        arrays[f"image/past_value_{which}"] = value[0].numpy()
    return arrays


def decode_arrays(original: Original, steps: int = 16) -> Arrays:
    model = original.model
    arrays: Arrays = {}
    for name in ("text", "image", "two_images"):
        merged = original.merged(name)
        hidden, past = model.decode(merged.embeds, merged.modality)
        step_logits = [model.head(hidden[0, -1])]
        while len(step_logits) < steps:
            last = step_logits[-1].argmax()[None, None]
            hidden, past = model.decode(model.embed(last), torch.zeros_like(last), past)
            step_logits.append(model.head(hidden[0, -1]))
        arrays[f"{name}/input_ids"] = original.prompt_ids(name).numpy()
        arrays[f"{name}/image_index"] = np.array(original.image_indices(name), np.int64)
        arrays[f"{name}/new_ids"] = torch.stack(step_logits).argmax(1).numpy()
        arrays[f"{name}/step_logits"] = torch.stack(step_logits).numpy()
    return arrays


def batch_arrays(original: Original) -> Arrays:
    arrays: Arrays = {}
    # The image that a row without a placeholder uses up is chosen at will.
    groups: dict[str, tuple[tuple[str, ...], list[int]]] = {
        "equal": (("multi_turn_image", "image"), []),
        "ragged": (("two_images", "image"), []),
        "text_and_image": (("text", "image"), [6]),
    }
    for group, (names, used_up) in groups.items():
        rows = [original.prompt_ids(name) for name in names]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        given = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        indices = used_up + [index for name in names for index in original.image_indices(name)]
        blocks = [original.blocks["resize"][index] for index in indices]
        labels = torch.where(given & (ids != IMAGE_TOKEN_ID), ids, -100)
        merged = reference.merge(original.model, ids, blocks, labels, given)
        last = merged.mask.sum(1) - 1
        arrays[f"{group}/input_ids"] = ids.numpy()
        arrays[f"{group}/image_index"] = np.array(indices)
        arrays[f"{group}/merged_real_length"] = last.numpy() + 1
        unmasked = original.logits(reference.merge(original.model, ids, blocks))
        arrays[f"{group}/logits_nomask_last"] = unmasked[[0, 1], last].numpy()
        if group == "text_and_image":
            continue
        logits = original.logits(merged)
        arrays[f"{group}/attention_mask_in"] = given.long().numpy()
        arrays[f"{group}/labels_in"] = labels.numpy()
        arrays[f"{group}/modality_indicators"] = merged.modality.numpy()
        arrays[f"{group}/attention_mask_out"] = merged.mask.long().numpy()
        arrays[f"{group}/labels_out"] = merged.labels.numpy()
        arrays[f"{group}/logits_mask_last"] = logits[[0, 1], last].numpy()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), merged.labels[:, 1:].flatten(), ignore_index=-100)
        arrays[f"{group}/loss"] = loss[None].numpy()
        if group == "ragged":
            arrays["ragged/logits_mask"] = logits.numpy()
    return arrays


def qalign_arrays(original: Original) -> Arrays:
    words = [original.tokenizer.encode_prompt(word)[1] for word in ("excellent", "good", "fair", "poor", "bad")]
    index = original.json("qalign")
    arrays: Arrays = {}
    for task, entry in index["tasks"].items():
        blocks = original.blocks["pad"]
        if "frames" in entry:
            frames = [original.files.index(name) for name in entry["frames"]]
            arrays[f"{task}/frame_index"] = np.array(frames)
            blocks = [torch.cat([blocks[frame] for frame in frames])]
        ids = torch.tensor([original.tokenizer.encode_prompt(entry["prompt"])] * len(blocks))
        last = original.logits(reference.merge(original.model, ids, blocks))[:, -1]
        probs = last[:, words].softmax(1)
        arrays[f"{task}/last_logits"] = last.numpy()
        arrays[f"{task}/five_logits"] = last[:, words].numpy()
        arrays[f"{task}/probs"] = probs.numpy()
        arrays[f"{task}/score_0_1"] = (probs @ torch.tensor([1, 0.75, 0.5, 0.25, 0])).numpy()
        arrays[f"{task}/score_1_5"] = (probs @ torch.tensor([5.0, 4, 3, 2, 1])).numpy()
    return arrays


ARRAYS: dict[str, Callable[[Original], Arrays]] = {
    "vision": vision_arrays,
    "forward": forward_arrays,
    "decode": decode_arrays,
    "batch": batch_arrays,
    "qalign": qalign_arrays,
}


def recorded(case: str, file: str) -> Mapping[str, NDArray[Any]]:
    arrays: Mapping[str, NDArray[Any]] = np.load(GOLDEN / case / f"{file}.npz")
    return arrays


@pytest.fixture(scope="module", params=CASES)
def original(request: pytest.FixtureRequest) -> Original:
    return Original(GOLDEN / request.param)


@pytest.mark.parametrize(("file", "name"), [(file, name) for file in ARRAYS for name in recorded(CASES[0], file)])
def test_array_equals_the_originals(original: Original, file: str, name: str) -> None:
    expected = recorded(original.folder.name, file)[name]
    computed = original.arrays(file)[name]
    assert computed.dtype == expected.dtype
    assert computed.shape == expected.shape
    if name == "ragged/logits_mask":
        # The original's numbers at padding depend on its attention mask and serve nobody.
        real = recorded(original.folder.name, file)["ragged/attention_mask_out"] == 1
        np.testing.assert_allclose(computed[real], expected[real], rtol=0, atol=ATOL)
    elif expected.dtype == np.float32 and not name.startswith("pixel_values"):
        np.testing.assert_allclose(computed, expected, rtol=0, atol=ATOL)
    else:
        np.testing.assert_array_equal(computed, expected)


def test_no_recorded_array_is_forgotten(original: Original) -> None:
    # vision_unconverted_modes.npz is about images that are not converted to RGB first; here they always are.
    files = {path.stem for path in original.folder.glob("*.npz")}
    assert files - {"vision_unconverted_modes"} == set(ARRAYS)
    for file in ARRAYS:
        assert set(original.arrays(file)) == set(recorded(original.folder.name, file))


@pytest.mark.parametrize("cut", [1, 7, 11, 30])
def test_continuing_from_a_cache_equals_one_pass(original: Original, cut: int) -> None:
    merged = original.merged("two_images")
    whole, keys_values = original.model.decode(merged.embeds, merged.modality)
    first, past = original.model.decode(merged.embeds[:, :cut], merged.modality[:, :cut])
    second, joined = original.model.decode(merged.embeds[:, cut:], merged.modality[:, cut:], past)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=ATOL)
    for ours, expected in zip(joined, keys_values):
        torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["text", "image", "two_images"])
def test_cached_steps_equal_a_full_pass(original: Original, name: str) -> None:
    steps = recorded(original.folder.name, "decode")[f"{name}/step_logits"]
    new_ids = torch.from_numpy(recorded(original.folder.name, "decode")[f"{name}/new_ids"])
    ids, images = torch.cat([original.prompt_ids(name), new_ids])[None], original.image_indices(name)
    pixels = original.pixels["resize"][images] if images else None
    logits = reference.logits(original.model, ids, pixels)[0]
    np.testing.assert_allclose(logits[-len(steps) - 1 : -1], steps, rtol=0, atol=ATOL)


def test_tower_without_post_norm(original: Original) -> None:
    tower = VisionModel(replace(original.config.vision, use_post_layernorm=False))
    state = original.model.model.vision_model.state_dict()
    tower.load_state_dict({name: value for name, value in state.items() if not name.startswith("post_layernorm")})
    rows = tower(original.pixels["resize"][:1])[0].detach()
    expected = recorded(original.folder.name, "vision")["vision_hidden_states_image0"][-1]
    np.testing.assert_allclose(rows, expected, rtol=0, atol=ATOL)
