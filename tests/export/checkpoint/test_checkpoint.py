"""Every official layout reads the same; whatever is wrong with a folder is named before a number is read."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from conftest import edit_json
from safetensors.torch import load_file, save_file
from torch import Tensor

from owl2.export.checkpoint.checkpoint import MAX_LISTED_PROBLEMS, MAX_OPEN_SHARDS, Checkpoint
from owl2.export.checkpoint.files import REQUIRED_FILES
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.errors import CheckpointError, ConfigError

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
CROSS = "model.visual_abstractor.encoder.layers.0.crossattention.attention"
NORM, HEAD = "model.norm.weight", "lm_head.weight"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors(golden: Path) -> Tensors:
    """All tensors of a recorded checkpoint: float32, position buffers and inv_freq included."""
    files = sorted((golden / "a1_base_bin" / "model").glob("*.bin"))
    return {name: value for file in files for name, value in torch.load(file, weights_only=True).items()}


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """Files of the checkpoint without its weights."""
    for file in (golden / "a1_base_bin" / "model").iterdir():
        if not file.name.startswith("pytorch_model"):
            shutil.copy(file, tmp_path)
    return tmp_path


def save(tensors: Tensors, path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def save_shards(tensors: Tensors, folder: Path, index: str, pattern: str, count: int = 5) -> dict[str, str]:
    """Deal the tensors out to ``count`` files and write the index; returns its weight map."""
    weight_map = {name: pattern.format(1 + number % count, count) for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def model_of(folder: Path) -> Owl2Model:
    with Checkpoint(folder) as checkpoint:
        model = Owl2Model(checkpoint.config).requires_grad_(False)
        checkpoint.load_into(model, "")
    return model


def mapped_files(folder: Path) -> set[str]:
    """Files of ``folder`` that this process has mapped to memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split("/")[-1] for line in lines if str(folder) in line}


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        (BIN_INDEX, "pytorch_model-{}-of-{}.bin"),
        (BIN_INDEX, "pytorch_model-{:05}-of-{:05}.bin"),
        (SAFE_INDEX, "model-{:05}-of-{:05}.safetensors"),
        (None, BIN),
        (None, SAFE),
    ],
)
def test_every_layout_reads_the_same(folder: Path, tensors: Tensors, index: str | None, pattern: str) -> None:
    if index:
        save_shards(tensors, folder, index, pattern)
    else:
        save(tensors, folder / pattern)
    with Checkpoint(folder) as checkpoint:
        for name, value in tensors.items():
            assert name in checkpoint
            assert torch.equal(checkpoint.tensor(name), value)
        assert "model.nothing.weight" not in checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", [BIN, SAFE])
def test_stored_types_are_read_as_float32(folder: Path, tensors: Tensors, file: str, dtype: torch.dtype) -> None:
    save({name: value.to(dtype) for name, value in tensors.items()}, folder / file)
    with Checkpoint(folder) as checkpoint:
        for name, value in tensors.items():
            read = checkpoint.tensor(name)
            assert read.dtype == torch.float32
            assert torch.equal(read, value.to(dtype).float())


@pytest.mark.parametrize("preferred", [SAFE, SAFE_INDEX])
@pytest.mark.parametrize("other", [BIN, BIN_INDEX])
def test_safetensors_are_preferred(folder: Path, tensors: Tensors, preferred: str, other: str) -> None:
    for file, value in ((preferred, 1.0), (other, 2.0)):
        changed = tensors | {NORM: torch.full_like(tensors[NORM], value)}
        if file in (SAFE, BIN):
            save(changed, folder / file)
        else:
            save_shards(changed, folder, file, f"part-{{}}-of-{{}}{Path(file.removesuffix('.index.json')).suffix}")
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensor(NORM).tolist()) == {1.0}


