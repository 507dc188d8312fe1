"""The golden prompts of a bundle, their limits, and files that only claim to hold them."""

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand, rehash

from owl2 import Owl2, verify
from owl2.export.checks.goldens import FLOAT_LIMIT_FLOOR, LIMIT_FACTOR, LIMIT_FLOOR
from owl2.quant.calibration.samples import probe_samples
from owl2.runtime import spec
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import BundleCorruptError
from owl2.runtime.evaluation.divergence import row_kl
from owl2.runtime.evaluation.goldens import read_baselines, read_goldens, write_goldens

NAMES = ["text", "one picture", "two pictures"]


class TestGoldens:
    def test_content(self, sample_bundle: Path, owl: Owl2) -> None:
        bundle = Bundle.open(sample_bundle)
        goldens, _ = read_goldens(bundle)
        assert [golden.name for golden in goldens] == NAMES
        assert [len(golden.images) for golden in goldens] == [0, 1, 2]
        tokenizer = owl.model.tokenizer
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
        for golden in read_goldens(Bundle.open(bundle_a1))[0]:
            logits = owl.logits(golden.prompt, images=list(golden.images))
            assert golden.positions[-1] == len(logits) - 1
            np.testing.assert_allclose(logits[golden.positions], golden.logits, atol=1e-4)
        for entry in read_baselines(Bundle.open(bundle_a1), ()).values():
            assert entry.kl < 1e-9
            assert entry.limit == FLOAT_LIMIT_FLOOR

    def test_they_measure_the_device_and_not_the_quantization(self, sample_bundle: Path) -> None:
        report = json.loads((sample_bundle / spec.REPORT).read_text())
        assert [entry["name"] for entry in report["goldens"]] == NAMES
        for entry in report["goldens"]:
            assert 0 < entry["kl"] < report["accuracy"]["kl_text"] / 5
            assert entry["limit"] == max(LIMIT_FLOOR, LIMIT_FACTOR * entry["kl"])

    def test_the_same_goldens_give_the_same_file(self, sample_bundle: Path, tmp_path: Path) -> None:
        goldens, facts = read_goldens(Bundle.open(sample_bundle))
        assert facts is not None
        write_goldens(tmp_path / "again.npz", goldens, facts)
        assert (tmp_path / "again.npz").read_bytes() == (sample_bundle / spec.GOLDENS).read_bytes()


def test_the_expected_logits_do_not_depend_on_fast_kernels(sample_bundle: Path) -> None:
    """Full runs of the bundle come as near as the report says, and not nearer by accident."""
    owl = Owl2.load(sample_bundle, backend="onnxruntime")
    baselines = read_baselines(Bundle.open(sample_bundle), ())
    for golden in read_goldens(Bundle.open(sample_bundle))[0]:
        logits = owl.logits(golden.prompt, images=list(golden.images))[golden.positions]
        assert float(row_kl(golden.logits, logits).mean()) == pytest.approx(baselines[golden.name].kl, rel=0.5)


