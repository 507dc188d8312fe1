"""Checkpoints as people have them: converted where their meaning is certain, else the cause comes first."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import edit_json
from safetensors.torch import save_file
from torch import Tensor, nn

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.files import LFS_POINTER, TOKENIZER_DEFAULTS
from owl2.export.checkpoint.reference import open_checkpoint
from owl2.export.config import ExportConfig
from owl2.export.gptq_checkpoint import export_gptq
from owl2.export.job.progress import Silent
from owl2.export.pipeline import export_bundle
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import CheckpointError, ConfigError, Owl2Warning
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer

BIN, SAFE = "pytorch_model.bin", "model.safetensors"
TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
POINTER = LFS_POINTER + b"\noid sha256:0123456789abcdef\nsize 13476838912\n"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors(golden: Path) -> Tensors:
    """All tensors of a recorded checkpoint."""
    files = sorted((golden / "a1_base_bin" / "model").glob("*.bin"))
    return {name: value for file in files for name, value in torch.load(file, weights_only=True).items()}


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """Files of the checkpoint without its weights."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in (golden / "a1_base_bin" / "model").iterdir():
        if not file.name.startswith("pytorch_model"):
            shutil.copy(file, folder)
    return folder


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def save(tensors: Tensors, path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def notes_of_same(folder: Path, tensors: Tensors) -> tuple[str, ...]:
    """The notes on a checkpoint that must read as ``tensors``."""
    with Checkpoint(folder) as checkpoint:
        for name, value in tensors.items():
            assert torch.equal(checkpoint.tensor(name), value), name
        return checkpoint.notes


def refusal(folder: Path, *, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        Checkpoint(folder)
    first, *rest = str(caught.value).splitlines()
    assert len(first) < 600 + len(str(folder))
    assert all(len(line) < 300 for line in rest)
    return first


class TestNames:
    @pytest.mark.parametrize("file", [BIN, SAFE])
    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"module.{name}",
            lambda name: f"base_model.model.{name}",
            lambda name: f"_orig_mod.module.{name}",
            lambda name: name.removeprefix("model."),
            lambda name: f"module.{name.removeprefix('model.')}",
            lambda name: f"model.{name}",
        ],
    )
    def test_one_prefix_before_all_is_taken_off(
        self, folder: Path, tensors: Tensors, file: str, rename: Callable[[str], str]
    ) -> None:
        save({rename(name): value for name, value in tensors.items()}, folder / file)
        (note,) = notes_of_same(folder, tensors)
        assert note == f"tensors named as {rename(TABLE)!r} are read as {TABLE}, and all others alike"

    def test_an_index_may_have_them_too(self, folder: Path, tensors: Tensors) -> None:
        renamed = {f"module.{name}": value for name, value in tensors.items()}
        files = {name: f"pytorch_model-{1 + number % 3}.bin" for number, name in enumerate(renamed)}
        for file in set(files.values()):
            save({name: renamed[name] for name in renamed if files[name] == file}, folder / file)
        (folder / f"{BIN}.index.json").write_text(json.dumps({"weight_map": files}))
        assert len(notes_of_same(folder, tensors)) == 1

    def test_a_tied_head_need_not_be_there(self, folder: Path, tensors: Tensors) -> None:
        edit_json(folder / "config.json", tie_word_embeddings=True)
        rest = {name: value for name, value in tensors.items() if name != HEAD}
        save({f"module.{name}": value for name, value in rest.items()}, folder / SAFE)
        notes_of_same(folder, rest)

    def test_official_names_need_no_note(self, folder: Path, tensors: Tensors) -> None:
        save(tensors, folder / SAFE)
        assert notes_of_same(folder, tensors) == ()

    @pytest.mark.parametrize("other", ["teacher.model.", "ema."])
    def test_two_models_are_refused(self, folder: Path, tensors: Tensors, other: str) -> None:
        save({f"{prefix}{name}": tensors[name] for prefix in ("student.", other) for name in tensors}, folder / BIN)
        assert "could each be the token table, so which model is meant is not certain" in refusal(folder)

    def test_names_that_meet_are_refused(self, folder: Path, tensors: Tensors) -> None:
        save({f"module.{name}": value for name, value in tensors.items()} | {NORM: tensors[NORM]}, folder / BIN)
        assert f"{NORM} would both be" in refusal(folder).replace("module.", "")

    def test_what_the_prefix_does_not_explain_is_refused(self, folder: Path, tensors: Tensors) -> None:
        renamed = {f"module.{name}": value for name, value in tensors.items()}
        renamed["other.weight"] = renamed.pop(f"module.{NORM}")
        save(renamed, folder / BIN)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(folder)
        assert str(caught.value).splitlines()[1:] == [f"  missing {NORM} [64]", "  unexpected other.weight"]


