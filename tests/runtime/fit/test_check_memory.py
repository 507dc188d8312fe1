"""The check before a load: what cannot fit is refused, with figures and what would."""

import json
import re
from pathlib import Path
from typing import Literal

import pytest
from conftest import RunCommand, edit_manifest
from planning import cpu, machine, manifest, nvidia_smi, write

from owl2 import BackendError, BundleCorruptError, InsufficientMemoryError, Owl2, Plan
from owl2.runtime import spec
from owl2.runtime.fit.machine import this_cpu
from owl2.runtime.fit.plan import check_memory
from owl2.runtime.fit.products import GIB
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.placement import Placement

SWAPS = "Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n"


@pytest.fixture
def small_machine(tmp_path: Path) -> Path:
    """4 GB of memory, 3.1 GiB of it available."""
    return machine(tmp_path, 3884364, 3221225)


def test_7b_on_a_machine_of_4_gb(small_machine: Path) -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        check_memory(manifest(), 2048, "fp32", backend="onnxruntime", root=small_machine)
    message = str(caught.value)
    assert isinstance(caught.value, BackendError)
    assert message.startswith("not enough memory: the model needs at least 6.")
    for words in ("decoder weights 4.08 GiB", "K/V cache 2.00 GiB", "3.07 GiB are available", "--no-memory-check"):
        assert words in message
    needs = Plan(manifest(), cpu(32), 2048, "fp32", images=0, backend="onnxruntime").needed
    assert f"to make it fit: a machine with {needs / GIB:.2f} GiB of memory available" in message
    assert caught.value.needed > 6 * GIB
    assert caught.value.available == 3221225 * 1024


def test_what_is_suggested_passes(tmp_path: Path) -> None:
    root = machine(tmp_path, 7_400_000, 6_400_000)
    with pytest.raises(InsufficientMemoryError) as caught:
        check_memory(manifest(), 2048, "fp32", backend="onnxruntime", root=root)
    both, shorter = re.findall(
        r"to make it fit: --kv-cache int8 and --context (\d+); or --context (\d+);", str(caught.value)
    )[0]
    assert 2048 > int(both) > int(shorter) > 0
    check_memory(manifest(), int(both), "int8", backend="onnxruntime", root=root)
    check_memory(manifest(), int(shorter), "fp32", backend="onnxruntime", root=root)


def test_it_errs_on_the_small_side(tmp_path: Path) -> None:
    """A model that exceeds memory only by the uncertain parts of the estimate is not refused."""
    tight = 7 * GIB // 1024
    root = machine(tmp_path, tight, tight)
    budget = this_cpu(root)
    assert budget is not None
    assert not Plan(manifest(), budget, 2048, "fp32", backend="onnxruntime").fits
    check_memory(manifest(), 2048, "fp32", backend="onnxruntime", root=root)


def test_without_a_context_the_first_positions_have_to_fit(tmp_path: Path) -> None:
    """A conversation may never reach the model's own context; one that was asked for is meant."""
    weights = sum(part.least for part in Plan(manifest(), cpu(32), 1, "fp32", images=0, backend="onnxruntime").parts)
    first = GROWTH * manifest().kv_bytes("fp32")
    enough = (weights + first) // 1024 + (64 << 10)
    root = machine(tmp_path, enough, enough)
    check_memory(manifest(), None, "fp32", backend="onnxruntime", root=root)
    check_memory(manifest(), GROWTH, "fp32", backend="onnxruntime", root=root)
    with pytest.raises(InsufficientMemoryError, match=r"K/V cache 2\.00 GiB"):
        check_memory(manifest(), 2048, "fp32", backend="onnxruntime", root=root)
    with pytest.raises(InsufficientMemoryError, match=r"K/V cache 0\.25 GiB"):
        check_memory(manifest(), None, "fp32", backend="onnxruntime", root=machine(tmp_path, enough, weights // 1024))


@pytest.mark.parametrize("kind", ["cuda", "tensorrt"])
def test_on_a_jetson_the_gpu_has_the_cpus_memory(small_machine: Path, kind: Literal["cuda", "tensorrt"]) -> None:
    bundle = manifest("int4", "onnx" if kind == "tensorrt" else "ort", "fp16")
    write(small_machine, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    write(small_machine, "proc/swaps", SWAPS)  # a GPU cannot use it
    with pytest.raises(InsufficientMemoryError) as caught:
        check_memory(bundle, None, "fp16", Placement(kind), root=small_machine)
    assert caught.value.available == 3221225 * 1024
    for words in (
        f"decoder weights {bundle.files['decoder.onnx.data'].size / GIB:.2f}",
        "; see owl2 plan BUNDLE, or load regardless",
    ):
        assert words in str(caught.value)
    machine(small_machine, 8_000_000, 7_000_000)
    check_memory(bundle, None, "fp16", Placement(kind), root=small_machine)


def test_other_gpus_by_their_free_memory(small_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, gpu = manifest("int4", "onnx", "fp16"), Placement("tensorrt-rtx")
    monkeypatch.setenv("PATH", str(small_machine))
    check_memory(bundle, None, "fp16", gpu, root=small_machine)  # none is found: the backend says so
    nvidia_smi(small_machine, "NVIDIA GeForce RTX 3060, 12288, 3000, 8.6")
    with pytest.raises(InsufficientMemoryError, match="close other programs") as caught:
        check_memory(bundle, None, "fp16", gpu, root=small_machine)
    assert caught.value.available == 3000 << 20
    both = ("NVIDIA GeForce RTX 3060, 12288, 3000, 8.6", "NVIDIA GeForce RTX 3060, 12288, 11000, 8.6")
    nvidia_smi(small_machine, *both)
    check_memory(bundle, None, "fp16", gpu, root=small_machine)


def test_devices_of_other_packages_are_not_checked(small_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the GPU of this machine has free, nothing is raised."""
    monkeypatch.setenv("PATH", str(small_machine))
    nvidia_smi(small_machine, "NVIDIA GeForce RTX 3060, 12288, 3000, 8.6")
    check_memory(manifest(), 2048, "fp32", Placement("abacus"), root=small_machine)


def test_swap_on_a_disk_is_taken_into_account(small_machine: Path) -> None:
    """A model that memory without swap does not hold is accepted: nothing is raised."""
    write(small_machine, "proc/swaps", SWAPS)
    check_memory(manifest(), 2048, "fp32", root=small_machine)


def test_a_system_whose_memory_is_not_known(tmp_path: Path) -> None:
    """Any model is accepted: nothing is raised."""
    assert this_cpu(tmp_path) is None
    check_memory(manifest(), 2048, "fp32", root=tmp_path)


def test_a_load_is_refused_before_files_are_read(copy: Path, run: RunCommand) -> None:
    """A manifest that claims a decoder larger than any machine; what is wrong with it is found out later."""
    files = json.loads((copy / spec.MANIFEST).read_text())["files"]
    files["decoder.onnx.data"]["size"] = 1 << 52
    edit_manifest(copy, files=files)
    with pytest.raises(InsufficientMemoryError):
        Owl2.load(copy)
    with pytest.raises(BundleCorruptError):
        Owl2.load(copy, check_memory=False)
    for command in (["ask", copy, "q"], ["verify", copy]):
        for flags, words in ((), "not enough memory"), (("--no-memory-check",), "(truncated?)"):
            result = run(*command, *flags)
            assert result.exit_code == 1
            assert words in result.output
            assert ("see owl2 plan BUNDLE --device cpu" in result.output) == (not flags)