def test_absent_position_buffers_are_computed(folder: Path, tensors: Tensors) -> None:
    save({name: value for name, value in tensors.items() if not name.endswith("pos_embed")}, folder / SAFE)
    buffers = dict(model_of(folder).named_buffers())
    assert len(buffers) == 4
    for name, value in buffers.items():
        torch.testing.assert_close(value, tensors[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["q_pos_embed", "k_pos_embed"])
def test_stored_position_buffers_are_used(folder: Path, tensors: Tensors, name: str) -> None:
    stored = tensors[f"{CROSS}.{name}"].half() + 1
    save(tensors | {f"{CROSS}.{name}": stored}, folder / SAFE)
    assert torch.equal(model_of(folder).get_buffer(f"{CROSS}.{name}"), stored.float())


@pytest.mark.parametrize("inv_freq", [None, torch.full((8,), 0.5), torch.full((3,), torch.nan), torch.ones(2).long()])
def test_inv_freq_never_matters(folder: Path, tensors: Tensors, inv_freq: Tensor | None) -> None:
    save(tensors, folder / SAFE)
    ids = torch.arange(1, 20)[None]
    expected = reference.logits(model_of(folder), ids)
    changed = {name: inv_freq if name.endswith("inv_freq") else value for name, value in tensors.items()}
    assert changed.keys() - {name for name, value in changed.items() if value is tensors[name]}
    save({name: value for name, value in changed.items() if value is not None}, folder / BIN)
    (folder / SAFE).unlink()
    assert torch.equal(reference.logits(model_of(folder), ids), expected)


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_head_is_the_embedding_table(folder: Path, tensors: Tensors, with_head: bool) -> None:
    save({name: value for name, value in tensors.items() if with_head or name != HEAD}, folder / SAFE)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    model = model_of(folder)
    hidden = torch.eye(model.config.decoder.hidden_size)
    assert torch.equal(model.head(hidden), tensors["model.embed_tokens.weight"].T)


def test_part_of_a_model_is_filled_by_its_prefix(folder: Path, tensors: Tensors) -> None:
    save(tensors, folder / SAFE)
    with Checkpoint(folder) as checkpoint:
        layer = Owl2Model(checkpoint.config).model.layers[2]
        checkpoint.load_into(layer, "model.layers.2.")
    for name, value in layer.state_dict().items():
        assert torch.equal(value, tensors[f"model.layers.2.{name}"])


@pytest.mark.parametrize("file", [BIN, SAFE])
def test_numbers_are_read_when_they_are_asked_for(folder: Path, tensors: Tensors, file: str) -> None:
    marked = torch.arange(len(tensors[NORM])) + 12345.0
    save(tensors | {NORM: marked}, folder / file)
    with Checkpoint(folder) as checkpoint, (folder / file).open("r+b") as opened:
        place = opened.read().index(marked.numpy().tobytes())
        opened.seek(place)
        opened.write((marked + 1).numpy().tobytes())
        opened.flush()
        assert torch.equal(checkpoint.tensor(NORM), marked + 1)


@pytest.mark.parametrize(
    ("index", "pattern"), [(BIN_INDEX, "pytorch_model-{}-of-{}.bin"), (SAFE_INDEX, "model-{}-of-{}.safetensors")]
)
def test_few_shards_are_open_at_a_time(folder: Path, tensors: Tensors, index: str, pattern: str) -> None:
    weight_map = save_shards(tensors, folder, index, pattern)
    with Checkpoint(folder) as checkpoint:
        assert 0 < len(mapped_files(folder)) <= MAX_OPEN_SHARDS
        kept = []
        for name in tensors:
            kept.append(checkpoint.tensor(name))
            assert weight_map[name] in mapped_files(folder)
            assert len(mapped_files(folder)) <= MAX_OPEN_SHARDS
    assert not mapped_files(folder)


@pytest.mark.parametrize("name", ["nowhere", "config.json"])
def test_what_is_not_a_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} is not a folder; expected a checkpoint in the official layout"):
        Checkpoint(folder / name)


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_missing_files_are_named(folder: Path, tensors: Tensors, name: str) -> None:
    save(tensors, folder / SAFE)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"is not an official .* checkpoint; missing: {name}($|; copy)"):
        Checkpoint(folder)


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    everything = ", ".join(REQUIRED_FILES)
    with pytest.raises(CheckpointError, match=rf"missing: {everything}, weights \(one of {SAFE_INDEX}, {SAFE}, "):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "generation_config.json", SAFE_INDEX])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": ', ": it is not JSON: Expecting value.*; copy or download it again"),
        (b"", ": it is not JSON: Expecting value"),
        (b"\xff\xfe{}", ": it is UTF-16 text; save it as UTF-8"),
        (b"[1]", " must hold a JSON object, got list"),
        (b"[" * 100_000, ": it is nested too deeply"),
        (b'{"a": 1, "a": 2}', ": the key 'a' occurs more than once"),
    ],
)
def test_broken_json_is_named(folder: Path, tensors: Tensors, name: str, content: bytes, reason: str) -> None:
    save_shards(tensors, folder, SAFE_INDEX, "model-{}-of-{}.safetensors")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}{reason}"):
        Checkpoint(folder)


