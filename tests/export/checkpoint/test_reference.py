"""A checkpoint as a backend of the runtime: the logits are those of the torch model."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.reference import TorchEngine, open_checkpoint
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.errors import BackendError
from owl2.runtime.generate import prompt_logits


def test_is_the_torch_model(golden: Path) -> None:
    """Blocks, cached steps and a reused prefix lead to the logits of one run of the whole model."""
    folder = golden / "a1_base_bin" / "model"
    model = open_checkpoint(folder)
    text = "USER: <|image|>What is it? ASSISTANT: It is</s>"
    images = model.prepare(golden / "images" / "00_rgb_landscape_97x61.png")
    prompt, cache = model.encode(text, images), model.new_cache()
    with Checkpoint(folder) as checkpoint:
        whole = Owl2Model(checkpoint.config)
        checkpoint.load_into(whole, "")
    ids = torch.tensor([model.tokenizer.encode_prompt(text)])
    with torch.no_grad():
        expected = reference.logits(whole, ids, torch.from_numpy(images[0].pixels)[None])[0].numpy()
    logits = np.concatenate([logits for _, logits in prompt_logits(model, cache, prompt)])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    ((start, again),) = prompt_logits(model, cache, prompt, 20)  # from the cache
    assert start == 20
    np.testing.assert_allclose(again, expected[20:], atol=1e-5)


def test_layers_may_stay_on_disk(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owl2.export.checkpoint.reference.RESIDENT_SHARE", 0.0)
    folder = golden / "a1_base_bin" / "model"
    with Checkpoint(folder) as checkpoint:
        engine = TorchEngine(checkpoint)
        embeds = np.random.default_rng(0).normal(size=(5, checkpoint.config.decoder.hidden_size)).astype(np.float32)
        modality, rows = np.array([0, 1, 1, 0, 0]), np.arange(5)
        logits = engine.prefill(embeds, modality, 0, engine.allocate(5, None), rows)
        monkeypatch.undo()
        resident = TorchEngine(checkpoint)
        expected = resident.prefill(embeds, modality, 0, resident.allocate(5, None), rows)
        np.testing.assert_array_equal(logits, expected)
        with pytest.raises(BackendError, match="belong to another backend"):
            engine.prefill(embeds, modality, 0, object(), rows)  # type: ignore[arg-type]
