"""Bundles with engines for a GPU that does not exist, and models that run them there."""

from pathlib import Path

import pytest
from fake_engines import FakeModel, Steps, build, with_engines
from fake_tensorrt import FakeGpu, FakeTensorRt
from PIL import Image

from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime.backends.tensorrt import engine
from owl2.runtime.bundle import Bundle


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Path:
    """The sample model in int4 and float16, with engines."""
    target = tmp_path_factory.mktemp("trt") / "bundle"
    export_bundle(ExportConfig(sample_checkpoint, target, method="rtn", dialect="onnx"))
    build(target)
    return target


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def float32(bundle_a2_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Golden a2 in float32, with engines."""
    return with_engines(bundle_a2_onnx, tmp_path_factory.mktemp("a2") / "bundle")


@pytest.fixture
def fake(float32: Bundle) -> FakeModel:
    return FakeModel(float32)


@pytest.fixture
def steps(float32: Bundle) -> Steps:
    return Steps(float32, 40)


@pytest.fixture
def image(request: pytest.FixtureRequest) -> Image.Image:
    with Image.open(request.config.rootpath / "sample" / "pictures" / "scene3.png") as opened:
        return opened.convert("RGB")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU and its TensorRT as if they were installed; its name tells which one was asked for."""
    gpu = FakeGpu()

    def open_gpu(index: int) -> FakeGpu:
        gpu.name = f"GPU {index}"
        return gpu

    monkeypatch.setattr(engine, "open_gpu", open_gpu)
    monkeypatch.setattr(engine, "import_tensorrt", lambda kind: FakeTensorRt(gpu, rtx=kind == "tensorrt-rtx"))
    return gpu