def rewrite(bundle: Path, **changes: object) -> None:
    """Replace arrays of the goldens' file; None removes one."""
    path = bundle / spec.GOLDENS
    with np.load(path) as file:
        arrays = dict(file)
    for name, value in changes.items():
        key = name.replace("_", ".") if name[0].isdigit() else name
        arrays = {k: v for k, v in arrays.items() if k != key} | ({} if value is None else {key: value})
    np.savez(path, **arrays)
    rehash(bundle, spec.GOLDENS)


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"0_logits": np.zeros((8, 3), np.float32)}, r"the logits of prompt 0 are \(8, 3\), not"),
            ({"0_logits": np.zeros(8)}, "'0.logits' has type <f8, expected <f4"),
            ({"0_logits": np.array([{}])}, "'0.logits' has type |O"),
            ({"0_positions": np.array([3, 2])}, "the positions of prompt 0 do not rise"),
            ({"0_positions": np.array([1 << 40])}, "the positions of prompt 0 do not rise"),
            ({"0_positions": np.zeros(0, np.int64)}, "the positions of prompt 0 do not rise"),
            ({"0_prompt": None}, "KeyError|0.prompt|2.prompt"),
            ({"1_ids": None}, "1.ids"),
            ({"extra": np.zeros(3)}, "'extra' has type"),
            ({"0_prompt": np.array([255], np.uint8)}, "codec can't decode"),
            ({"0_name": np.array([255], np.uint8)}, "codec can't decode"),
            ({"0_prompt": np.zeros(1 << 17, np.uint8)}, "prompt 0 has more than 65536 bytes"),
            ({"1_pixels": None}, "'1.pixels' is missing"),
            ({"1_pixels": np.zeros((2, 32), np.uint8)}, r"the digests of the images of prompt 1 are \[2, 32\]"),
            ({"angles": None}, "'angles' is missing"),
            ({"angles": np.zeros((3, 8), np.float32)}, "its facts about the model have wrong shapes"),
            ({"end_ids": np.zeros(100, np.int64)}, "its facts about the model have wrong shapes"),
            ({"lengths": np.array([1, 2, 3, 1 << 40])}, "its lengths of sequences are impossible"),
        ],
    )
    def test_arrays(self, copy: Path, changes: dict[str, object], message: str) -> None:
        rewrite(copy, **changes)
        with pytest.raises(
            BundleCorruptError, match=rf"goldens.npz cannot be read as golden prompts: .*({message}).*export the bundle"
        ):
            verify(copy)

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

    @pytest.mark.parametrize("flag", [0x1, 0x40])
    def test_encrypted(self, copy: Path, flag: int) -> None:
        path = copy / spec.GOLDENS
        content = bytearray(path.read_bytes())
        for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            start = content.find(mark) + place
            content[start : start + 2] = flag.to_bytes(2, "little")
        path.write_bytes(content)
        rehash(copy, spec.GOLDENS)
        with pytest.raises(BundleCorruptError, match=r"cannot be read as golden prompts: .*; export the bundle again"):
            verify(copy)

    def test_damage_is_one_sentence(self, copy: Path) -> None:
        path, rng = copy / spec.GOLDENS, random.Random(3)
        whole, bundle = path.read_bytes(), Bundle.open(copy)
        messages = []
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(rng.randrange(1, 8)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content)
            try:
                read_goldens(bundle)
            except BundleCorruptError as error:
                messages.append(str(error))
        assert len(messages) > 100
        assert not any("\n" in message for message in messages)

    def test_a_long_list_of_names(self, copy: Path) -> None:
        with zipfile.ZipFile(copy / spec.GOLDENS, "w") as archive:
            for index in range(6000):
                archive.writestr(f"{index}.npy", b"")
        rehash(copy, spec.GOLDENS)
        with pytest.raises(BundleCorruptError, match=r"its list of names takes \d+ bytes, at most 262144 are read"):
            read_goldens(Bundle.open(copy))

    @pytest.mark.parametrize("content", ["[" * 5000, '{"goldens": ' + "9" * 400 + "}", "", '{"goldens": {"a": 1}}'])
    def test_a_hostile_report(self, copy: Path, run: RunCommand, content: str) -> None:
        (copy / spec.REPORT).write_text(content)
        rehash(copy, spec.REPORT)
        with pytest.raises(BundleCorruptError, match=r"report\.json has no limits for golden prompts: .*; export"):
            verify(copy)
        assert run("info", copy).exit_code == 0

    def test_not_a_zip(self, copy: Path) -> None:
        (copy / spec.GOLDENS).write_bytes(b"nothing")
        rehash(copy, spec.GOLDENS)
        with pytest.raises(BundleCorruptError, match="golden prompts: it does not end as a plain zip archive"):
            read_goldens(Bundle.open(copy))

    @pytest.mark.parametrize("goldens", [None, 3, [], [{"name": "text"}], [{"name": "text", "kl": "low"}]])
    def test_a_report_without_limits(self, copy: Path, goldens: object) -> None:
        report = json.loads((copy / spec.REPORT).read_text())
        (copy / spec.REPORT).write_text(json.dumps(report | {"goldens": goldens}))
        rehash(copy, spec.REPORT)
        with pytest.raises(BundleCorruptError, match=r"report\.json has no limits"):
            verify(copy)
