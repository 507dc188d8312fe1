"""Scores against those of the original implementation, and the promise that company changes nothing."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, GOLDEN
from PIL import Image

from owl2 import BatchScorer, ConfigError, ContextOverflowError, ImageError, ImageReading, Owl2, PromptError, Score
from owl2.runtime.engine import BackendName
from owl2.runtime.images import PreparedImage
from owl2.runtime.scoring.scale import FOLDER, PRESETS, Level, load_preset, make_scale
from owl2.runtime.scoring.scorer import Scorer

CASES = ("a1_base_bin", "a2_fp16_safetensors")
IMAGES = sorted((GOLDEN / "images").glob("*.png"))
ORIGINAL = ImageReading(orientation="stored", background=None)
"""The original drops transparency and does not turn images."""
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=BACKENDS)
def scoring(request: pytest.FixtureRequest, case: str, bundle_a1: Path, bundle_a2: Path) -> Owl2:
    backend: BackendName = request.param
    return Owl2.load(bundle_a1 if case == CASES[0] else bundle_a2, backend=backend)


def recorded(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = GOLDEN / case
    return json.loads((folder / "qalign.json").read_text()), dict(np.load(folder / "qalign.npz"))


def check(scores: list[Score], arrays: dict[str, np.ndarray], task: str) -> None:
    def column(name: str) -> Any:
        return np.array([getattr(score, name) for score in scores])

    np.testing.assert_allclose(column("value"), arrays[f"{task}/score_1_5"], atol=TOLERANCE)
    np.testing.assert_allclose(column("normalized"), arrays[f"{task}/score_0_1"], atol=TOLERANCE)
    for name, field in (("five_logits", "logits"), ("probs", "probabilities")):
        found = [list(getattr(score, field).values()) for score in scores]
        np.testing.assert_allclose(found, arrays[f"{task}/{name}"], atol=TOLERANCE)


@pytest.mark.parametrize("task", ["quality", "aesthetics"])
def test_scores_of_images_are_the_originals(scoring: Owl2, case: str, task: str) -> None:
    facts, arrays = recorded(case)
    images = [GOLDEN / "images" / name for name in facts["images"]]
    scores = scoring.score(images, task, reading=ORIGINAL)
    check(scores, arrays, f"{task}_image")
    assert [score.image for score in scores] == [str(path) for path in images]
    assert {(score.task, score.bundle) for score in scores} == {(task, scoring.model.fingerprint)}
    assert list(scores[0].probabilities) == facts["words"]


def test_scores_of_videos_are_the_originals(scoring: Owl2, case: str) -> None:
    facts, arrays = recorded(case)
    frames = [GOLDEN / "images" / name for name in facts["tasks"]["quality_video"]["frames"]]
    scorer = scoring.scorer(video=True)
    [(score,)] = scorer.score([scorer.prepare(frames, ORIGINAL)])
    check([score], arrays, "quality_video")


def test_the_prompts_are_the_originals(owl: Owl2) -> None:
    facts, _ = recorded(CASES[0])
    preset = load_preset()
    for name, entry in facts["tasks"].items():
        task, kind = name.split("_")
        assert make_scale(preset, task, video=kind == "video").prompt == entry["prompt"]
        ids = owl.model.tokenizer.encode_prompt(entry["prompt"])
        assert ids == entry["input_ids"]


def bits(score: Score) -> tuple[float, ...]:
    return (score.value, score.normalized, score.std, *score.logits.values(), *score.probabilities.values())


def mixed_images() -> list[Image.Image]:
    dice = np.random.default_rng(0)
    sizes = [(97, 61), (45, 130), (200, 200), (9, 14), (301, 199), (56, 56), (64, 48), (1, 1)]
    return [Image.fromarray(dice.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes * 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_company_changes_no_bit(bundle_a1: Path, backend: BackendName) -> None:
    """Alone, in batches of any size, shuffled, repeated, with other tasks, in any number of threads."""
    images = mixed_images()
    with Owl2.load(bundle_a1, backend=backend, threads=1) as owl:
        alone = [bits(owl.score(image)[0]) for image in images]
        other = [bits(owl.score(image, "aesthetics")[0]) for image in images]
    assert len(set(alone)) == 24
    dice = random.Random(0)
    for threads in (1, 2, 3):
        with Owl2.load(bundle_a1, backend=backend, threads=threads) as owl:
            scorer = owl.scorer(["quality", "aesthetics"])
            for batch in (1, 4, 16, None):
                order = dice.choices(range(len(images)), k=40)
                found = list(scorer.stream([images[index] for index in order], scorer.prepare, batch=batch))
                for index, (image, scores) in zip(order, found, strict=True):
                    assert image is images[index]
                    assert isinstance(scores, tuple)
                    assert (bits(scores[0]), bits(scores[1])) == (alone[index], other[index])


def test_joint_steps_are_used(owl: Owl2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would pass where nothing is shared."""
    stepping = owl.model.engine.stepping
    if stepping is None:
        pytest.skip("ONNX Runtime runs every prompt alone")
    sizes, rows, step = list[int](), list[int](), stepping.step

    def counted(sequences: Any, *rest: Any) -> Any:
        sizes.append(len(sequences))
        rows.extend(len(one.embeds) for one in sequences)
        return step(sequences, *rest)

    monkeypatch.setattr(stepping, "step", counted)
    scorer = owl.scorer()
    items = [scorer.prepare(image) for image in mixed_images()[:8]]
    scorer.score(items)
    assert sizes == [8]
    whole = rows.copy()
    rows.clear()
    scorer.score(items[::-1])
    assert max(rows) < min(whole)  # what stands before the image ran once