class TestWrappers:
    @pytest.mark.parametrize("name", ["state_dict", "model", "module", "model_state_dict"])
    def test_the_dictionary_in_the_dictionary_is_read(self, folder: Path, tensors: Tensors, name: str) -> None:
        torch.save({"epoch": 3, name: tensors, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, folder / BIN)
        assert notes_of_same(folder, tensors) == ()

    def test_names_and_wrappers_together(self, folder: Path, tensors: Tensors) -> None:
        torch.save({"state_dict": {f"model.{name}": value for name, value in tensors.items()}}, folder / BIN)
        notes_of_same(folder, tensors)

    @pytest.mark.parametrize("outer", [{"model": {NORM: torch.ones(64)}}, {NORM: torch.ones(64)}])
    def test_two_sets_are_refused(self, folder: Path, tensors: Tensors, outer: dict[str, object]) -> None:
        torch.save({"state_dict": tensors, **outer}, folder / BIN)
        assert "more than one set of tensors is in it (state_dict, " in refusal(folder)


class TestAdapters:
    def test_a_folder_of_one_is_named_as_such(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "q-future/one-align"}))
        save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}, folder / "a.bin")
        shutil.move(folder / "a.bin", folder / "adapter_model.bin")
        assert refusal(folder).startswith(
            f"{folder} is a LoRA adapter (adapter_config.json, adapter_model.bin), not a whole model: give its base "
            "'q-future/one-align' as the checkpoint and this folder with --lora"
        )

    @pytest.mark.parametrize("content", ["{", "[]", '{"base_model_name_or_path": [1, 2]}', "{}", "[" * 100_000])
    def test_its_config_may_be_anything(self, folder: Path, content: str) -> None:
        (folder / "adapter_config.json").write_text(content)
        refusal(folder)

    def test_weights_beside_an_adapter_are_refused(self, folder: Path, tensors: Tensors) -> None:
        save(tensors, folder / SAFE)
        save({"x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
        assert "which it does not name, as the checkpoint" in refusal(folder)

    @pytest.mark.parametrize("value", [0.5, float("nan")])
    def test_tensors_of_one_that_works_are_refused(self, folder: Path, tensors: Tensors, value: float) -> None:
        layer = "model.layers.0.self_attn.q_proj"
        extra = {f"{layer}.lora_A.default.weight": torch.ones(2, 64)}
        extra[f"{layer}.lora_B.default.weight"] = torch.full((64, 2), value)
        save(tensors | extra, folder / SAFE)
        assert f"holds a LoRA adapter beside the weights ({layer}.lora_B.default.weight): merge it" in refusal(folder)

    def test_tensors_of_an_idle_one_are_noted(self, folder: Path, tensors: Tensors) -> None:
        layer = "model.layers.0.self_attn.q_proj"
        extra = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.zeros(64, 2)}
        save(tensors | extra, folder / SAFE)
        (note,) = notes_of_same(folder, tensors)
        assert note.startswith(f"not read, since it changes nothing: a LoRA adapter of zeros ({layer}.lora_A")

    def test_unmerged_layers_are_refused(self, folder: Path, tensors: Tensors) -> None:
        layer = "model.layers.0.self_attn.q_proj"
        changed = dict(tensors)
        changed[f"{layer}.base_layer.weight"] = changed.pop(f"{layer}.weight")
        save({f"base_model.model.{name}": value for name, value in changed.items()}, folder / SAFE)
        assert "holds a LoRA adapter beside the weights" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_model.embeddings.position_ids",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.original_inv_freq",
        "model.causal_mask",
        "optimizer.state.0.exp_avg",
        "model.norm.weight.exp_avg_sq",
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_buffers_and_leftovers_are_noted(folder: Path, tensors: Tensors, name: str, prefix: str) -> None:
    save({prefix + each: value for each, value in (tensors | {name: torch.arange(7)}).items()}, folder / SAFE)
    *_, note = notes_of_same(folder, tensors)
    assert note == f"not read, since no result depends on them: {prefix}{name}"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", SAFE, "special_tokens_map.json", "generation_config.json"]
)
def test_pointers_of_git_lfs_are_named(folder: Path, tensors: Tensors, name: str) -> None:
    save(tensors, folder / SAFE)
    (folder / name).write_bytes(POINTER)
    assert f"the files that Git LFS keeps: {name} only name them; run git lfs install and git lfs pull" in refusal(
        folder
    )


