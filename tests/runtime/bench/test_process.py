"""What a benchmark leaves to new processes, and what it refuses before it begins."""

import os
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import RunCommand, edit_manifest
from isolation import BLOCKED

import owl2
from owl2 import ConfigError, ContextOverflowError
from owl2.runtime.bench.process import ProcessError, lines_of
from owl2.runtime.bench.result import Roof
from owl2.runtime.bench.shapes import shape_bundle
from owl2.runtime.bench.workload import Workload
from owl2.runtime.bundle import read_manifest
from owl2.runtime.engine import EngineOptions
from owl2.runtime.load import open_bundle


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_bundle("small", tmp_path_factory.mktemp("shapes"))


def test_the_folder_at_hand_is_not_imported_from(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('taken from the folder at hand')")
    monkeypatch.chdir(tmp_path)
    (line,) = lines_of("owl2.runtime.bench.fresh", [str(small), "", "1", ""])
    assert "first_token" in line


def test_a_failure_is_its_last_line() -> None:
    with pytest.raises(ProcessError, match=r"^TypeError: main\(\) missing 4 required positional arguments"):
        list(lines_of("owl2.runtime.bench.fresh", []))


def test_a_process_ends_with_its_iterator(tmp_path: Path) -> None:
    with closing(lines_of("owl2.runtime.bench.shapes", ["small", str(tmp_path / "bundle")])) as lines:
        assert '"done": 1' in next(lines)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nobody is left to wait for


def test_torch_stays_out_of_the_process_that_measures(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from owl2.runtime.bench.shapes import shape_bundle; "
        "shape_bundle('small', Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_shape_needs_the_export_half(tmp_path: Path) -> None:
    code = f"{BLOCKED}\nfrom owl2.runtime.bench.shapes import main\nmain('small', {str(tmp_path / 'bundle')!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == '{"missing": "owl2.export is not installed on a device"}\n'


@pytest.mark.parametrize("short", [False, True])
def test_the_context_it_asks_for_is_the_least_that_does(small: Path, short: bool) -> None:
    least = Workload(open_bundle(small, EngineOptions())[1]).positions
    _, model = open_bundle(small, EngineOptions(threads=1, context=least - short))
    with closing(model):
        if short:
            with pytest.raises(ContextOverflowError):
                Workload(model).conversation()
        else:
            first, second = Workload(model).conversation()
            assert (first.stats.images_encoded, second.stats.images_encoded) == (1, 0)
            assert second.stats.reused_tokens == first.stats.prompt_tokens


def test_a_context_that_is_too_short_is_refused_first(run: RunCommand, small: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    model = read_manifest(bundle).model
    edit_manifest(bundle, model=asdict(replace(model, decoder=replace(model.decoder, max_position_embeddings=49))))
    result = run("bench", bundle)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "asks two questions about an image, 50 positions, and this model allows 49; give a bundle" in result.stderr


def test_a_misspelt_argument() -> None:
    with pytest.raises(ConfigError, match="round is not an argument of bench; did you mean rounds"):
        owl2.bench("bundle", round=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("speed.doc", "its name must end with one of "), ("no/speed.png", "its folder does not exist")],
)
def test_a_plot_that_cannot_be_written_is_refused_first(
    run: RunCommand, tmp_path: Path, name: str, problem: str
) -> None:
    result = run("bench", tmp_path / "no bundle", "--plot", tmp_path / name)
    assert (result.exit_code, problem in result.stderr) == (1, True)


def test_floating_point_weights_are_compared_with_the_fp32_peak(bundle_a1: Path, small: Path) -> None:
    for bundle, peak in ((bundle_a1, "fp32"), (small, "int8")):
        result = owl2.bench(bundle, threads=1, rounds=1)
        assert result.arithmetic == peak
        if result.roof is not None:
            one = result.prefill[0]
            rate = one.multiply_adds / one.whole.median
            assert result.to_json()["prefill"][0]["share_of_peak"] == rate / getattr(result.roof, peak)


def test_the_roof_is_the_best_of_several_moments() -> None:
    assert Roof.best([Roof(1.0, 5.0, 3.0), Roof(2.0, 4.0, 6.0)]) == Roof(2.0, 5.0, 6.0)
    assert Roof.best([]) is None