def test_a_broken_image_takes_its_own_place(owl: Owl2, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(IMAGES[0].read_bytes()[:200])
    scorer = owl.scorer()
    sources = [IMAGES[0], broken, tmp_path / "missing.png", IMAGES[1], tmp_path]
    found = dict(scorer.stream(sources, scorer.prepare, batch=3))
    assert list(found) == sources
    kinds = [type(found[source]) for source in sources]
    assert kinds == [tuple, ImageError, ImageError, tuple, ImageError]
    good = found[IMAGES[1]]
    assert isinstance(good, tuple)
    assert bits(good[0]) == bits(owl.score(IMAGES[1])[0])


def test_too_many_frames(owl: Owl2) -> None:
    scorer = owl.scorer(video=True)
    frames = scorer.prepare(IMAGES[0])
    many = owl.context // owl.config.rows_per_image + 1
    with pytest.raises(ContextOverflowError, match="fewer images or frames"):
        scorer.score([frames * many])
    [(score,)] = scorer.score([frames * (many - 10)])  # longer than a step
    alone = Scorer(replace(owl.model), scorer.scales)
    assert bits(score) == bits(alone.score([frames * (many - 10)])[0][0])


def test_words_weights_and_prompts_of_your_own(owl: Owl2) -> None:
    usual = owl.score(IMAGES[0])[0]
    score = owl.score(IMAGES[0], levels=["good", "bad"], weights=[1, 0])[0]
    good, bad = usual.logits["good"], usual.logits["bad"]
    assert score.value == pytest.approx(1 / (1 + np.exp(bad - good)), abs=1e-9)
    assert score.normalized == score.value
    assert score.std == pytest.approx(np.sqrt(score.value * (1 - score.value)))
    asked = owl.score(IMAGES[0], "beauty", prompt="USER: <|image|>How beautiful? ASSISTANT: It is")[0]
    assert asked.task == "beauty"
    assert asked.value != usual.value
    two = owl.scorer(
        prompt="USER: <|image|> <|image|> Which is better? ASSISTANT:", levels=["first", "second"], weights=[1, 0]
    )
    [(first,)] = two.score([two.prepare(IMAGES[:2])])
    [(second,)] = two.score([two.prepare(IMAGES[1::-1])])
    assert first.value != second.value


def test_synonyms_share_a_level(owl: Owl2) -> None:
    preset = load_preset("q-instruct")
    scale = make_scale(preset, "quality")
    assert scale.levels[0] == Level(("good", "high", "fine"), 1)
    single = replace(
        scale, levels=tuple(Level((word,), number) for number, word in enumerate(("good", "high", "fine")))
    )
    image = owl.model.prepare(IMAGES[0], "crop")
    [(apart,)] = Scorer(owl.model, [single]).score([image])
    pair = replace(scale, levels=(Level(("good", "high", "fine"), 1), Level(("bad",), 0)))
    [(joined,)] = Scorer(owl.model, [pair]).score([image])
    assert joined.logits["good"] == pytest.approx(np.mean(list(apart.logits.values())))


def test_no_image_has_no_score(owl: Owl2, bundle_a1: Path) -> None:
    for missing in (None, [], [None]):
        with pytest.raises(ImageError):
            owl.score([missing])  # type: ignore[list-item]
    scorer = owl.scorer()
    with pytest.raises(PromptError, match="there is no image"):
        scorer.score([[]])
    images = scorer.prepare(IMAGES[:2])
    with pytest.raises(PromptError):  # two images are no video
        scorer.score([images])
    columns = BatchScorer(bundle_a1)({"image": [IMAGES[0], None, float("nan"), "", []]})
    assert np.isfinite(columns["quality"]).tolist() == [True, False, False, False, False]
    assert [bool(error) for error in columns["error"]] == [False, True, True, True, True]


def test_threads_take_turns(owl: Owl2) -> None:
    scorer = owl.scorer(["quality", "aesthetics"])
    items = [scorer.prepare(path) for path in IMAGES]
    expected = [scorer.score([item])[0] for item in items]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: scorer.score([items[place]])[0], [*range(len(items))] * 10))
    assert found == expected * 10


