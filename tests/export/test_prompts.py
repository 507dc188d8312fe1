"""What the quantizer sees and what is kept from it, whatever data the user gives."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeCheckpoint
from PIL import Image
from torch import Tensor

from owl2.export import prompts
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checks.sensitivity import VisionPart, measure_parts
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.export.prompts import Prompts, as_scored, digests
from owl2.export.report import Accuracy, CalibrationRecord
from owl2.quant.calibration import builtin
from owl2.quant.calibration.samples import CalibrationSet, Sample, builtin_set
from owl2.quant.config import Method
from owl2.quant.models.mplug_owl2 import VisionModel, VisualAbstractor
from owl2.runtime.bundle import read_manifest
from owl2.runtime.errors import CalibrationError
from owl2.runtime.evaluation.divergence import Divergence
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import prepare_images
from owl2.runtime.preprocess import digest
from owl2.runtime.scoring.scale import load_preset


def test_calibration_is_cut_evenly_and_the_report_says_so(
    sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(builtin_set(), notes=())
    with Checkpoint(sample_checkpoint) as checkpoint:
        config, tokenizer = checkpoint.config, Tokenizer.load(sample_checkpoint)
        whole = prompts.prepare(data, config, tokenizer, calibrate=True)
        positions = sum(len(prompt.keys) for prompt in whole.calibration)
        monkeypatch.setattr(prompts, "MAX_ROW_BYTES", 4 * config.decoder.hidden_size * (positions // 3 + 1))
        part = prompts.prepare(data, config, tokenizer, calibrate=True)
    assert whole.notes == ()
    assert len(part.calibration) == len(whole.calibration) // 3
    assert part.images_of(part.calibration)
    assert part.calibration[0].keys == whole.calibration[0].keys
    assert part.calibration[-1].keys == whole.calibration[(len(part.calibration) - 1) * 3].keys
    (note,) = part.notes
    assert note.startswith(f"{len(part.calibration)} of {len(whole.calibration)} calibration samples were used")


def test_an_image_is_kept_however_small_the_room(sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_ROW_BYTES", 1)
    with Checkpoint(sample_checkpoint) as checkpoint:
        made = prompts.prepare(builtin_set(), checkpoint.config, Tokenizer.load(sample_checkpoint), calibrate=True)
    assert len(made.calibration) == 1
    assert made.images_of(made.calibration)


def divided(checkpoint: Path, *samples: Sample, calibrate: bool = True) -> Prompts:
    with Checkpoint(checkpoint) as opened:
        data = CalibrationSet("mine", samples)
        return prompts.prepare(data, opened.config, Tokenizer.load(checkpoint), calibrate=calibrate)


def about(name: str, *images: Path) -> Sample:
    return Sample("USER: " + "<|image|>" * len(images) + f"What about {name}? ASSISTANT: It is {name}.</s>", images)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Sixty-four different images."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(64)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    return paths


class TestHeldOut:
    def test_all_samples_of_an_image_are_on_one_side(self, sample_checkpoint: Path, images: list[Path]) -> None:
        """Files of other names with the same pixels are the same image."""
        copies = [Path(shutil.copy(path, path.with_name(f"copy of {path.name}"))) for path in images]
        made = divided(
            sample_checkpoint,
            *(about(f"{i}", path) for i, path in enumerate(images)),
            *(about(f"{i} again", path) for i, path in enumerate(copies)),
        )
        assert len(made.held_out) == 16
        assert len(made.calibration) == 112
        assert not set(digests(made.held_out)) & set(digests(made.calibration))

    def test_what_is_linked_through_others_stays_together(self, sample_checkpoint: Path, images: list[Path]) -> None:
        pairs = [about(f"{i}", *images[i : i + 2]) for i in range(0, 63, 4)]
        links = [about(f"{i} again", images[i + 1], images[i + 2]) for i in range(0, 62, 4)]
        made = divided(sample_checkpoint, *pairs, *links, *(about(f"{i}", images[i]) for i in range(3, 64, 4)))
        assert made.held_out
        assert not set(digests(made.held_out)) & set(digests(made.calibration))

    def test_a_text_is_known_by_its_first_question(self, sample_checkpoint: Path, images: list[Path]) -> None:
        asked = [Sample(f"USER: Why {i}? ASSISTANT: {j}.</s>") for j in range(2) for i in range(32)]
        made = divided(sample_checkpoint, about("it", images[0]), *asked)
        length = len(made.held_out[0].keys) - 4
        beginnings = [{tuple(prompt.keys[:length]) for prompt in part} for part in (made.held_out, made.calibration)]
        assert len(made.held_out) == 8
        assert not beginnings[0] & beginnings[1]
        assert any("none of the held-out samples has an image" in note for note in made.notes)

    def test_exact_copies_are_dropped_and_counted(self, sample_checkpoint: Path, images: list[Path]) -> None:
        samples = [about(f"{i}", path) for i, path in enumerate(images)]
        copy = about("3", Path(shutil.copy(images[3], images[3].with_name("copy.png"))))
        once, twice = divided(sample_checkpoint, *samples), divided(sample_checkpoint, *samples, *samples[:9], copy)
        assert twice.notes[0] == "10 of 74 calibration samples are exact copies of others and were left out"
        for part in ("calibration", "held_out"):
            assert [prompt.keys for prompt in getattr(twice, part)] == [prompt.keys for prompt in getattr(once, part)]

    def test_one_image_of_its_own_each_is_spread_as_ever(self, sample_checkpoint: Path, images: list[Path]) -> None:
        samples = [about(f"{i}", path) for i, path in enumerate(images)]
        made = divided(sample_checkpoint, *samples)
        with Checkpoint(sample_checkpoint) as opened:
            every = prompts.encode_samples(samples, opened.config, Tokenizer.load(sample_checkpoint))
        assert [prompt.keys for prompt in made.held_out] == [prompt.keys for prompt in every[7::8]]

    @pytest.mark.parametrize("method", ["gptq", "rtn"])
    def test_no_held_out_image_decides_what_stays_in_fp16(
        self, golden: Path, tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, method: Method
    ) -> None:
        looked_at: list[str] = []

        def watched(tower: VisionModel, abstractor: VisualAbstractor, pixels: Tensor) -> Iterator[VisionPart]:
            looked_at.extend(digest(image.numpy()) for image in pixels)
            return measure_parts(tower, abstractor, pixels)

        monkeypatch.setattr("owl2.export.vision.measure_parts", watched)
        checkpoint = golden / "a1_base_bin" / "model"
        config = ExportConfig(checkpoint, tmp_path / "b", group_size=32, calibration=images[0].parent, method=method)
        export_bundle(config)
        with Checkpoint(checkpoint) as opened:
            made = prompts.load_prompts(config, opened)
        assert digests(made.held_out)
        assert looked_at
        assert not set(looked_at) & set(digests(made.held_out))

    def test_little_is_said(self, sample_checkpoint: Path, images: list[Path]) -> None:
        made = divided(sample_checkpoint, *(about(f"{i}", path) for i, path in enumerate(images[:16])))
        positions = sum(len(prompt.keys) for prompt in made.held_out)
        assert made.notes == (
            f"the accuracy is a rough figure: it is measured on 2 held-out samples with {positions} positions, and "
            "takes 8 with 500 to be firm",
        )

    @pytest.mark.parametrize("calibrate", [True, False])
    def test_where_nothing_unseen_is_left_the_probes_are_named(
        self, sample_checkpoint: Path, images: list[Path], *, calibrate: bool
    ) -> None:
        samples = [about(f"{i}", images[0]) for i in range(64)]
        made = divided(sample_checkpoint, *samples, calibrate=calibrate)
        assert made.held_out == []
        assert len(made.calibration) == (64 if calibrate else 0)
        accuracy = Accuracy.of(made, Divergence())
        assert (accuracy.measured_on, accuracy.samples) == ("built-in probes", 3)
        (note,) = CalibrationRecord.of(made).notes
        assert note.startswith("the accuracy is measured on 3 built-in probes and says little about your data: of 64 ")

    @pytest.mark.parametrize(
        ("groups", "size", "obstacle"),
        [
            (7, 1, "it takes at least 8"),
            (7, 9, "share an image or a first question: 0 groups of at most 7 samples have neither in common with"),
            (7, 5, "share an image or a first question: 0 groups of at most 4 samples have neither in common with"),
            (7, 8, "share an image or a first question: 0 groups of at most 7 samples have neither in common with"),
        ],
    )
    def test_the_cause_is_named_where_none_is_held_out(
        self, sample_checkpoint: Path, images: list[Path], groups: int, size: int, obstacle: str
    ) -> None:
        made = divided(
            sample_checkpoint, *(about(f"{i} of {j}", images[j]) for i in range(size) for j in range(groups))
        )
        (note,) = made.notes
        assert obstacle in note

    def test_the_last_images_are_left_to_the_quantizer(self, sample_checkpoint: Path, images: list[Path]) -> None:
        texts = [Sample(f"USER: Why {i}? ASSISTANT: Because.</s>") for i in range(15)]
        made = divided(sample_checkpoint, *texts[:7], about("it", images[0]), *texts[7:])
        (note,) = made.notes
        assert note.endswith("none could be held out: none of those left to the quantizer would have an image")

    def test_an_image_that_cannot_be_used_has_a_place(self, sample_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"line 3: .*gone\.png"):
            divided(sample_checkpoint, replace(about("it", tmp_path / "gone.png"), where="line 3"))


class TestScoring:
    def test_images_are_asked_as_a_scorer_asks(self, sample_checkpoint: Path) -> None:
        preset = load_preset()
        config = ExportConfig(sample_checkpoint, Path("bundle"), purpose="scoring", samples=24)
        with Checkpoint(sample_checkpoint) as checkpoint:
            made = prompts.load_prompts(config, checkpoint)
            tokenizer, model = checkpoint.tokenizer.tokenizer, checkpoint.config
            asked = [tokenizer.encode_prompt(text) for text in preset.image.values()]
        everything = made.calibration + made.held_out
        assert len(everything) == 24
        texts = [[key for key in prompt.keys if isinstance(key, int)] for prompt in everything]
        expected = [[token for token in text if isinstance(token, int) and token >= 0] for text in asked]
        assert {tuple(text) for text in texts} == {tuple(text) for text in expected}
        # Preprocessed as a scorer does, by padding.
        [drawing, *_] = builtin.drawings(1, 0)
        wide = drawing.image.crop((0, 0, drawing.image.width, drawing.image.height // 2))
        data = as_scored(CalibrationSet("mine", (Sample("<|image|>", (wide,)),)), preset, 9)
        [padded, _] = prompts.encode_samples(data.samples, model, tokenizer, preset.preprocess)
        [known] = prepare_images(wide, model.preprocess, "pad")
        assert list(padded.images) == [known.digest]

    def test_every_image_is_asked_everything(self, tmp_path: Path) -> None:
        """Also where the data has as many samples as were asked for, one image each."""
        preset = load_preset()
        for count, limit in ((32, 32), (32, 16), (32, 48), (3, 64), (5, 1)):
            data = CalibrationSet("mine", tuple(Sample("<|image|>", (Path(f"{n}.png"),)) for n in range(count)))
            asked = as_scored(data, preset, limit).samples
            assert len(asked) == len(preset.image) * min(count, max(1, limit // len(preset.image)))
            by_prompt = {text: [s.images for s in asked if s.prompt == text] for text in preset.image.values()}
            first, *others = by_prompt.values()
            assert all(other == first for other in others)

    def test_pairs_where_the_prompt_has_two(self) -> None:
        images = tuple(drawing.image for drawing in builtin.drawings(3, 0))
        data = CalibrationSet("mine", tuple(Sample("<|image|>", (image,)) for image in images), ("on texts",))
        made = as_scored(data, load_preset("compare2score"), 99)
        assert [sample.images for sample in made.samples] == [images[:2], images[1:], (images[2], images[0])]
        assert made.notes == ()

    def test_a_bundle_for_scoring(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(top={"num_hidden_layers": 1})
        report = export_bundle(ExportConfig(checkpoint, tmp_path / "bundle", purpose="scoring", samples=16))
        assert report.recipe["purpose"] == "scoring"
        assert read_manifest(tmp_path / "bundle").preset == "q-align"
        tokens = len(load_preset().image)
        assert report.calibration.images * tokens >= report.calibration.samples > 8

    def test_data_without_images_is_as_before(self, sample_checkpoint: Path, tmp_path: Path) -> None:
        path = tmp_path / "talks.jsonl"
        path.write_text('{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}\n')
        config = ExportConfig(sample_checkpoint, tmp_path / "bundle", purpose="scoring", calibration=path, method="rtn")
        with Checkpoint(sample_checkpoint) as checkpoint:
            assert prompts.load_prompts(config, checkpoint).calibration == []