def test_pointers_among_the_shards_are_named(folder: Path) -> None:
    files = {f"t{number}": f"model-{number:05}-of-00033.safetensors" for number in range(1, 34)}
    for file in files.values():
        (folder / file).write_bytes(POINTER)
    (folder / f"{SAFE}.index.json").write_text(json.dumps({"weight_map": files}))
    assert "model-00010-of-00033.safetensors, … and 23 more only name them" in refusal(folder)


class TestMissingFiles:
    @pytest.mark.parametrize(
        "names", [["special_tokens_map.json"], ["tokenizer_config.json"], list(TOKENIZER_DEFAULTS)]
    )
    def test_the_tokenizers_defaults_are_those_of_the_original(
        self, golden: Path, folder: Path, tensors: Tensors, tmp_path: Path, names: list[str]
    ) -> None:
        save(tensors, folder / SAFE)
        for name in names:
            (folder / name).unlink()
        notes = Notes()
        target = tmp_path / "bundle"
        export_bundle(ExportConfig(folder, target, weights="fp32", samples=1), notes)
        assert f"{folder}: {', '.join(names)} is missing; the defaults of LLaMA's tokenizer are taken" in notes.texts
        Bundle.open(target)
        tokenizer = Tokenizer.load(target)
        for case in json.loads((golden / "a1_base_bin" / "prompts.json").read_text()):
            if isinstance(case, dict) and {"prompt", "ids"} <= set(case):
                assert tokenizer.encode_prompt(case["prompt"]) == case["ids"]
        whole = Tokenizer.load(golden / "a1_base_bin" / "model")
        assert tokenizer.added == whole.added
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (whole.bos_id, whole.eos_id, whole.unk_id)

    def test_a_missing_preprocessor_is_explained(self, folder: Path, tensors: Tensors) -> None:
        save(tensors, folder / SAFE)
        (folder / "preprocessor_config.json").unlink()
        first = refusal(folder)
        assert (
            "missing: preprocessor_config.json; copy preprocessor_config.json into the folder from the model that this "
            "one was trained from (https://huggingface.co/MAGAer13/mplug-owl2-llama2-7b)" in first
        )
        assert "an export, but nothing else, can do without it: owl2-export --base-preprocessor" in first
        with pytest.raises(CheckpointError, match=r"copy preprocessor_config\.json into the folder"):
            open_checkpoint(folder)

    def test_the_base_models_values_are_taken_when_told(self, golden: Path, folder: Path, tensors: Tensors) -> None:
        save(tensors, folder / SAFE)
        with Checkpoint(folder) as checkpoint:
            expected = checkpoint.config
        with pytest.raises(ConfigError, match=r"has a preprocessor_config\.json; leave --base-pre"):
            Checkpoint(folder, base_preprocessor=True)
        (folder / "preprocessor_config.json").unlink()
        with Checkpoint(folder, base_preprocessor=True) as checkpoint:
            assert checkpoint.config == expected
            assert checkpoint.notes == (
                "preprocessor_config.json is missing; the values of mPLUG-Owl2 itself are taken",
            )

    @pytest.mark.slow
    def test_a_gptq_checkpoint_has_all_files(self, folder: Path, tensors: Tensors, tmp_path: Path) -> None:
        save(tensors, folder / SAFE)
        for name in ("preprocessor_config.json", *TOKENIZER_DEFAULTS):
            (folder / name).unlink()
        config = ExportConfig(
            folder, tmp_path / "made", layout="gptq", method="rtn", group_size=16, base_preprocessor=True
        )
        export_gptq(config)
        with Checkpoint(tmp_path / "made") as checkpoint:
            assert checkpoint.notes == ()

    def test_a_reference_says_what_it_takes(self, folder: Path, tensors: Tensors) -> None:
        save(tensors, folder / SAFE)
        (folder / "special_tokens_map.json").unlink()
        with pytest.warns(Owl2Warning, match=r"special_tokens_map\.json is missing"):
            open_checkpoint(folder)


