"""LoRA adapters, written by PEFT itself and compared with what PEFT makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, edit_json
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from owl2 import Owl2
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.naming import OPTIONAL_SUFFIXES
from owl2.export.config import ExportConfig
from owl2.export.gptq_checkpoint import export_gptq
from owl2.export.pipeline import export_bundle
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
VALUE_PROJECTIONS = r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj\.multiway\.[01])"
Trained = tuple[Path, dict[str, Tensor]]
Train = Callable[..., Trained]


@pytest.fixture
def base(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(top={"num_hidden_layers": 2})


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Train:
    """Save an adapter with numbers in all its tensors; its folder, and the tensors that PEFT merges."""

    def trained(dtype: torch.dtype = torch.float32, **settings: Any) -> Trained:
        with Checkpoint(base) as checkpoint:
            model = Owl2Model(checkpoint.config)
            checkpoint.load_into(model, "")
        adapted = get_peft_model(model, LoraConfig(**settings))
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random).to(dtype))
        folder = tmp_path / "adapter"
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        if dtype != torch.float32:
            halves = {name: value.to(dtype) for name, value in load_file(folder / WEIGHTS).items()}
            save_file(halves, folder / WEIGHTS)
        merged = adapted.merge_and_unload().state_dict()
        return folder, {name: value.clone() for name, value in merged.items()}

    return trained


def changed(base: Path, folder: Path, merged: dict[str, Tensor]) -> list[str]:
    """Check that reading with the adapter gives what PEFT merged; names of what differs from the base."""
    names = []
    with Checkpoint(base) as plain, Checkpoint(base, adapter=folder) as checkpoint:
        for name, value in merged.items():
            torch.testing.assert_close(checkpoint.tensor(name), value, rtol=1e-5, atol=1e-5, msg=name)
            if not torch.equal(plain.tensor(name), checkpoint.tensor(name)):
                names.append(name)
    return names


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_matrices_get_what_peft_adds(base: Path, train: Train, rank_stabilised: bool) -> None:
    folder, merged = train(target_modules=VALUE_PROJECTIONS, r=4, lora_alpha=24, use_rslora=rank_stabilised)
    assert len(changed(base, folder, merged)) == 2 * 3
    with Checkpoint(base, adapter=folder) as checkpoint:
        assert checkpoint.notes[-1] == "merged with the LoRA adapter: 6 matrices get what it adds (rank 4)"


def test_patterns_give_some_modules_another_rank_and_scale(base: Path, train: Train) -> None:
    folder, merged = train(
        target_modules=["gate_proj", "down_proj", "query_key_value", "w1"],
        r=4,
        lora_alpha=8,
        rank_pattern={"down_proj": 7, r"layers.1.mlp.gate_proj": 2},
        alpha_pattern={r"model.layers.0.mlp.gate_proj": 100, "w1": 3},
    )
    assert len(changed(base, folder, merged)) >= 7


def test_modules_saved_whole_take_the_base_s_place(base: Path, train: Train) -> None:
    folder, merged = train(
        target_modules=VALUE_PROJECTIONS,
        modules_to_save=["visual_abstractor", "lm_head", "model.norm"],
        bias="all",
        r=2,
    )
    names = changed(base, folder, merged)
    assert "lm_head.weight" in names
    assert "model.norm.weight" in names
    assert sum(name.startswith("model.visual_abstractor.") for name in names) > 20
    assert any(name.startswith("model.vision_model.") and name.endswith(".bias") for name in names)


def test_token_tables_have_factors_of_their_own(base: Path, train: Train) -> None:
    folder, merged = train(target_modules=["embed_tokens", "lm_head"], r=3, lora_alpha=9)
    assert set(changed(base, folder, merged)) == {"model.embed_tokens.weight", "lm_head.weight"}
    # PEFT saves the table too where it knows the model.
    with Checkpoint(base) as checkpoint:
        table = {
            "base_model.model.model.embed_tokens.base_layer.weight": checkpoint.tensor("model.embed_tokens.weight")
        }
    save_file(load_file(folder / WEIGHTS) | table, folder / WEIGHTS)
    assert set(changed(base, folder, merged)) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_factors_in_half_precision(base: Path, train: Train) -> None:
    """Products are computed, and kept, in float32; PEFT does the same where the base is float32."""
    folder, merged = train(dtype=torch.float16, target_modules=VALUE_PROJECTIONS, r=4)
    assert len(changed(base, folder, merged)) == 6


def test_what_was_trained_beside_it_is_read(base: Path, train: Train) -> None:
    """The training programs of LLaVA and mPLUG-Owl2 keep the rest in a file of their own."""
    folder, merged = train(target_modules=VALUE_PROJECTIONS, r=2)
    name = "model.visual_abstractor.visual_fc.weight"
    merged[name] = torch.randn(merged[name].shape)
    torch.save({f"base_model.model.{name}": merged[name].half()}, folder / "non_lora_trainables.bin")
    merged[name] = merged[name].half().float()
    assert name in changed(base, folder, merged)


def test_names_of_the_inner_model_and_an_older_layout(base: Path, train: Train) -> None:
    folder, merged = train(target_modules=VALUE_PROJECTIONS, modules_to_save=["model.norm"], r=2)
    tensors = {
        name.replace(".model.model.", ".model.").replace("norm.", "norm.modules_to_save.default."): value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert len(changed(base, folder, merged)) == 7


def test_patterns_are_of_the_adapter_s_own_names(base: Path, tmp_path: Path) -> None:
    """One of the inner model has no ``model.`` in front, which a pattern may ask for."""
    with Checkpoint(base) as checkpoint:
        model = Owl2Model(checkpoint.config)
        checkpoint.load_into(model, "")
    patterns = {"^layers.0.self_attn.q_proj": 100}
    inner = get_peft_model(model.model, LoraConfig(target_modules=["q_proj"], r=2, alpha_pattern=patterns))
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    inner.save_pretrained(str(tmp_path / "inner"), save_embedding_layers=False)
    merged = {f"model.{name}": value.clone() for name, value in inner.merge_and_unload().state_dict().items()}
    assert len(changed(base, tmp_path / "inner", merged)) == 2


def test_the_adapter_goes_before_what_was_saved_beside_it(base: Path, train: Train) -> None:
    folder, merged = train(target_modules=VALUE_PROJECTIONS, modules_to_save=["model.norm"], r=2)
    others = {"base_model.model.model.norm.weight": torch.full((64,), 5.0)}
    torch.save(others, folder / "non_lora_trainables.bin")
    assert "model.norm.weight" in changed(base, folder, merged)


def test_a_base_without_its_tables_of_positions(base: Path, train: Train) -> None:
    """They follow from config.json; an adapter with the whole abstractor has them."""
    folder, merged = train(target_modules=VALUE_PROJECTIONS, modules_to_save=["visual_abstractor"], r=2)
    weights = load_file(base / "model.safetensors")
    tables = {name for name in weights if name.endswith(OPTIONAL_SUFFIXES)}
    assert tables
    save_file({n: v for n, v in weights.items() if n not in tables}, base / "model.safetensors", {"format": "pt"})
    adapter = load_file(folder / WEIGHTS) | {f"base_model.model.{name}": weights[name] for name in tables}
    save_file(adapter, folder / WEIGHTS)
    changed(base, folder, {name: value for name, value in merged.items() if name not in tables})


class TestRefusals:
    @pytest.fixture
    def adapter(self, train: Train) -> Path:
        return train(target_modules=VALUE_PROJECTIONS, r=2)[0]

    def refusal(self, base: Path, adapter: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(base, adapter=adapter)
        return str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"peft_type": "IA3"}, "is an adapter of kind 'IA3'; only LORA"),
            ({"use_dora": True}, "sets use_dora, which cannot be merged here; merge it with PEFT"),
            ({"init_lora_weights": "pissa_niter_4"}, "sets init_lora_weights 'pissa_niter_4'"),
            ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
            ({"an_invention_of_next_year": {"x": 1}}, "sets an_invention_of_next_year"),
            ({"r": 3}, "of rank 3 do not fit"),
            ({"r": 0}, "is 0, expected 1 or more"),
            ({"r": "2"}, "is '2', not a number"),
            ({"lora_alpha": None}, "is None, not a number"),
            ({"rank_pattern": {"(": 2}}, "'(' is not a pattern"),
            ({"alpha_pattern": [1]}, "alpha_pattern must map patterns to numbers"),
        ],
    )
    def test_settings(self, base: Path, adapter: Path, settings: dict[str, Any], said: str) -> None:
        edit_json(adapter / "adapter_config.json", **settings)
        assert said in self.refusal(base, adapter)

    def test_missing_files(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        assert "is not a LoRA adapter: adapter_config.json is missing" in self.refusal(base, tmp_path)
        (adapter / WEIGHTS).unlink()
        assert "adapter_model.safetensors or adapter_model.bin) are missing" in self.refusal(base, adapter)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda t: t | {"base_model.model.other.weight": torch.ones(1)}, "does not: base_model.model.other.weight"),
            (lambda t: dict(list(t.items())[1:]), "(one factor of two)"),
            (lambda t: {}, "the adapter is empty"),
            (lambda t: {name: value[:, :1] for name, value in t.items()}, "do not fit its [64, 64]"),
            (lambda t: {name: value.flatten() for name, value in t.items()}, "do not fit its [64, 64]"),
            (
                lambda t: (
                    t
                    | {"base_model.model.model.norm.weight": torch.ones(64)}
                    | {"base_model.model.model.norm.modules_to_save.weight": torch.zeros(64)}
                ),
                "would both be model.norm.weight",
            ),
            (
                lambda t: t | {"base_model.model.model.norm.weight": torch.ones(5)},
                "model.norm.weight is [5], in the base [64]",
            ),
        ],
    )
    def test_tensors(
        self, base: Path, adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
    ) -> None:
        save_file({n: v.contiguous() for n, v in change(load_file(adapter / WEIGHTS)).items()}, adapter / WEIGHTS)
        assert said in self.refusal(base, adapter)

    def test_numbers_that_are_none(self, base: Path, adapter: Path) -> None:
        tensors = {name: value / 0 for name, value in load_file(adapter / WEIGHTS).items()}
        save_file(tensors, adapter / WEIGHTS)
        with (
            Checkpoint(base, adapter=adapter) as checkpoint,
            pytest.raises(CheckpointError, match=r"lora_B\.weight holds NaN or infinite values"),
        ):
            checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")

    def test_a_truncated_file(self, base: Path, adapter: Path) -> None:
        (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-7])
        assert "is truncated or damaged" in self.refusal(base, adapter)

    def test_a_table_that_is_the_head_too(self, make_checkpoint: MakeCheckpoint, base: Path, adapter: Path) -> None:
        table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        shutil.rmtree(base)
        tied = make_checkpoint(top={"num_hidden_layers": 2, "tie_word_embeddings": True})
        extra = {"base_model.model.model.embed_tokens.weight": table}
        save_file(load_file(adapter / WEIGHTS) | extra, adapter / WEIGHTS)
        assert "whether the head was trained with it is not certain" in self.refusal(tied, adapter)

    def test_a_quantized_checkpoint(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        export_gptq(ExportConfig(base, tmp_path / "gptq", method="rtn", layout="gptq", group_size=32))
        assert "an adapter cannot be merged into integers" in self.refusal(tmp_path / "gptq", adapter)


def test_a_bundle_of_both_is_that_of_the_merged_checkpoint(base: Path, train: Train, tmp_path: Path) -> None:
    folder, tensors = train(target_modules=VALUE_PROJECTIONS, modules_to_save=["lm_head"], r=4)
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    save_file({name: value.contiguous() for name, value in tensors.items()}, merged / "model.safetensors")
    logits = list[np.ndarray]()
    for source, lora in ((base, folder), (merged, None), (base, None)):
        target = tmp_path / f"bundle-{len(logits)}"
        report = export_bundle(ExportConfig(source, target, weights="fp32", lora=lora))
        said = report.recipe["source"].get("notes", ())
        assert any("LoRA adapter" in note for note in said) == (lora is not None)
        owl = Owl2.load(target)
        (score,) = owl.score([np.full((8, 8, 3), 9, np.uint8)])
        logits.append(np.array(list(score.logits.values())))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert np.abs(logits[0] - logits[2]).max() > 1e-2


def test_another_adapter_does_not_continue_an_export(base: Path, train: Train) -> None:
    """What decides about the files of a bundle tells adapters apart."""
    from owl2.export.job.job import open_job
    from owl2.export.job.journal import resume_key
    from owl2.export.job.progress import Silent

    folder, _ = train(target_modules=VALUE_PROJECTIONS, r=4)
    keys = []
    for lora in (folder, None):
        with open_job(ExportConfig(base, base.parent / "bundle", lora=lora), Silent()) as job:
            keys.append(resume_key(job))
    assert set(keys[0]) - set(keys[1]) == {f"the adapter's {name}" for name in ("adapter_config.json", WEIGHTS)}
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
