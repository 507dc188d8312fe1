"""The certificate of a bundle: a whole one passes on this machine, and wrong weights fail whatever the hashes say."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from isolation import BLOCKED

from owl2 import Owl2
from owl2.export.checks.certificate import FLOAT_LIMIT_FLOOR, LIMIT_FACTOR, LIMIT_FLOOR
from owl2.quant.calibration.samples import probe_samples
from owl2.runtime import spec
from owl2.runtime.__main__ import cli
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import BundleCorruptError
from owl2.runtime.evaluation.divergence import row_kl
from owl2.runtime.evaluation.verify import Golden, read_goldens, read_limits, verify, write_goldens
from owl2.runtime.placement import Placement
from owl2.runtime.verification import hash_file

NAMES = ["text", "one picture", "two pictures"]


@pytest.fixture
def copy(sample_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(sample_bundle, tmp_path / "bundle"))


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, args)], prog_name="owl2")


def rehash(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    manifest = json.loads((bundle / spec.MANIFEST).read_text())
    path = bundle / name
    manifest["files"][name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    (bundle / spec.MANIFEST).write_text(json.dumps(manifest))


class TestGoldens:
    def test_what_they_hold(self, sample_bundle: Path) -> None:
        bundle = Bundle.open(sample_bundle)
        goldens = read_goldens(bundle)
        assert [golden.name for golden in goldens] == NAMES
        assert [len(golden.images) for golden in goldens] == [0, 1, 2]
        tokenizer = Owl2.load(sample_bundle)._model.tokenizer
        for golden, sample in zip(goldens, probe_samples()):
            assert golden.prompt == sample.prompt
            assert golden.ids.tolist() == tokenizer.encode_prompt(sample.prompt)
            for image, original in zip(golden.images, sample.images):
                np.testing.assert_array_equal(image, np.asarray(original))
            assert golden.logits.shape == (8, bundle.manifest.model.decoder.vocab_size)
        assert (sample_bundle / spec.GOLDENS).stat().st_size < 200_000

    def test_a_float_bundle_reaches_them_by_another_way(self, bundle_a1: Path) -> None:
        """The public face of the runtime gives the expected logits at the expected positions."""
        owl = Owl2.load(bundle_a1)
        for golden in read_goldens(Bundle.open(bundle_a1)):
            made = owl.logits(golden.prompt, images=list(golden.images))
            assert golden.positions[-1] == len(made) - 1
            np.testing.assert_allclose(made[golden.positions], golden.logits, atol=1e-4)
        for entry in read_limits(Bundle.open(bundle_a1), ()).values():
            assert entry.kl < 1e-9
            assert entry.limit == FLOAT_LIMIT_FLOOR

    def test_they_measure_the_device_and_not_the_quantization(self, sample_bundle: Path) -> None:
        report = json.loads((sample_bundle / spec.REPORT).read_text())
        assert [entry["name"] for entry in report["goldens"]] == NAMES
        for entry in report["goldens"]:
            assert 0 < entry["kl"] < report["accuracy"]["kl_text"] / 5
            assert entry["limit"] == max(LIMIT_FLOOR, LIMIT_FACTOR * entry["kl"])

    def test_the_same_goldens_give_the_same_file(self, sample_bundle: Path, tmp_path: Path) -> None:
        write_goldens(tmp_path / "again.npz", read_goldens(Bundle.open(sample_bundle)))
        assert (tmp_path / "again.npz").read_bytes() == (sample_bundle / spec.GOLDENS).read_bytes()


class TestVerify:
    @pytest.mark.parametrize("name", ["sample_bundle", "bundle_a1", "bundle_a2"])
    def test_a_fresh_bundle_passes(self, name: str, request: pytest.FixtureRequest) -> None:
        folder = request.getfixturevalue(name)
        result = run(folder, "--json", "--threads", 1)
        assert result.exit_code == 0
        record = json.loads(result.stdout)
        assert record["passed"]
        assert record["problems"] == []
        assert record["replay_seconds"] > 0
        for replay in record["goldens"]:
            assert replay["passed"]
            # The exporting machine is this one.
            assert replay["kl"] == pytest.approx(replay["exported_kl"], rel=1e-2, abs=1e-9)

    def test_the_table(self, sample_bundle: Path) -> None:
        result = run(sample_bundle)
        assert result.exit_code == 0
        assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:4]] == NAMES
        assert result.stdout.endswith("\npass\n")
        assert "all files verified; loaded in " in result.stdout

    @pytest.mark.parametrize("file", ["decoder.onnx.data", "vision.onnx.data", "embeddings.bin"])
    def test_wrong_weights_fail_though_the_hashes_hold(self, copy: Path, file: str) -> None:
        path = copy / file
        content = bytearray(path.read_bytes())
        start = len(content) // 3
        region = slice(start, start + len(content) // 8)
        content[region] = content[region][::-1]
        path.write_bytes(content)
        rehash(copy, file)
        Bundle.open(copy)  # the hashes say that everything is well
        verdict = verify(copy, Placement())
        assert not verdict.passed
        assert not verdict.problems
        result = run(copy)
        assert result.exit_code == 1
        assert result.stdout.endswith("\nFAIL\n")

    def test_a_changed_file_fails_before_anything_runs(self, copy: Path) -> None:
        path = copy / "decoder.onnx.data"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        result = run(copy)
        assert result.exit_code == 1
        assert "decoder.onnx.data was changed (its sha256 differs)" in result.stdout
        assert result.stdout.endswith("\nFAIL\n")
        record = json.loads(run(copy, "--json").stdout)
        assert not record["passed"]
        assert record["goldens"] == []

    def test_another_tokenizer_is_told(self, copy: Path) -> None:
        goldens = list(read_goldens(Bundle.open(copy)))
        goldens[0] = Golden(**{**vars(goldens[0]), "ids": goldens[0].ids[::-1].copy()})
        write_goldens(copy / spec.GOLDENS, goldens)
        rehash(copy, spec.GOLDENS)
        result = run(copy)
        assert result.exit_code == 1
        assert "text          FAIL: the tokenizer divides the prompt differently" in result.stdout
        assert json.loads(run(copy, "--json").stdout)["goldens"][0]["kl"] is None

    def test_without_torch(self, bundle_a1: Path) -> None:
        script = BLOCKED + (
            "from owl2.runtime.__main__ import main\n"
            f"sys.argv = ['owl2', 'verify', {str(bundle_a1)!r}]\n"
            "try:\n    main()\nfinally:\n    assert not {'torch', 'onnx'} & set(sys.modules)\n"
        )
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.sep, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith("\npass\n")

    def test_no_bundle(self, tmp_path: Path) -> None:
        result = run(tmp_path)
        assert result.exit_code == 1
        assert result.stderr.startswith("owl2: error: ")


def rewritten(bundle: Path, **changes: object) -> None:
    """Replace arrays of the goldens' file; None removes one."""
    path = bundle / spec.GOLDENS
    with np.load(path) as file:
        arrays = dict(file)
    for name, value in changes.items():
        key = name.replace("_", ".")
        arrays = {k: v for k, v in arrays.items() if k != key} | ({} if value is None else {key: value})
    np.savez(path, **arrays)
    rehash(bundle, spec.GOLDENS)


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"0_logits": np.zeros((8, 3), np.float32)}, r"the logits of prompt 0 are \(8, 3\), not"),
            ({"0_logits": np.zeros(8)}, "0.logits has type <f8, expected <f4"),
            ({"0_logits": np.array([{}])}, "0.logits has type |O"),
            ({"0_positions": np.array([3, 2])}, "the positions of prompt 0 do not rise"),
            ({"0_positions": np.array([1 << 40])}, "the positions of prompt 0 do not rise"),
            ({"0_positions": np.zeros(0, np.int64)}, "the positions of prompt 0 do not rise"),
            ({"0_prompt": None}, "KeyError|0.prompt|2.prompt"),
            ({"1_ids": None}, "1.ids"),
            ({"extra": np.zeros(3)}, "extra has type"),
            ({"0_prompt": np.array([255], np.uint8)}, "codec can't decode"),
        ],
    )
    def test_arrays(self, copy: Path, changes: dict[str, object], message: str) -> None:
        rewritten(copy, **changes)
        with pytest.raises(
            BundleCorruptError, match=rf"goldens.npz is no certificate: .*({message}).*export the bundle"
        ):
            verify(copy, Placement())

    def test_an_array_larger_than_its_file(self, copy: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)}
        )
        with zipfile.ZipFile(copy / spec.GOLDENS, "w") as archive:
            archive.writestr("0.logits.npy", header.getvalue())
        rehash(copy, spec.GOLDENS)
        with pytest.raises(BundleCorruptError, match=r"does not hold the .* values it claims"):
            read_goldens(Bundle.open(copy))

    def test_a_file_that_unpacks_to_too_much(self, copy: Path) -> None:
        with zipfile.ZipFile(copy / spec.GOLDENS, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("0.logits.npy", bytes(200 << 20))
        rehash(copy, spec.GOLDENS)
        with pytest.raises(BundleCorruptError, match=r"its arrays take \d+ bytes, at most"):
            read_goldens(Bundle.open(copy))

    def test_no_zip(self, copy: Path) -> None:
        (copy / spec.GOLDENS).write_bytes(b"nothing")
        rehash(copy, spec.GOLDENS)
        with pytest.raises(BundleCorruptError, match="is no certificate: File is not a zip file"):
            read_goldens(Bundle.open(copy))

    @pytest.mark.parametrize("goldens", [None, 3, [], [{"name": "text"}], [{"name": "text", "kl": "low"}]])
    def test_a_report_without_limits(self, copy: Path, goldens: object) -> None:
        report = json.loads((copy / spec.REPORT).read_text())
        (copy / spec.REPORT).write_text(json.dumps(report | {"goldens": goldens}))
        rehash(copy, spec.REPORT)
        with pytest.raises(BundleCorruptError, match=r"report\.json holds no certificate"):
            verify(copy, Placement())


def test_the_expected_logits_do_not_depend_on_fast_kernels(sample_bundle: Path) -> None:
    """Full runs of the bundle come as near as the report says, and not nearer by accident."""
    owl = Owl2.load(sample_bundle)
    limits = read_limits(Bundle.open(sample_bundle), ())
    for golden in read_goldens(Bundle.open(sample_bundle)):
        made = owl.logits(golden.prompt, images=list(golden.images))[golden.positions]
        assert float(row_kl(golden.logits, made).mean()) == pytest.approx(limits[golden.name].kl, rel=0.5)
