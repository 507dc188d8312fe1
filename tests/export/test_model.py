"""The torch model computes what the original recorded, from the prompt's text and the picture's file on.

Where the recorded models have a feature switched off, slow formulas in this file take their place.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from owl2.export.checkpoint import Checkpoint
from owl2.export.hf_config import model_config
from owl2.export.model import Owl2Model, VisionModel, VisualAbstractor, rotary_tables
from owl2.export.model.vision import Embeddings
from owl2.runtime.config import IMAGE_TOKEN_ID, DecoderConfig, PreprocessConfig, RopeScaling, VisionConfig
from owl2.runtime.image import load_image, preprocess
from owl2.runtime.rope import rotary_angles
from owl2.runtime.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["a1_base_bin", "a2_fp16_safetensors"]
ATOL = 1e-4  # the logits' standard deviation is about 2.7

Arrays = dict[str, np.ndarray]


class Original:
    """One golden case: its checkpoint in the model under test, its prompts and pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with Checkpoint(folder / "model") as checkpoint:
            self.config = checkpoint.config
            self.model = Owl2Model(self.config).requires_grad_(False)
            checkpoint.load_into(self.model, "")
        self.tokenizer = Tokenizer.load(folder / "model")
        self.pictures = self.json("checks")["images"]
        self.forward_index = {entry["name"]: entry for entry in self.json("forward_index")}
        self.arrays = cache(lambda file: ARRAYS[file](self))

    def json(self, name: str):
        return json.loads((self.folder / f"{name}.json").read_text())

    def prompt_ids(self, name: str) -> torch.Tensor:
        """Ids of the prompt of a group in forward.npz."""
        prompt_id = self.forward_index[name]["prompt_id"]
        prompt = next(entry["prompt"] for entry in self.json("prompts") if entry["id"] == prompt_id)
        return torch.tensor(self.tokenizer.encode_prompt(prompt))

    def picture_indices(self, name: str) -> list[int]:
        return [self.pictures.index(picture) for picture in self.forward_index[name]["images"]]

    @cached_property
    def pixels(self) -> dict[str, torch.Tensor]:
        images = [load_image(self.folder.parent / "images" / name) for name in self.pictures]
        return {
            mode: torch.from_numpy(np.stack([preprocess(image, self.config.preprocess, mode) for image in images]))
            for mode in ("resize", "pad", "crop")
        }

    @cached_property
    def blocks(self) -> dict[str, list[torch.Tensor]]:
        """Decoder rows of every picture."""
        return {mode: list(self.model.encode_images(pixels)) for mode, pixels in self.pixels.items()}

    def merged(self, name: str):
        return self.model.merge(self.prompt_ids(name)[None], [self.blocks["resize"][i] for i in self.picture_indices(name)])

    def logits(self, merged) -> torch.Tensor:
        return self.model.head(self.model.decode(merged.embeds, merged.modality))


def as_bytes(pixels: torch.Tensor, config: PreprocessConfig) -> np.ndarray:
    """Undo the normalisation."""
    mean, std = np.array(config.mean)[:, None, None], np.array(config.std)[:, None, None]
    return np.rint((pixels.numpy() * std + mean) * 255).astype(np.uint8)


