"""Loading a bundle for TensorRT: what cannot run is refused before anything large is read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunCommand
from fake_engines import VERSION, with_engines
from fake_tensorrt import FakeGpu, FakeTensorRt

from owl2 import BackendError, BackendUnavailableError, BundleError, ConfigError, InsufficientMemoryError, Owl2, verify
from owl2.runtime.backends.nvidia import driver_problem
from owl2.runtime.backends.tensorrt import engine
from owl2.runtime.bundle import Bundle
from owl2.runtime.placement import EngineKind


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
def test_engines_are_run_natively(float32: Bundle, gpu: FakeGpu, tmp_path: Path, kind: EngineKind) -> None:
    bundle = with_engines(float32.folder, tmp_path / "b", kind=kind, context=300, prefill=64)
    owl = Owl2.load(bundle.folder, device=f"{kind}:1")
    assert owl.generate("Hello", max_new_tokens=3).ids
    assert gpu.copies
    assert (gpu.name, owl.context) == ("GPU 1", 300)
    with pytest.raises(ConfigError, match="context 301 exceeds the 300 positions that this bundle's engines"):
        Owl2.load(bundle.folder, device=kind, context=301)


def test_golden_prompts_are_replayed_there(folder: Path, gpu: FakeGpu) -> None:
    verdict = verify(folder, device="tensorrt")
    assert verdict.passed, verdict
    assert gpu.launches > 0


@pytest.mark.parametrize(
    ("device", "capability", "version", "context", "error", "message"),
    [
        ("tensorrt-rtx", (8, 7), VERSION, None, BundleError, "has no engines of tensorrt-rtx"),
        ("tensorrt", (11, 0), VERSION, None, BackendUnavailableError, "are for other GPUs"),
        ("tensorrt", (8, 7), "10.7.0", None, BackendUnavailableError, "were built with tensorrt 10.3.0"),
        ("tensorrt", (8, 7), VERSION, 301, ConfigError, "context 301 exceeds the 300 positions"),
        ("cuda:1", (8, 7), VERSION, None, BackendError, "onnx on the CPU only, .* cuda:1 export .* --dialect ort"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_large_is_read(
    float32: Bundle,
    gpu: FakeGpu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int],
    version: str,
    context: int | None,
    error: type[Exception],
    message: str,
) -> None:
    """So damage to files, which only reading them tells, is not what is told."""
    copy = with_engines(float32.folder, tmp_path / "b", context=300, prefill=64).folder
    for path in (copy / "decoder.onnx.data", copy / "engines" / "tensorrt-sm87" / "decoder.engine"):
        path.write_bytes(b"damaged")
    gpu.compute_capability = capability
    monkeypatch.setattr(engine, "import_tensorrt", lambda kind: FakeTensorRt(gpu, version))
    with pytest.raises(error, match=message):
        Owl2.load(copy, device=device, context=context)
    if context is None:
        with pytest.raises(error, match=message):
            verify(copy, device=device)


def test_a_bundle_with_engines_is_whole_without_onnxruntime(
    run: RunCommand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("info", folder)
    assert result.exit_code == 0, result.output
    assert "none installed" in result.stdout
    assert "TensorRT engines" in result.stdout


@pytest.mark.usefixtures("gpu")
def test_what_cannot_fit_the_gpu_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is allocated there; by what nvidia-smi says."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288, 2, 8.6'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InsufficientMemoryError, match="not enough memory"):
        Owl2.load(folder, device="tensorrt")
    with pytest.raises(InsufficientMemoryError, match="not enough memory"):
        verify(folder, device="tensorrt")
    assert verify(folder, device="tensorrt", check_memory=False).passed


class TestSettings:
    def test_the_other_dialect(self, bundle_a2: Path) -> None:
        with pytest.raises(ConfigError, match=r"device tensorrt runs engines .* dialect ort; .*--dialect onnx"):
            Owl2.load(bundle_a2, device="tensorrt")

    def test_int8_keys_and_values(self, float32: Bundle) -> None:
        with pytest.raises(ConfigError, match=r"kv_cache 'int8': this bundle offers fp32"):
            Owl2.load(float32.folder, device="tensorrt", kv_cache="int8")

    def test_threads(self, float32: Bundle) -> None:
        with pytest.raises(ConfigError, match="threads 2: device tensorrt has none to set"):
            Owl2.load(float32.folder, device="tensorrt", threads=2)


NOT_INSTALLED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onnxruntime":
            raise ImportError(f"{name} is blocked in this test", name=name)
sys.meta_path.insert(0, Blocker())
"""


class TestMissing:
    """Parts that this machine lacks, for real."""

    def test_the_package_of_cuda(self, float32: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
        with pytest.raises(BackendUnavailableError, match=r"cuda-python, which cannot be imported .*owl2\[tensorrt\]"):
            Owl2.load(float32.folder, device="tensorrt")

    def test_the_driver_and_onnx_runtime_which_engines_do_not_need(self, float32: Bundle) -> None:
        pytest.importorskip("cuda.bindings.runtime", reason="cuda-python has no wheel here")
        if not driver_problem(0):
            pytest.skip("there is a driver")
        script = NOT_INSTALLED + f"from owl2 import Owl2; Owl2.load({str(float32.folder)!r}, device='tensorrt')"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert re.search("BackendUnavailableError: engines cannot be run: .*libcuda.so.1", result.stderr), result.stderr