def test_the_next_batch_is_read_while_one_runs(owl: Owl2) -> None:
    """Of an endless source no more than two batches are held."""
    scorer, read = owl.scorer(), []

    def prepare(number: int) -> list[PreparedImage]:
        read.append(number)
        return scorer.prepare(IMAGES[number % len(IMAGES)])

    found = scorer.stream(itertools.count(), prepare, batch=3, workers=2)
    for _ in range(3):
        next(found)
    assert 6 <= len(read) <= 3 + 2 * 3 + 2 * 2
    found.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_used(owl: Owl2, name: str) -> None:
    preset = load_preset(name)
    for task in preset.image:
        # The goldens' small tokenizer cuts superior and similar into the same first piece.
        own = {"levels": ["good", "fair", "poor", "bad", "excellent"]} if name == "compare2score" else {}
        scorer = owl.scorer(task, preset=name, **own)  # type: ignore[arg-type]
        images = scorer.prepare(IMAGES[: scorer.scales[0].prompt.count("<|image|>")])
        [(score,)] = scorer.score([images])
        assert 0 <= score.normalized <= 1


def test_comparing_two_images(owl: Owl2, tmp_path: Path) -> None:
    """Compare2Score divides logits by 100 before its softmax."""
    words = ["good", "fair", "poor", "bad", "excellent"]  # see above
    scorer = owl.scorer(preset="compare2score", levels=words)
    [(score,)] = scorer.score([scorer.prepare(IMAGES[:2])])
    logits = np.array(list(score.logits.values())) / 100
    odds = np.exp(logits)
    np.testing.assert_allclose(list(score.probabilities.values()), odds / odds.sum(), rtol=1e-9)
    assert score.value == pytest.approx(float(odds @ [1, 0.75, 0.5, 0.25, 0] / odds.sum()))
    with pytest.raises(PromptError):
        owl.score(IMAGES[0], preset="compare2score", levels=words)
    content = json.loads((FOLDER / "compare2score.json").read_text())
    for wrong in (0, -1, "1", None, float("inf")):
        (tmp_path / "own.json").write_text(json.dumps(content | {"temperature": wrong}))
        with pytest.raises(ConfigError, match=r"temperature is|not finite|not a number"):
            owl.scorer(preset=tmp_path / "own.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "smell"}, "does not score 'smell' of images; it knows quality, aesthetics"),
        (
            {"preset": "unknown"},
            "preset 'unknown' is not known; use compare2score, one-align-score, q-align, q-instruct or a .json",
        ),
        ({"levels": ["good", "good"], "weights": [1, 0]}, "begin with the same token"),
        ({"levels": ["good"], "weights": [1]}, "two levels at least"),
        ({"levels": "good"}, "levels must be words"),
        ({"levels": ["good", "bad"]}, "2 levels need as many weights"),
        ({"weights": [1, 2]}, "5 levels need as many weights, got 2"),
        ({"weights": [1, 2, 3, 4, None]}, "weights must be numbers from -1e6 to 1e6"),
        ({"weights": [1, 2, 3, 4, float("nan")]}, "weights must be numbers"),
        ({"weights": [1, 2, 3, 4, 10**400]}, "weights must be numbers"),
        ({"weights": 3}, "weights must be numbers"),
        ({"levels": 3}, "levels must be words"),
        ({"levels": ["x" * 101, "a"], "weights": [1, 0]}, "words of at most 100 characters"),
        ({"levels": [f"word{number}" for number in range(65)], "weights": range(65)}, "64 levels at most, got 65"),
        ({"task": 3}, "task must be a name or a list of names, got 3"),
        ({"task": []}, "there is no task"),
        ({"task": ["quality", "quality"]}, "a task is given twice"),
        ({"task": "x" * 101, "prompt": "<|image|>"}, "at most 100 characters"),
        ({"levels": ["good", "bad"], "weights": [1]}, "2 levels need as many weights"),
        ({"weights": [1, 1, 1, 1, 1]}, "all weights are the same"),
        ({"prompt": "no image"}, "has no <|image|>"),
        ({"preprocess": "squash"}, "preprocess 'squash' is not known"),
        ({"levels": ["", "a"], "weights": [1, 0]}, "levels must be words"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_makes_no_sense_is_refused(owl: Owl2, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        owl.score(IMAGES[0], **options)


def test_a_preset_of_your_own(owl: Owl2, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = {
        "preprocess": "resize",
        "levels": [{"words": ["good"], "weight": 10}, {"words": ["bad"], "weight": 0}],
        "image": {"sharpness": "USER: <|image|>Is it sharp? ASSISTANT: It is"},
        "video": {},
    }
    path.write_text(json.dumps(content))
    score = owl.score(IMAGES[0], "sharpness", preset=path)[0]
    assert score.value == pytest.approx(10 * score.normalized)
    damages: list[dict[str, Any]] = [{"levels": [{"words": []}]}, {"preprocess": "x"}, {"image": {"a": 1}}]
    for damage in damages:
        path.write_text(json.dumps(content | damage))
        with pytest.raises(ConfigError, match=r"mine\.json.*(no preset|a level)"):
            owl.score(IMAGES[0], "sharpness", preset=path)
