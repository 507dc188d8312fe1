"""Fixtures that all tests share."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from owl2 import Owl2
from owl2.export.checkpoint.hf_config import model_config
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.backends.native.support import is_installed
from owl2.runtime.bundle import content_digest
from owl2.runtime.cli.commands import cli
from owl2.runtime.spec import MANIFEST, TOKENIZER_FILES
from owl2.runtime.verification import OnBlock, hash_file

# Tests send these to processes and to themselves; whoever starts the tests may ignore them, as nohup does.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The matrices here are tiny; threads that wait for each other only cost time on a busy machine.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
NEEDS_NATIVE = pytest.mark.skipif(not is_installed(), reason="this installation has no native core")
BACKENDS = ["onnxruntime", pytest.param("native", marks=NEEDS_NATIVE)]
MakeCheckpoint = Callable[..., Path]
RunCommand = Callable[..., Result]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the sample bundle as slow: it is exported with GPTQ."""
    for item in items:
        if "sample_bundle" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what is remembered of verified files out of the user's own cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the data recorded from the original implementation."""
    return GOLDEN


def _bundle(factory: pytest.TempPathFactory, checkpoint: Path, **settings: Any) -> Path:
    target = factory.mktemp("bundles") / "bundle"
    export_bundle(ExportConfig(checkpoint, target, **settings))
    return target


@pytest.fixture(scope="session")
def bundle_a1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden a1 as a float32 bundle."""
    return _bundle(tmp_path_factory, GOLDEN / "a1_base_bin" / "model", weights="fp32")


@pytest.fixture(scope="session")
def bundle_a2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden a2 as a float32 bundle."""
    return _bundle(tmp_path_factory, GOLDEN / "a2_fp16_safetensors" / "model", weights="fp32")


@pytest.fixture(scope="session")
def bundle_a1_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden a1 as a float32 bundle of standard operators."""
    return _bundle(tmp_path_factory, GOLDEN / "a1_base_bin" / "model", weights="fp32", dialect="onnx")


@pytest.fixture(scope="session")
def bundle_a2_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden a2 as a float32 bundle of standard operators."""
    return _bundle(tmp_path_factory, GOLDEN / "a2_fp16_safetensors" / "model", weights="fp32", dialect="onnx")


@pytest.fixture(scope="session")
def owl(bundle_a1: Path) -> Owl2:
    """Golden a1, loaded."""
    return Owl2.load(bundle_a1)


@pytest.fixture
def copy(bundle_a1: Path, tmp_path: Path) -> Path:
    """Golden a1's bundle, which a test may damage."""
    return Path(shutil.copytree(bundle_a1, tmp_path / "bundle"))


def flip_byte(path: Path) -> None:
    """Damage a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, **changes: object) -> None:
    """Replace keys of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Replace keys of a bundle's manifest, and let its digest agree."""
    write_manifest(bundle, json.loads((bundle / MANIFEST).read_text()) | changes)


def write_manifest(bundle: Path, content: dict[str, Any]) -> None:
    """Write a manifest of any content, with the digest of it."""
    content = {key: value for key, value in content.items() if key != "digest"}
    (bundle / MANIFEST).write_text(json.dumps(content | {"digest": content_digest(content)}))


def rehash(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    path = bundle / name
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit_manifest(bundle, files=files | {name: {"size": path.stat().st_size, "sha256": hash_file(path)}})


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []

    def counted(path: Path, on_block: OnBlock = int) -> str:
        names.append(path.name)
        return hash_file(path, on_block)

    monkeypatch.setattr("owl2.runtime.verification.hash_file", counted)
    return names


@pytest.fixture
def run() -> RunCommand:
    """Run ``owl2`` with arguments of any type, in this process; ``stdin`` is a text."""

    def invoke(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin, prog_name="owl2")

    return invoke


@pytest.fixture(scope="session")
def sample_checkpoint(request: pytest.FixtureRequest) -> Path:
    """The trained sample model in the official layout."""
    return Path(request.config.rootpath) / "sample" / "checkpoint"


@pytest.fixture(scope="session")
def sample_bundle(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Path:
    """The sample model as a user gets it without any option: int4, GPTQ, built-in calibration."""
    return _bundle(tmp_path_factory, sample_checkpoint)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Write a random checkpoint like golden a1 with some keys of its config.json changed."""

    def make(
        top: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        abstractor: dict[str, Any] | None = None,
        crop_size: int | None = None,
    ) -> Path:
        source, folder = GOLDEN / "a1_base_bin" / "model", tmp_path / "checkpoint"
        folder.mkdir()
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            shutil.copy(source / name, folder / name)
        config = json.loads((source / "config.json").read_text())
        config.update(top or {})
        config["visual_config"]["visual_model"].update(vision or {})
        config["visual_config"]["visual_abstractor"].update(abstractor or {})
        preprocessor = json.loads((source / "preprocessor_config.json").read_text())
        if crop_size is not None:
            preprocessor.update(size=crop_size, crop_size=crop_size)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        torch.manual_seed(7)
        model = Owl2Model(model_config(config, preprocessor, {}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.12)
        tied = model.config.decoder.tie_word_embeddings
        weights = {n: t.contiguous() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