class TestVocabulary:
    def resized(self, tensors: Tensors, table: int, head: int | None = None) -> Tensors:
        rows = {TABLE: table, HEAD: table if head is None else head}
        changed = {}
        for name, count in rows.items():
            more = torch.full((max(0, count - 800), 64), 100.0)
            changed[name] = torch.cat([tensors[name][:count], more])
        return tensors | changed

    def test_rows_after_the_vocabulary_are_left_out(self, folder: Path, tensors: Tensors) -> None:
        save(self.resized(tensors, 832), folder / SAFE)
        (note,) = notes_of_same(folder, tensors)
        assert note == ("the token table has 832 rows, config.json a vocab_size of 800; the rows after it are left out")

    def test_rows_that_config_json_counts_stay(self, folder: Path, tensors: Tensors) -> None:
        changed = self.resized(tensors, 832)
        save(changed, folder / SAFE)
        edit_json(folder / "config.json", vocab_size=832)
        assert notes_of_same(folder, changed) == ()

    @pytest.mark.parametrize(("table", "head"), [(832, 800), (800, 832), (832, 864)])
    def test_tables_that_disagree_are_refused(self, folder: Path, tensors: Tensors, table: int, head: int) -> None:
        save(self.resized(tensors, table, head), folder / SAFE)
        with pytest.raises(CheckpointError, match=r"misshaped .*: \[8\d\d, 64\], expected \[800, 64\]"):
            Checkpoint(folder)

    def test_too_few_rows_are_the_cause(self, folder: Path, tensors: Tensors) -> None:
        save(self.resized(tensors, 768), folder / SAFE)
        assert refusal(folder).endswith("; its token table has 768 rows, config.json says 800 (vocab_size):")


