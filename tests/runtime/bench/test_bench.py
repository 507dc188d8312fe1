"""``owl2 bench`` on the sample bundle and on a small random one; figures of speed are only related to each other."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from conftest import BACKENDS, NEEDS_NATIVE, RunCommand
from PIL import Image

import owl2
from owl2 import BenchProgress, BundleError, ConfigError
from owl2.runtime.backends.native.support import is_installed
from owl2.runtime.bench.bench import _load
from owl2.runtime.bench.result import Spread
from owl2.runtime.bench.shapes import SHAPES, shape_bundle
from owl2.runtime.bench.workload import multiply_adds, process_memory
from owl2.runtime.bundle import Bundle, read_manifest
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import BackendName
from owl2.runtime.errors import BackendError


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_multiply_adds_of_7b() -> None:
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert multiply_adds(DecoderConfig(), 10) == 10 * layers + 4096 * 32000


def test_memory_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/smaps_rollup").write_text("000-fff ---p 0 0 [rollup]\nRss:  1000 kB\nAnonymous:   300 kB\n")
    found = process_memory(7, tmp_path)
    assert found is not None
    assert (found.private, found.mapped, found.kv_cache) == (300 * 1024, 700 * 1024, 7)
    assert process_memory(7, tmp_path / "nowhere") is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_figure_is_there(sample_bundle: Path, backend: BackendName) -> None:
    told: list[BenchProgress] = []
    result = owl2.bench(sample_bundle, backend=backend, threads=1, rounds=2, progress=told.append)
    assert [progress.done for progress in told] == list(range(told[0].total))
    assert (result.backend, result.threads) == (backend, 1)
    assert [one.tokens for one in result.prefill] == [32, 128, 512]
    assert [one.context for one in result.decode] == [128, 1023]  # the model's context is 1024
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (result.kernels is None) == (backend == "onnxruntime")
    assert (result.roof is None) == (not is_installed())
    for one in record["decode"]:
        assert one["tokens_per_second"] * one["step"]["median"] == pytest.approx(1)
        if result.roof is not None:
            assert one["share_of_bandwidth"] > 0
    reads = [one.bytes_read for one in result.decode]
    per_position = read_manifest(sample_bundle).kv_bytes("fp16" if backend == "native" else "fp32")
    assert reads[1] - reads[0] == (1023 - 128) * per_position
    assert result.load_to_first_token.median > result.load.median > 0
    assert result.first_question.median > result.vision.median > 0


class TestShape:
    def test_it_is_written_once_and_answers(self, tmp_path: Path) -> None:
        told: list[tuple[int, int]] = []
        folder = shape_bundle("small", tmp_path, lambda done, total: told.append((done, total)))
        assert told[-1][0] == told[-1][1] == len(told)
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        assert shape_bundle("small", tmp_path, lambda *_: pytest.fail("written again")) == folder
        with owl2.Owl2.load(folder) as owl:
            logits = owl.logits("hello")
            assert logits.shape[1] == 512
            assert 0.1 < float(logits.std()) < 10  # neither vanishes nor explodes
            assert len(owl.generate("hello", max_new_tokens=5).ids) == 5

    def test_it_is_like_an_export(self, tmp_path: Path, sample_bundle: Path) -> None:
        made, exported = (Bundle.open(one) for one in (shape_bundle("small", tmp_path), sample_bundle))
        assert made.manifest.weights.decoder == exported.manifest.weights.decoder
        names = [set(bundle.tensors("decoder.onnx")) for bundle in (made, exported)]
        layer = {name for name in names[1] if name.startswith("layers.0.")}
        assert layer == {name for name in names[0] if name.startswith("layers.0.")}

    def test_an_interrupt_leaves_nothing(self, tmp_path: Path) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            shape_bundle("small", tmp_path, stop)
        assert not list(tmp_path.iterdir())

    def test_mistakes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match="shape '70b' is not known; known: 7b, small"):
            shape_bundle("70b", tmp_path)
        monkeypatch.setitem(SHAPES, "small", 1 << 60)
        with pytest.raises(ConfigError, match=r"takes 1073741824.0 GiB, .* left; give another folder with --scratch"):
            shape_bundle("small", tmp_path)


class TestCommand:
    def bench(self, run: RunCommand, *arguments: object) -> Result:
        return run("bench", *arguments, "--rounds", 1, "--threads", 1)

    def test_table_and_plot(self, run: RunCommand, sample_bundle: Path, tmp_path: Path) -> None:
        result = self.bench(run, sample_bundle, "--plot", tmp_path / "speed.png")
        assert result.exit_code == 0, result.output
        for title in ("times", "prefill", "decode"):
            assert f"\n{title}\n" in result.stdout
        assert re.search(r"\n +1023 ", result.stdout)
        with Image.open(tmp_path / "speed.png") as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10

    @NEEDS_NATIVE
    def test_json_of_a_shape(self, run: RunCommand, tmp_path: Path) -> None:
        result = self.bench(run, "--shape", "small", "--scratch", tmp_path, "--kv-cache", "int8", "--json")
        record = json.loads(result.stdout)
        assert (record["backend"], record["kv_cache"]) == ("native", "int8")
        assert all(not math.isnan(one["tokens_per_second"]) for one in record["decode"])

    def test_mistakes(self, run: RunCommand, sample_bundle: Path, tmp_path: Path) -> None:
        assert "give a bundle, or --shape" in self.bench(run).stderr
        assert "give a bundle, or --shape" in self.bench(run, sample_bundle, "--shape", "small").stderr
        assert run("bench", sample_bundle, "--rounds", 0).stderr.endswith("rounds must be positive, got 0\n")
        assert "is missing" in self.bench(run, tmp_path).stderr
        with pytest.raises(BundleError):
            owl2.bench(tmp_path)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"a new process could not load .*owl2\.json is missing"):
        _load(tmp_path, ("onnxruntime", "", ""))


def test_nothing_of_it_is_imported_with_owl2() -> None:
    code = "import owl2, sys; print(any(name.startswith('owl2.runtime.bench') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