def test_an_unsupported_config_is_refused_first(folder: Path, tensors: Tensors) -> None:
    save(tensors, folder / SAFE)
    edit_json(folder / "config.json", num_key_value_heads=2)
    with pytest.raises(ConfigError, match="num_key_value_heads 2 must equal num_attention_heads 4"):
        Checkpoint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {NORM: 3}}])
def test_an_index_without_a_weight_map_is_refused(folder: Path, index: object) -> None:
    (folder / BIN_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{BIN_INDEX}: weight_map must map tensor names to file names"):
        Checkpoint(folder)


def test_missing_shards_are_named(folder: Path, tensors: Tensors) -> None:
    save_shards(tensors, folder, BIN_INDEX, "pytorch_model-{}-of-{}.bin", 33)
    (folder / "pytorch_model-2-of-33.bin").unlink()
    (folder / "pytorch_model-30-of-33.bin").unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"2 of 33 shards named by {BIN_INDEX} are missing: "
        r"pytorch_model-2-of-33\.bin, pytorch_model-30-of-33\.bin; copy or download them",
    ):
        Checkpoint(folder)


@pytest.mark.parametrize("place", ["../{}", "{}/other.bin", "/etc/{}"])
def test_shards_outside_the_folder_are_refused(golden: Path, tmp_path: Path, tensors: Tensors, place: str) -> None:
    inside = tmp_path / "inside"
    shutil.copytree(golden / "a1_base_bin" / "model", inside)
    outside = place.format("stolen.bin")
    if place.startswith("../"):
        save({NORM: tensors[NORM]}, tmp_path / "stolen.bin")
    index = json.loads((inside / BIN_INDEX).read_text())
    index["weight_map"][NORM] = outside
    (inside / BIN_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{BIN_INDEX}: shards must be next to it, not at {outside}$"):
        Checkpoint(inside)


@pytest.mark.parametrize(
    ("index", "pattern"), [(BIN_INDEX, "pytorch_model-{}-of-{}.bin"), (SAFE_INDEX, "model-{}-of-{}.safetensors")]
)
def test_a_tensor_that_is_not_where_the_index_says_is_missing(
    folder: Path, tensors: Tensors, index: str, pattern: str
) -> None:
    save_shards(tensors, folder, index, pattern)
    file = pattern.format(2, 5)
    weight_map = json.loads((folder / index).read_text())["weight_map"]
    weight_map[NORM] = pattern.format(2, 5) if weight_map[NORM] != file else pattern.format(3, 5)
    edit_json(folder / index, weight_map=weight_map)
    with pytest.raises(
        CheckpointError,
        match=rf"1 tensors do not fit .*\n  missing {NORM}: the index says {weight_map[NORM]}, which does not hold it$",
    ):
        Checkpoint(folder)


@pytest.mark.parametrize("file", [BIN, SAFE])
def test_missing_unexpected_and_misshaped_tensors_are_named_at_once(folder: Path, tensors: Tensors, file: str) -> None:
    changed = {name: value for name, value in tensors.items() if name != NORM}
    changed |= {"model.extra.weight": torch.ones(2), HEAD: tensors[HEAD][:5], f"{CROSS}.q_pos_embed": torch.ones(7, 48)}
    save(changed, folder / file)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert str(caught.value).splitlines() == [
        f"{folder}: 4 tensors do not fit its config.json:",
        f"  missing {NORM} [64]",
        "  unexpected model.extra.weight",
        f"  misshaped {HEAD}: [5, 64], expected [800, 64]",
        f"  misshaped {CROSS}.q_pos_embed: [7, 48], expected [6, 48]",
    ]


def test_a_long_list_of_problems_is_cut(folder: Path) -> None:
    save({"something.else": torch.ones(1)}, folder / SAFE)
    with pytest.raises(CheckpointError, match=r"(?s): (\d+) tensors do not fit .*\n  … and (\d+) more$") as caught:
        Checkpoint(folder)
    lines = str(caught.value).splitlines()
    total, more = int(lines[0].split(": ")[1].split()[0]), int(lines[-1].split()[2])
    assert len(lines) == 2 + MAX_LISTED_PROBLEMS
    assert total == MAX_LISTED_PROBLEMS + more > 100


@pytest.mark.parametrize(
    ("file", "dtype", "shown"),
    [
        (BIN, torch.int8, "int8"),
        (BIN, torch.float64, "float64"),
        (SAFE, torch.int8, "I8"),
        (SAFE, torch.int64, "I64"),
        (SAFE, torch.float64, "float64"),
        (SAFE, torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_other_types_are_refused(folder: Path, tensors: Tensors, file: str, dtype: torch.dtype, shown: str) -> None:
    save(tensors | {NORM: tensors[NORM].to(dtype)}, folder / file)
    expected = f"\n  {NORM} is stored as {shown}; expected float32, float16 or bfloat16$"
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint(folder)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("file", [BIN, SAFE])
def test_truncated_files_are_named(folder: Path, tensors: Tensors, file: str, kept: float) -> None:
    save(tensors, folder / file)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read; it is truncated or damaged: ."):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\nNNNNNNNNN"),
        (b"\x80\x02}", b"\x80\x02a"),
        (b"\x80\x02}", b"\x80\x02h"),
    ],
)
def test_a_damaged_pickle_is_named(folder: Path, tensors: Tensors, before: bytes, after: bytes) -> None:
    save(tensors, folder / BIN)
    content = (folder / BIN).read_bytes()
    assert content.count(before) == 1
    (folder / BIN).write_bytes(content.replace(before, after))
    with pytest.raises(CheckpointError, match=f"{BIN} cannot be read; it is truncated or damaged: ."):
        Checkpoint(folder)


class Touch:
    """Unpickling this without restrictions makes a file."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_would_run_a_command_is_refused(folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save(tensors | {"surprise": Touch(touched)}, folder / BIN)
    with pytest.raises(CheckpointError, match=rf"{BIN} holds more than tensors.* and was not loaded: .*posix\.system"):
        Checkpoint(folder)
    assert not touched.exists()
    torch.load(folder / BIN, weights_only=False)
    assert touched.exists()


def test_a_bare_pickle_is_refused(folder: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (folder / BIN).write_bytes(pickle.dumps({NORM: Touch(touched)}))
    with pytest.raises(CheckpointError, match=f"{BIN} cannot be read; it is truncated or damaged"):
        Checkpoint(folder)
    assert not touched.exists()


def test_a_bin_that_is_not_a_dictionary_is_refused(folder: Path, tensors: Tensors) -> None:
    torch.save(list(tensors.values()), folder / BIN)
    with pytest.raises(CheckpointError, match=f"{BIN}: expected a dictionary of tensors, got list"):
        Checkpoint(folder)


def test_entries_that_are_not_named_tensors_are_passed_over(folder: Path, tensors: Tensors) -> None:
    torch.save({"epoch": 3, 7: torch.ones(1)} | tensors, folder / BIN)
    with Checkpoint(folder) as checkpoint:
        assert "epoch" not in checkpoint
        assert torch.equal(checkpoint.tensor(NORM), tensors[NORM])


def test_damage_does_not_advise_to_load_without_protection(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors | {"optimizer": torch.optim.SGD([tensors[NORM]])}, folder / BIN)
    with pytest.raises(CheckpointError, match=f"{BIN} holds more than tensors") as caught:
        Checkpoint(folder)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("file", [BIN, SAFE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_when_read(
    folder: Path, tensors: Tensors, file: str, bad: float
) -> None:
    damaged = tensors[NORM].clone()
    damaged[3] = damaged[5] = bad
    save(tensors | {NORM: damaged}, folder / file)
    with Checkpoint(folder) as checkpoint:
        checkpoint.tensor(HEAD)
        with pytest.raises(CheckpointError, match=f"tensor {NORM} holds 2 values that are NaN or infinite"):
            checkpoint.tensor(NORM)
        with pytest.raises(CheckpointError, match=f"tensor {NORM} holds 2 values"):
            checkpoint.load_into(Owl2Model(checkpoint.config), "")


def test_the_recorded_safetensors_hold_what_is_read(golden: Path) -> None:
    model = golden / "a2_fp16_safetensors" / "model"
    stored = {name: value for file in model.glob("*.safetensors") for name, value in load_file(file).items()}
    assert {value.dtype for value in stored.values()} == {torch.float16}
    with Checkpoint(model) as checkpoint:
        for name, value in stored.items():
            assert torch.equal(checkpoint.tensor(name), value.float())