class TestCauses:
    @pytest.mark.parametrize(("config", "cause"), [(2, "it has 3 decoder layers"), (5, "it has 3 decoder layers")])
    def test_another_number_of_layers(self, folder: Path, tensors: Tensors, config: int, cause: str) -> None:
        save(tensors, folder / SAFE)
        edit_json(folder / "config.json", num_hidden_layers=config)
        assert refusal(folder).endswith(f"; {cause}, config.json says {config} (num_hidden_layers):")

    def test_a_plain_llama(self, folder: Path, tensors: Tensors) -> None:
        plain = {name.replace("multiway.0.", ""): value for name, value in tensors.items() if "multiway.1." not in name}
        save(plain, folder / SAFE)
        assert "its decoder is a plain LLaMA" in refusal(folder)

    def test_bitsandbytes(self, folder: Path, tensors: Tensors) -> None:
        save(tensors | {"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(3)}, folder / SAFE)
        assert "it is quantized by bitsandbytes" in refusal(folder)

    def test_no_language_model(self, folder: Path) -> None:
        save({"visual.\x1b[31mhull": torch.ones(3)}, folder / SAFE)
        first = refusal(folder)
        assert f"the language model is not in these files ({TABLE} is missing; it has visual.\\x1b[31mhull)" in first


class TestTensors:
    @pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda value: value.to_sparse(), "sparse_coo float32"),
            (lambda value: value.reshape(8, 8).to_sparse_csr(), None),
            (lambda value: value.to("meta"), "meta (without its numbers) float32"),
            (lambda value: value.to(torch.complex64), "complex64"),
            (lambda value: value.double(), "float64"),
            (lambda value: value.to(torch.float8_e4m3fn), "float8_e4m3fn"),
            (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), None),
            (lambda value: value > 0, "bool"),
        ],
    )
    def test_other_kinds_are_refused(
        self, folder: Path, tensors: Tensors, change: Callable[[Tensor], Tensor], said: str | None
    ) -> None:
        torch.save(tensors | {NORM: change(tensors[NORM])}, folder / BIN)
        with pytest.raises(CheckpointError, match=f"{NORM}|{BIN}") as caught:
            Checkpoint(folder)
        assert said is None or f"{NORM} is stored as {said}; expected float32, float16 or bfloat16" in str(caught.value)

    def test_parameters_are_read_as_tensors(self, folder: Path, tensors: Tensors) -> None:
        torch.save({name: nn.Parameter(value) for name, value in tensors.items()}, folder / BIN)
        notes_of_same(folder, tensors)
        with Checkpoint(folder) as checkpoint:
            assert not checkpoint.tensor(TABLE).requires_grad

    @pytest.mark.parametrize("make", [lambda value: value, nn.Parameter, lambda value: [value], lambda _: "text"])
    def test_what_is_no_dictionary_is_refused(
        self, folder: Path, tensors: Tensors, make: Callable[[Tensor], object]
    ) -> None:
        torch.save(make(tensors[NORM]), folder / BIN)
        assert "expected a dictionary of tensors, got" in refusal(folder)

    def test_a_whole_module_is_refused(self, folder: Path) -> None:
        torch.save(nn.Linear(2, 2), folder / BIN)
        assert "holds more than tensors" in refusal(folder)

    @pytest.mark.parametrize(
        "header",
        [
            b"\xff" * 8,
            (2**40).to_bytes(8, "little") + b"{}",
            (99_999_999).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"{}" + b"x",
            (4).to_bytes(8, "little") + b"null",
        ],
    )
    def test_impossible_headers_are_refused(self, folder: Path, header: bytes) -> None:
        (folder / SAFE).write_bytes(header)
        assert f"{SAFE} cannot be read; it is truncated or damaged: " in refusal(folder)

    @pytest.mark.parametrize(
        "offsets", [[[0, 8], [4, 12]], [[0, 8], [8, 4]], [[0, 8], [16, 24]], [[0, 8], [8, 1 << 62]]]
    )
    def test_tensors_that_overlap_are_refused(self, folder: Path, offsets: list[list[int]]) -> None:
        entries = {
            f"t{number}": {"dtype": "F32", "shape": [2], "data_offsets": place} for number, place in enumerate(offsets)
        }
        text = json.dumps(entries).encode()
        (folder / SAFE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
        assert f"{SAFE} cannot be read; it is truncated or damaged: " in refusal(folder)


class TestFiles:
    @pytest.mark.parametrize("name", [SAFE, BIN, "config.json", "tokenizer.model", "preprocessor_config.json"])
    def test_a_pipe_is_not_waited_for(self, folder: Path, tensors: Tensors, name: str) -> None:
        if name not in (SAFE, BIN):
            save(tensors, folder / SAFE)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert "missing: " in refusal(folder)

    def test_a_pipe_among_the_shards(self, folder: Path) -> None:
        (folder / f"{SAFE}.index.json").write_text(json.dumps({"weight_map": {NORM: "model-1.safetensors"}}))
        os.mkfifo(folder / "model-1.safetensors")
        assert "1 of 1 shards named by" in refusal(folder)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    @pytest.mark.parametrize("name", [SAFE, "config.json", "tokenizer.model"])
    def test_unreadable_files(self, folder: Path, tensors: Tensors, name: str) -> None:
        save(tensors, folder / SAFE)
        (folder / name).chmod(0)
        with pytest.raises(CheckpointError, match="Permission denied"):
            open_checkpoint(folder)

    @pytest.mark.parametrize("outside", ["../secret.bin", "/etc/passwd", "a/b.bin", "..", "x\0y", "\x1b[2J/x"])
    def test_shards_elsewhere_are_refused(self, folder: Path, outside: str) -> None:
        weight_map = {f"t{number}": f"{outside}{number}" for number in range(1000)}
        (folder / f"{SAFE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        first = refusal(folder)
        assert "\x1b" not in first
        assert "… and 990 more" in first