def vision_arrays(original: Original) -> Arrays:
    tower, abstractor = original.model.model.vision_model, original.model.model.visual_abstractor
    arrays = {}
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
    arrays = {}
    for name in original.forward_index:
        merged = original.merged(name)
        arrays[f"{name}/input_ids"] = original.prompt_ids(name).numpy()
        arrays[f"{name}/image_index"] = np.array(original.picture_indices(name), np.int64)
        arrays[f"{name}/modality_indicators"] = merged.modality[0].numpy()
        arrays[f"{name}/logits"] = original.logits(merged)[0].numpy()
    merged, after_layer = original.merged("image"), []
    hooks = [layer.register_forward_hook(lambda _, __, out: after_layer.append(out[0])) for layer in model.model.layers]
    normed, keys_values = model.decode_cached(merged.embeds, merged.modality, None)
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
    arrays = {}
    for name in ("text", "image", "two_images"):
        merged = original.merged(name)
        hidden, past = model.decode_cached(merged.embeds, merged.modality, None)
        step_logits = [model.head(hidden[0, -1])]
        while len(step_logits) < steps:
            last = step_logits[-1].argmax()[None, None]
            hidden, past = model.decode_cached(model.embed(last), torch.zeros_like(last), past)
            step_logits.append(model.head(hidden[0, -1]))
        arrays[f"{name}/input_ids"] = original.prompt_ids(name).numpy()
        arrays[f"{name}/image_index"] = np.array(original.picture_indices(name), np.int64)
        arrays[f"{name}/new_ids"] = torch.stack(step_logits).argmax(1).numpy()
        arrays[f"{name}/step_logits"] = torch.stack(step_logits).numpy()
    return arrays


def batch_arrays(original: Original) -> Arrays:
    arrays = {}
    # The picture that a row without a placeholder uses up is chosen at will.
    groups = {
        "equal": (("multi_turn_image", "image"), []),
        "ragged": (("two_images", "image"), []),
        "text_and_image": (("text", "image"), [6]),
    }
    for group, (names, used_up) in groups.items():
        rows = [original.prompt_ids(name) for name in names]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        given = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        indices = used_up + [index for name in names for index in original.picture_indices(name)]
        blocks = [original.blocks["resize"][index] for index in indices]
        labels = torch.where(given & (ids != IMAGE_TOKEN_ID), ids, -100)
        merged = original.model.merge(ids, blocks, labels, given)
        last = merged.mask.sum(1) - 1
        arrays[f"{group}/input_ids"] = ids.numpy()
        arrays[f"{group}/image_index"] = np.array(indices)
        arrays[f"{group}/merged_real_length"] = last.numpy() + 1
        unmasked = original.logits(original.model.merge(ids, blocks))
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
            # At padding the original's numbers depend on its mask and serve nobody.
            arrays["ragged/logits_mask"] = torch.where(merged.mask[..., None], logits, torch.nan).numpy()
    return arrays


def qalign_arrays(original: Original) -> Arrays:
    words = [original.tokenizer.encode_prompt(word)[1] for word in ("excellent", "good", "fair", "poor", "bad")]
    index = original.json("qalign")
    arrays = {}
    for task, entry in index["tasks"].items():
        blocks = original.blocks["pad"]
        if "frames" in entry:
            frames = [original.pictures.index(name) for name in entry["frames"]]
            arrays[f"{task}/frame_index"] = np.array(frames)
            blocks = [torch.cat([blocks[frame] for frame in frames])]
        ids = torch.tensor([original.tokenizer.encode_prompt(entry["prompt"])] * len(blocks))
        last = original.logits(original.model.merge(ids, blocks))[:, -1]
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


def recorded(case: str, file: str) -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN / case / f"{file}.npz")


@pytest.fixture(scope="module", params=CASES)
def original(request):
    return Original(GOLDEN / request.param)


@pytest.mark.parametrize(
    ("original", "file", "name"),
    [(case, file, name) for case in CASES for file in ARRAYS for name in recorded(case, file)],
    indirect=["original"],
)
def test_array_equals_the_originals(original, file, name):
    expected = recorded(original.folder.name, file)[name]
    computed = original.arrays(file)[name]
    assert computed.dtype == expected.dtype
    assert computed.shape == expected.shape
    if expected.dtype == np.float32 and not name.startswith("pixel_values"):
        compared = ~np.isnan(computed) if name == "ragged/logits_mask" else np.ones(computed.shape, bool)
        np.testing.assert_allclose(computed[compared], expected[compared], rtol=0, atol=ATOL)
    else:
        np.testing.assert_array_equal(computed, expected)
