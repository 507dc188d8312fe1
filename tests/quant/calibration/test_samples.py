"""Where calibration data comes from, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from owl2.quant.calibration.samples import BUILT_IN, Sample, builtin_set, load_calibration, probe_samples
from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import CalibrationError, ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "deep/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), (200, 30, 30)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("  A red rectangle.\n")
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def talk(*texts: str, image: object = None) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns} | ({} if image is None else {"image": image})


class TestBuiltIn:
    def test_it_has_images_and_texts_and_says_what_it_is(self) -> None:
        data = load_calibration(None, 1000)
        assert data.source == BUILT_IN
        assert data.images == 72
        assert sum(not sample.images for sample in data.samples) == 24
        assert "built-in calibration set" in data.notes[0]

    def test_it_is_the_same_every_time(self) -> None:
        for first, second in zip(builtin_set().samples, builtin_set().samples, strict=True):
            assert first.prompt == second.prompt
            np.testing.assert_array_equal(list(map(np.asarray, first.images)), list(map(np.asarray, second.images)))

    def test_every_prompt_has_its_placeholders_and_ends_an_answer(self) -> None:
        for sample in builtin_set().samples:
            assert sample.prompt.count(IMAGE_TOKEN) == len(sample.images)
            assert sample.prompt.endswith("</s>")

    def test_probes_cover_no_one_and_several_images(self) -> None:
        assert sorted(len(sample.images) for sample in probe_samples()) == [0, 1, 2]
        sizes = [np.asarray(image).shape[:2] for sample in probe_samples() for image in sample.images]
        assert sizes == [(112, 224), (224, 112), (224, 224)], "the modes of preprocessing differ on all but a square"

    def test_the_probes_are_not_in_it(self) -> None:
        def content(samples: tuple[Sample, ...]) -> set[object]:
            images = {np.asarray(image).tobytes() for sample in samples for image in sample.images}
            return images | {sample.prompt.partition(" ASSISTANT:")[0] for sample in samples if not sample.images}

        assert len(content(builtin_set().samples)) == len(builtin_set().samples)
        assert not content(builtin_set().samples) & content(probe_samples())

    def test_the_limit_is_spread_over_the_set(self) -> None:
        few = load_calibration(None, 12)
        assert len(few.samples) == 12
        assert 0 < few.images < 12


class TestFolder:
    def test_images_with_and_without_texts(self, folder: Path) -> None:
        data = load_calibration(folder, 100)
        assert [Path(str(s.images[0])).name for s in data.samples if s.images] == ["a.jpg", "b.png", "c.webp"]
        assert data.samples[0].prompt == f"USER: {IMAGE_TOKEN}Describe the image. ASSISTANT: A red rectangle.</s>"
        assert data.samples[1].prompt.endswith("ASSISTANT:")
        assert data.notes == ("2 of 3 images have no text of their own; 24 built-in conversations were added",)

    def test_only_texts_of_its_own_where_every_image_has_one(self, folder: Path) -> None:
        for name in ("b", "deep/c"):
            (folder / f"{name}.txt").write_text("Red.")
        data = load_calibration(folder, 100)
        assert len(data.samples) == 3
        assert data.notes == ()

    def test_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"holds no images; expected files ending in \.avif"):
            load_calibration(tmp_path, 10)

    def test_all_broken_images_are_named(self, folder: Path) -> None:
        (folder / "x.png").write_bytes(b"no image")
        (folder / "y.HEIC").write_bytes(b"")
        (folder / "z.png").symlink_to("nowhere")
        with pytest.raises(CalibrationError, match=r"(?s)3 problems:.*x\.png.*y\.HEIC.*z\.png"):
            load_calibration(folder, 100)

    def test_what_systems_leave_in_folders_is_skipped(self, folder: Path) -> None:
        whole = load_calibration(folder, 100)
        hidden = ("._a.jpg", ".DS_Store", "Thumbs.db", ".thumbnails/a.png", "__MACOSX/a.png", "deep/@eaDir/a.jpg")
        for name in hidden:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"no image")
        assert load_calibration(folder, 100) == whole

    def test_links_are_followed_once(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "d.png").write_bytes((folder / "b.png").read_bytes())
        (elsewhere / "back").symlink_to(folder)
        (folder / "deep" / "loop").symlink_to(folder)
        (folder / "link").symlink_to(elsewhere)
        (folder / "link again").symlink_to(elsewhere)
        paths = [sample.images[0] for sample in load_calibration(folder, 100).samples if sample.images]
        names = ["a.jpg", "b.png", "deep/c.webp", "link/d.png"]
        assert [str(Path(str(path)).relative_to(folder)) for path in paths] == names

    def test_texts_as_editors_write_them(self, folder: Path) -> None:
        (folder / "a.txt").write_bytes(b"\xef\xbb\xbfA red\r\nrectangle.\r\n")
        assert load_calibration(folder, 100).samples[0].prompt.endswith("ASSISTANT: A red\nrectangle.</s>")

    @pytest.mark.parametrize("placeholder", [IMAGE_TOKEN, "<image>"])
    def test_all_texts_that_cannot_be_used_are_named(self, folder: Path, placeholder: str) -> None:
        (folder / "a.txt").write_bytes("Ein grünes Dreieck".encode("latin-1"))
        (folder / "b.txt").write_bytes("A red rectangle.".encode("utf-16"))
        (folder / "deep" / "c.txt").write_text(f"{placeholder} is red.")
        with pytest.raises(CalibrationError) as caught:
            load_calibration(folder, 100)
        assert str(caught.value).splitlines() == [
            f"{folder}: 3 problems:",
            "  a.txt: it is not UTF-8 text: byte 0xfc in line 1; save it as UTF-8",
            "  b.txt: it is UTF-16 text; save it as UTF-8",
            f"  deep/c.txt: it must not contain {placeholder}",
        ]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
    def test_a_folder_that_cannot_be_read_is_named(self, folder: Path) -> None:
        (folder / "deep").chmod(0)
        with pytest.raises(CalibrationError, match=r"cannot read the folder .*deep: Permission denied"):
            load_calibration(folder, 100)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(
            CalibrationError, match="nowhere does not exist or is no file; give a folder of images or a file"
        ):
            load_calibration(tmp_path / "nowhere", 10)


class TestConversations:
    def test_images_and_turns(self, folder: Path) -> None:
        path = write_lines(
            folder / "talks.jsonl",
            talk(f"{IMAGE_TOKEN}What?", "Red.", "Sure?", "Yes.", image="b.png"),
            "",
            talk("Which is larger?", "The first.", image=["a.jpg", "b.png"]),
            talk("Hello", "Hi"),
        )
        prompts = [sample.prompt for sample in load_calibration(path, 10).samples]
        assert prompts == [
            f"USER: {IMAGE_TOKEN}What? ASSISTANT: Red.</s>USER: Sure? ASSISTANT: Yes.</s>",
            f"USER: {IMAGE_TOKEN}{IMAGE_TOKEN}Which is larger? ASSISTANT: The first.</s>",
            "USER: Hello ASSISTANT: Hi</s>",
        ]

    def test_all_bad_lines_are_named(self, folder: Path) -> None:
        path = write_lines(
            folder / "talks.jsonl",
            talk("good", "yes", image="a.jpg"),
            "{no json",
            [],
            {"conversations": "text"},
            {"conversations": [{"from": ["human"], "value": "x"}]},
            talk(image="a.jpg"),
            {"conversations": [{"from": "system", "value": "x"}]},
            talk(f"{IMAGE_TOKEN}{IMAGE_TOKEN}", "x", image="a.jpg"),
            talk("q", "a", image=3),
            "[" * 100_000,
            talk("\ud800", "a"),
        )
        with pytest.raises(CalibrationError) as caught:
            load_calibration(path, 10)
        message = str(caught.value)
        assert "10 problems" in message
        for part in (
            "line 2: it is not JSON: Expecting property name",
            "line 3: expected a JSON object, got list",
            """line 4: "conversations" must be a list of turns, got 'text'""",
            "line 5: a turn must be",
            'line 6: "conversations" must be a list of turns, got []',
            "line 7: it has a system message",
            "line 8: <|image|> occurs 2 times, but there is 1 image",
            'line 9: "image" must be',
            "line 10: it is nested too deeply",
            "line 11: it has half of a surrogate pair",
        ):
            assert part in message

    def test_images_that_cannot_be_read_are_named(self, folder: Path) -> None:
        path = write_lines(folder / "talks.jsonl", talk("q", "a", image="missing.png"), talk("q", "a", image="a.jpg"))
        with pytest.raises(CalibrationError, match=r"(?s)1 problem:\n  line 1: cannot read .*missing\.png"):
            load_calibration(path, 10)

    def test_only_the_chosen_images_are_opened(self, folder: Path) -> None:
        lines = [talk("q", "a", image="a.jpg" if i % 4 == 0 else "missing.png") for i in range(12)]
        assert load_calibration(write_lines(folder / "talks.jsonl", *lines), 3).images == 3

    def test_one_json_array_gives_the_same(self, folder: Path) -> None:
        talks = [talk("<image>\nWhat?", "Red.", image="b.png"), talk("Hello", "Hi")]
        (folder / "talks.json").write_text(json.dumps(talks, indent=1))
        array = load_calibration(folder / "talks.json", 10)
        assert array.samples == load_calibration(write_lines(folder / "talks.jsonl", *talks), 10).samples
        assert [sample.where for sample in array.samples] == ["record 1", "record 2"]
        assert array.samples[0].prompt == f"USER: {IMAGE_TOKEN}\nWhat? ASSISTANT: Red.</s>"

    def test_unicode_line_separators_and_a_byte_order_mark_are_text(self, folder: Path) -> None:
        line = json.dumps(talk("one\u2028two\x85", "a", image="a.jpg"), ensure_ascii=False)
        path = folder / "talks.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + line.encode())
        assert "one\u2028two\x85" in load_calibration(path, 10).samples[0].prompt

    def test_a_small_choice_still_has_an_image(self, folder: Path) -> None:
        lines = [talk("q", "a")] * 20
        path = write_lines(folder / "talks.jsonl", *lines, talk("q", "a", image="a.jpg"))
        assert load_calibration(path, 3).images == 1
        assert load_calibration(None, 1).images == 1

    def test_images_are_not_needed_where_nothing_is_calibrated(self, folder: Path) -> None:
        path = write_lines(folder / "talks.jsonl", talk("q", "a"))
        assert load_calibration(path, 3, need_images=False).images == 0

    def test_no_images_says_why_they_are_needed(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "talks.jsonl", talk("Hello", "Hi"), talk("What?", "That."))
        with pytest.raises(CalibrationError, match=r"none of its 2 samples has an image.*would be rounded blindly"):
            load_calibration(path, 10)

    def test_empty_and_unreadable_files(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"empty\.jsonl is empty; give one JSON object per line"):
            load_calibration(write_lines(tmp_path / "empty.jsonl", ""), 10)
        (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CalibrationError, match=r"cannot read .*binary\.jsonl: it is UTF-16 text; save it as UTF-8"):
            load_calibration(tmp_path / "binary.jsonl", 10)


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="0 calibration samples were asked for"):
        load_calibration(None, 0)
