"""``owl2 plan``."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from conftest import RunCommand
from planning import manifest, nvidia_smi

from owl2.runtime import spec
from owl2.runtime.backends.native.support import is_installed
from owl2.runtime.fit.products import PRODUCTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of 7B shapes that is nothing but its manifest."""
    (tmp_path / spec.MANIFEST).write_text(json.dumps(manifest().sealed()))
    return tmp_path


@pytest.fixture
def gpu_folder(tmp_path: Path) -> Path:
    """The same for ONNX Runtime on a GPU."""
    (tmp_path / spec.MANIFEST).write_text(json.dumps(manifest("int4", "ort", "fp16").sealed()))
    return tmp_path


def test_table(run: RunCommand, gpu_folder: Path) -> None:
    result = run("plan", gpu_folder, "--device", "rtx4090")
    assert result.exit_code == 0, result.output
    for words in ("NVIDIA GeForce RTX 4090 (SM89): fits", "K/V cache", "1.0 GiB", "tokens/s", "assumed"):
        assert words in result.stdout


def test_what_cannot_run_there_exits_with_1(run: RunCommand, folder: Path) -> None:
    result = run("plan", folder, "--device", "rtx4090")
    assert result.exit_code == 1
    assert "RTX 4090 (SM89): CANNOT RUN" in result.stdout
    assert "to make it fit\n  export with --dialect ort --weights int4 --activations fp16 " in result.stdout
    assert "on NVIDIA GeForce RTX 4090: cannot run" in result.stderr


def test_what_does_not_fit_exits_with_1_and_tells_what_would(run: RunCommand, gpu_folder: Path) -> None:
    result = run("plan", gpu_folder, "--device", "orin-nx-8gb")
    assert result.exit_code == 1
    assert "DOES NOT FIT" in result.stdout
    assert "to make it fit\n" in result.stdout
    assert "on NVIDIA Jetson Orin NX 8GB: does not fit" in result.stderr


def test_nothing_helps(run: RunCommand, gpu_folder: Path) -> None:
    result = run("plan", gpu_folder, "--device", "orin-nano-4gb")
    assert "to make it fit\n  no option and no other export makes it fit\n" in result.stdout


def test_json_and_its_suggestions_as_options(run: RunCommand, gpu_folder: Path) -> None:
    def plan(*options: str) -> Result:
        return run("plan", gpu_folder, "--device", "rtx3070", "--json", *options)

    record = json.loads(plan().stdout)
    assert record["needed"] == sum(part["size"] for part in record["parts"])
    assert not record["fits"]
    options = [suggestion for suggestion in record["suggestions"] if suggestion["change"].startswith("--")]
    assert options
    for suggestion in options:
        again = plan(*suggestion["change"].split())
        assert again.exit_code == 0
        assert json.loads(again.stdout)["needed"] == suggestion["needed"]


def test_building_an_engine(run: RunCommand, tmp_path: Path) -> None:
    (tmp_path / spec.MANIFEST).write_text(json.dumps(manifest("int4", "onnx", "fp16").sealed()))
    large = run("plan", tmp_path, "--device", "agx-orin-32gb").stdout
    assert "building the engine\n  takes about 16.2 GiB of the CPU's memory, 30.1 GiB are available\n" in large
    small = run("plan", tmp_path, "--device", "orin-nx-16gb").stdout
    assert "add swap on a disk for it, or build it on another machine and copy the bundle" in small
    assert "takes about 16.2 GiB of the CPU's memory\n" in run("plan", tmp_path, "--device", "rtx3060").stdout


@pytest.mark.parametrize("device", ["this", "cpu"])
def test_this_machine(run: RunCommand, bundle_a1: Path, device: str) -> None:
    usual, onnxruntime = (
        run("plan", bundle_a1, "--device", device, "--json", *backend) for backend in ((), ("--backend", "onnxruntime"))
    )
    assert usual.exit_code == onnxruntime.exit_code == 0
    record = json.loads(usual.stdout)
    assert record["fits"]
    assert record["runner"] == ("native" if is_installed() else "onnxruntime-cpu")
    assert json.loads(onnxruntime.stdout)["runner"] == "onnxruntime-cpu"


def test_which_gpu_of_this_machine(
    run: RunCommand, gpu_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("plan", gpu_folder, "--json")
    assert "owl2: no GPU is found" in result.stderr
    assert json.loads(result.stdout)["device"]["name"] == "cpu"
    nvidia_smi(tmp_path, "NVIDIA L4, 23034, 22000, 8.9")
    result = run("plan", gpu_folder)
    assert (result.stderr, result.exit_code) == ("", 0)
    # The first one, as engines are built for it and sessions use it, though the other has more memory.
    nvidia_smi(tmp_path, "NVIDIA L4, 23034, 22000, 8.9", "NVIDIA H100 80GB HBM3, 81559, 81000, 9.0")
    result = run("plan", gpu_folder, "--json")
    assert result.stderr == "owl2: 2 GPUs are found; planning for number 0, NVIDIA L4\n"
    assert json.loads(result.stdout)["available"] == 22000 << 20


def test_list(run: RunCommand) -> None:
    text, record = run("plan", "--list").stdout, json.loads(run("plan", "--list", "--json").stdout)
    assert all(name in text for name in PRODUCTS)
    assert set(PRODUCTS) < {entry["name"] for entry in record}


def test_a_mistake(run: RunCommand, folder: Path) -> None:
    result = run("plan", folder, "--device", "rtx1")
    assert result.exit_code == 1
    assert "owl2: error: device 'rtx1' is not known; known: this, gpu, cpu, orin-nano-4gb" in result.stderr


def test_no_bundle(run: RunCommand) -> None:
    result = run("plan")
    assert result.exit_code == 2
    assert "give a bundle to plan for, or --list" in result.stderr
