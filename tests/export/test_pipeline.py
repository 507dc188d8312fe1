"""Exporting: every weight type and every variation of the architecture passes its own checks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import MakeCheckpoint
from folders import names
from safetensors.torch import load_file, save_file

from owl2 import Owl2
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.job.job import open_job
from owl2.export.job.progress import Silent
from owl2.export.pipeline import export_bundle
from owl2.quant.config import Method
from owl2.quant.layer import LINEARS
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import CalibrationError, CheckpointError, ConfigError, ExportError
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.preprocess import load_image, preprocess
from owl2.runtime.spec import VisionType, WeightType

pytestmark = pytest.mark.slow


class TestWeights:
    @pytest.mark.parametrize(
        ("weights", "vision", "method"),
        [
            ("int4", None, "gptq"),
            ("int4", "fp16", "rtn"),
            ("int8", "fp32", "gptq"),
            ("fp16", None, "gptq"),
            ("fp32", "int8", "gptq"),
        ],
    )
    def test_every_type_is_written_and_checked(
        self, a1: Path, tmp_path: Path, photos: Path, weights: WeightType, vision: VisionType | None, method: Method
    ) -> None:
        target = tmp_path / "bundle"
        config = ExportConfig(
            a1, target, weights=weights, vision=vision, method=method, calibration=photos, group_size=32
        )
        report = export_bundle(config)
        manifest = Bundle.open(target).manifest
        assert manifest.weights.decoder == weights
        assert manifest.weights.vision == config.types.vision
        assert manifest.weights.head == ("int8" if config.quant else weights)
        assert manifest.weights.method == (method if config.quant else "none")
        assert json.loads((target / "report.json").read_text())["parity"][1]["exact"] < 1e-4
        assert [parity.graph for parity in report.parity] == ["vision.onnx", "decoder.onnx"]
        quantized = config.quant is not None and method == "gptq"
        expected = {f"layers.{i}.{name}" for i in range(3) for name in LINEARS} if quantized else set()
        assert set(report.modules) == expected
        assert all(module.error < module.rtn_error for module in report.modules.values())
        size = sum(path.stat().st_size for path in target.iterdir())
        # Page alignment of the weights and the graphs themselves are small only next to real weights.
        with open_job(replace(config, overwrite=True), Silent()) as job:
            assert 0.3 * size < job.size < size

    def test_fewer_bits_lose_more(self, a1: Path, tmp_path: Path, photos: Path) -> None:
        kls = []
        order: tuple[WeightType, ...] = ("fp32", "fp16", "int8", "int4")
        for weights in order:
            config = ExportConfig(a1, tmp_path / weights, weights=weights, vision="fp32", calibration=photos)
            kls.append(export_bundle(config).accuracy.kl_text)
        assert kls == sorted(kls)
        assert kls[0] < 1e-9
        assert kls[-1] > 1e-3

    def test_gptq_beats_rounding_on_the_sample_model(
        self, sample_checkpoint: Path, sample_bundle: Path, tmp_path: Path
    ) -> None:
        config = ExportConfig(sample_checkpoint, tmp_path / "rounded", method="rtn")
        rounded = export_bundle(config).accuracy
        kept = json.loads((sample_bundle / "report.json").read_text())["accuracy"]
        assert kept["kl_text"] < 0.7 * rounded.kl_text
        assert kept["mean_abs_logit_difference"] < rounded.mean_abs_logit_difference

    def test_the_same_export_gives_the_same_graphs(self, a1: Path, tmp_path: Path, photos: Path) -> None:
        for name in ("one", "two"):
            export_bundle(ExportConfig(a1, tmp_path / name, calibration=photos))
        files = [Bundle.open(tmp_path / name).manifest.files for name in ("one", "two")]
        different = {name for name in files[0] if files[0][name] != files[1][name]}
        assert different <= {"report.json"}  # it holds seconds and memory


VARIATIONS: dict[str, dict[str, Any]] = {
    "no_cls_token": {
        "vision": {"use_cls_token": False, "use_post_layernorm": False},
        "abstractor": {"use_cls_token": False},
    },
    "no_cls_token_free_grid": {
        "vision": {"use_cls_token": False, "image_size": 16 * 14},
        "abstractor": {"use_cls_token": False, "grid_size": 16},
        "crop_size": 16 * 14,
    },
    "no_post_norm": {"vision": {"use_post_layernorm": False}},
    "gelu": {"vision": {"hidden_act": "gelu"}},
    "attention_bias": {"top": {"attention_bias": True}},
    "linear_rope": {"top": {"rope_scaling": {"type": "linear", "factor": 2.5}}},
    "dynamic_rope": {"top": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24}},
    "rope_theta": {"top": {"rope_theta": 500.0}},
    "tied_head": {"top": {"tie_word_embeddings": True}},
    "narrow_heads": {"top": {"num_attention_heads": 16, "num_key_value_heads": 16}},
    "heads_of_no_power_of_two": {
        "top": {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 100}
    },
    "epsilons": {
        "top": {"rms_norm_eps": 0.01},
        "vision": {"layer_norm_eps": 0.02},
        "abstractor": {"layer_norm_eps": 0.03},
    },
}


@pytest.mark.parametrize("name", list(VARIATIONS))
def test_variations_of_the_architecture(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, golden: Path, name: str
) -> None:
    """The whole runtime against the whole torch model, for a random checkpoint of each variation."""
    folder, target = make_checkpoint(**VARIATIONS[name]), tmp_path / "bundle"
    export_bundle(ExportConfig(folder, target, weights="fp32"))
    with Checkpoint(folder) as checkpoint:
        model = Owl2Model(checkpoint.config)
        checkpoint.load_into(model, "")
        config = checkpoint.config
    prompt, path = (
        "USER: <|image|>What is it, and what does it mean? ASSISTANT: It is",
        golden / "images" / "00_rgb_landscape_97x61.png",
    )
    context = 64 if name == "dynamic_rope" else None
    owl = Owl2.load(target, context=context)
    made = owl.logits(prompt, images=path)
    ids = torch.tensor([Tokenizer.load(target).encode_prompt(prompt)])
    pixels = torch.from_numpy(preprocess(load_image(path), config.preprocess))[None]
    with torch.no_grad():
        expected = reference.logits(model, ids, pixels)[0].numpy()
    assert name != "dynamic_rope" or len(expected) > config.decoder.max_position_embeddings
    np.testing.assert_allclose(made, expected, atol=1e-3, rtol=0)


def test_calibration_without_images(a1: Path, tmp_path: Path) -> None:
    talks = tmp_path / "talks.jsonl"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    talks.write_text(json.dumps({"conversations": turns}))
    with pytest.raises(CalibrationError, match=r"none of its 1 samples has an image.*image rows"):
        export_bundle(ExportConfig(a1, tmp_path / "bundle", calibration=talks))
    assert names(tmp_path) == ["talks.jsonl"]


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def rewritten(folder: Path, **tensors: torch.Tensor) -> Path:
    """The checkpoint with some tensors replaced or added; "__" stands for a dot in their names."""
    weights = load_file(folder / "model.safetensors")
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(weights | new, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class TestFloat16:
    @pytest.mark.parametrize(("row", "eps"), [(torch.full((64,), 1e6), 1e-5), (torch.full((64,), 1e-9), 1e-20)])
    def test_a_token_table_beyond_float16_is_stored_as_fp32(
        self, make_checkpoint: MakeCheckpoint, tmp_path: Path, row: torch.Tensor, eps: float
    ) -> None:
        folder, reporter = make_checkpoint({"rms_norm_eps": eps}), Notes()
        table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        table[799] = row
        rewritten(folder, model__embed_tokens__weight=table)
        export_bundle(ExportConfig(folder, tmp_path / "bundle", method="rtn"), reporter)
        assert reporter.notes == ["the token table holds values that float16 does not, and is stored as fp32"]
        bundle = Bundle.open(tmp_path / "bundle")
        assert bundle.manifest.weights.embeddings == "fp32"
        assert np.array_equal(bundle.token_table().rows(range(800)), table.numpy())
        with pytest.raises(ConfigError, match="holds values that float16 does not; export with --activations fp32"):
            export_bundle(ExportConfig(folder, tmp_path / "half", method="rtn", activations="fp16"))

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("model.layers.1.mlp.up_proj.weight", {"weights": "fp16"}),
            ("lm_head.weight", {"weights": "fp16"}),
            ("model.norm.weight", {"method": "rtn", "activations": "fp16"}),
            ("model.vision_model.encoder.layers.0.mlp.fc1.weight", {"method": "rtn", "vision": "fp16"}),
            ("model.visual_abstractor.vit_eos", {"method": "rtn", "activations": "fp16"}),
        ],
    )
    def test_other_weights_beyond_float16_are_refused(
        self, make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str, settings: dict[str, Any]
    ) -> None:
        folder = make_checkpoint()
        tensor = load_file(folder / "model.safetensors")[name]
        tensor.view(-1)[3] = -70000.0
        rewritten(folder, **{name: tensor})
        with pytest.raises(
            ExportError, match=r"holds values up to 7e\+04, and fp16, in which it would be stored, ends"
        ):
            export_bundle(ExportConfig(folder, tmp_path / "bundle", **settings))


def test_a_tied_head_must_not_hold_other_values(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Which of the two counts differs between versions of transformers."""
    folder = make_checkpoint({"tie_word_embeddings": True})
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewritten(folder, lm_head__weight=table + 1)
    with pytest.raises(CheckpointError, match="tie_word_embeddings makes the token table the head, but lm_head"):
        export_bundle(ExportConfig(folder, tmp_path / "bundle", method="rtn"))
    rewritten(folder, lm_head__weight=table.clone())
    export_bundle(ExportConfig(folder, tmp_path / "bundle", method="rtn"))


def test_added_tokens_and_end_tokens_reach_the_runtime(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint({"vocab_size": 803})
    (folder / "added_tokens.json").write_text(json.dumps({"<box>": 800, "<end>": 801}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 801]}))
    export_bundle(ExportConfig(folder, tmp_path / "bundle", weights="fp32"))
    owl = Owl2.load(tmp_path / "bundle")
    assert owl.config.decoder.eos_token_ids == (2, 801)
    assert not (tmp_path / "bundle" / "added_tokens.json").exists()
    tokenizer = Tokenizer.load(tmp_path / "bundle")
    assert tokenizer.encode("<box> a <end>") == [800, *Tokenizer.load(folder).encode("a"), 801]
