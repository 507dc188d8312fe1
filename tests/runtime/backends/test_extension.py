"""A backend from outside the package: a distribution with an entry point, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from owl2 import Answer, BackendError, BackendUnavailableError, ConfigError, Owl2

MODULE = '''
"""The CPU's sessions behind an engine of its own, which takes few positions at a time and few in all."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from owl2.runtime.backends.choose import OpenEngine
from owl2.runtime.backends.ort.engine import OrtDecoder, OrtVision
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.engine import EngineOptions, own
from owl2.runtime.errors import BackendError
from owl2.runtime import spec

opened = []

@dataclass(frozen=True)
class ToyBuffers:
    inner: object

    @property
    def capacity(self):
        return self.inner.capacity

    @property
    def nbytes(self):
        return self.inner.nbytes

class ToyEngine:
    context, block, rows_are_independent = 100, 7, False

    def __init__(self, bundle):
        model, options = bundle.manifest.model, OrtOptions()
        self.decoder = OrtDecoder(bundle.decoder_graph(), model.decoder, options)
        self.vision = OrtVision(bundle.path(spec.VISION_GRAPH), model, options)
        self.steps = []
        opened.append(self)

    def encode_images(self, pixels, cancellation):
        return self.vision.encode_images(pixels, cancellation)

    def allocate(self, capacity, previous):
        return ToyBuffers(self.decoder.allocate(capacity, previous and own(previous, ToyBuffers).inner))

    def prefill(self, embeds, modality, past, buffers, logit_rows, cancellation):
        self.steps.append(len(embeds))
        inner = own(buffers, ToyBuffers).inner
        return self.decoder.prefill(embeds, modality, past, inner, logit_rows, cancellation)

    def decode(self, embeds, past, buffers, cancellation):
        self.steps.append(1)
        return self.decoder.decode(embeds, past, own(buffers, ToyBuffers).inner, cancellation)

    def close(self):
        del self.decoder, self.vision

def prepare(folder: Path, manifest: Manifest, options: EngineOptions) -> OpenEngine:
    if manifest.dialect != "ort":
        raise BackendError(f"{folder}: the toy runs graphs of the dialect ort only")
    return ToyEngine
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of an installed distribution that brings the device ``toy``."""
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[owl2.backends]\ntoy = toymodule:prepare\n")
    (tmp_path / "toymodule.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toymodule", raising=False)
    return tmp_path


@pytest.fixture
def image(golden: Path) -> Path:
    return golden / "images" / "00_rgb_landscape_97x61.png"


@pytest.mark.usefixtures("toy")
def test_a_model_answers_on_it(bundle_a1: Path, image: Path) -> None:
    def ask(owl: Owl2) -> Answer:
        return owl.chat().ask("What is it?", image, max_new_tokens=12)

    expected = ask(Owl2.load(bundle_a1))
    with Owl2.load(bundle_a1, device="toy:1") as owl:
        assert repr(owl).endswith("on toy:1, context 100>")
        answer = ask(owl)
        (engine,) = sys.modules["toymodule"].opened
    assert (answer.text, answer.ids) == (expected.text, expected.ids)
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    prompt, block = answer.stats.prompt_tokens, 7
    steps = [block] * (prompt // block) + [prompt % block] * (prompt % block > 0)
    assert engine.steps == steps + [1] * (len(answer.ids) - 1)
    assert not hasattr(engine, "decoder"), "closed with the model"


@pytest.mark.usefixtures("toy")
def test_its_refusals_and_limits_are_told(bundle_a1: Path, bundle_a1_onnx: Path) -> None:
    with pytest.raises(ConfigError, match="context 101 exceeds the 100 positions that the engine holds"):
        Owl2.load(bundle_a1, device="toy", context=101)
    with pytest.raises(BackendError, match="the toy runs graphs of the dialect ort only"):
        Owl2.load(bundle_a1_onnx, device="toy")


@pytest.mark.usefixtures("toy")
def test_a_wrong_name_lists_it(bundle_a1: Path) -> None:
    with pytest.raises(ConfigError, match=r"device 'tpu' is not known; use cpu, .*tensorrt-rtx\[:N\] or toy\[:N\]"):
        Owl2.load(bundle_a1, device="tpu")


@pytest.mark.usefixtures("toy")
def test_memory_of_an_unknown_kind_is_not_checked(
    bundle_a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least of all that of a GPU that happens to be there."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288, 0, 8.6'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Owl2.load(bundle_a1, device="toy").logits("Hi").any()


def test_one_that_cannot_be_imported(bundle_a1: Path, toy: Path) -> None:
    (toy / "toymodule.py").write_text("import part_of_a_toy")
    with pytest.raises(
        BackendUnavailableError, match="device toy: toymodule:prepare cannot be imported: No module named 'part_of"
    ):
        Owl2.load(bundle_a1, device="toy")


def test_the_commands_take_it(bundle_a1: Path, image: Path, toy: Path) -> None:
    def owl2(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "owl2.runtime", *arguments],
            env={"PYTHONPATH": str(toy), "PATH": "", "HOME": str(toy)},
            cwd=ROOT.anchor,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return result.stdout or result.stderr

    asked = ("ask", str(bundle_a1), "What is it?", "--image", str(image), "--max-new-tokens", "12")
    answer = owl2(*asked, "--device", "toy")
    assert answer.strip()
    assert answer == owl2(*asked)
    assert "toy[:N]" in owl2(*asked, "--device", "tpu")
