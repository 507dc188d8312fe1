"""Code written for OneAlign and for pyiqa, and forced choices."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import owl2
from owl2 import ConfigError, ImageReading, OneAlign, Owl2, create_metric

IMAGES = sorted((GOLDEN / "images").glob("*.png"))
ARRAYS = dict(np.load(GOLDEN / "a1_base_bin" / "qalign.npz"))
ORIGINAL = ImageReading(orientation="stored", background=None)
TOLERANCE = 1e-4


def test_one_aligns_score(owl: Owl2) -> None:
    model = OneAlign(owl)
    images = [Image.open(path) for path in IMAGES]
    for task in ("quality", "aesthetics"):
        scores = model.score(images, task_=task, input_="image")
        np.testing.assert_allclose(scores, ARRAYS[f"{task}_image/score_1_5"], atol=TOLERANCE)
    frames = [images[index] for index in ARRAYS["quality_video/frame_index"]]
    found = model.score([frames], task_="quality", input_="video", return_dict=True)
    np.testing.assert_allclose(found["scores"], ARRAYS["quality_video/score_1_5"], atol=TOLERANCE)
    np.testing.assert_allclose(found["logits"], ARRAYS["quality_video/five_logits"], atol=TOLERANCE)
    frames_of = model.score([frames], task_="aesthetics", input_="video")  # any word, as in the original
    assert 1 <= frames_of[0] <= 5
    with pytest.raises(ConfigError, match="input_ 'audio'"):
        model.score(images, input_="audio")


def test_a_bundle_is_loaded_like_a_checkpoint(bundle_a1: Path) -> None:
    scores = OneAlign.from_pretrained(bundle_a1).score([Image.open(IMAGES[0])])
    np.testing.assert_allclose(scores, ARRAYS["quality_image/score_1_5"][:1], atol=TOLERANCE)


CODE = """
import pyiqa
metric = pyiqa.create_metric("qalign", device="cpu")
print(metric.lower_better, metric.metric_mode, metric.score_range)
from_path = metric(path).item()
from_image = metric(image).item()
from_tensor = metric(tensor)
values = [score for score in from_tensor.cpu().squeeze().tolist()]
other = float(metric(tensor[:1], task_="aesthetics").mean())
word = metric.to("cpu").eval()(path, task_="aesthetic").item()
"""


def test_code_for_pyiqa_runs_with_one_import_changed(bundle_a1: Path) -> None:
    lines = CODE.replace("import pyiqa", "import owl2 as pyiqa").replace('device="cpu"', 'device="cpu", bundle=bundle')
    with Image.open(IMAGES[0]) as image:
        rgb = image.convert("RGB")
    one = torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1)[None] / 255
    names: dict[str, Any] = {
        "bundle": bundle_a1,
        "path": str(IMAGES[0]),
        "image": rgb,
        "tensor": one.repeat(2, 1, 1, 1),
    }
    exec(lines, names)
    expected = ARRAYS["quality_image/score_1_5"][0]
    np.testing.assert_allclose(
        [names["from_path"], names["from_image"], *names["values"]], [expected] * 4, atol=TOLERANCE
    )
    assert isinstance(names["from_tensor"], torch.Tensor)
    assert names["other"] == pytest.approx(ARRAYS["aesthetics_image/score_1_5"][0], abs=TOLERANCE)
    asked = "USER: How would you rate the aesthetic of this image?\n<|image|>\nASSISTANT: The aesthetic of the image is"
    with Owl2.load(bundle_a1) as owl:
        expected = owl.score(IMAGES[0], "aesthetic", prompt=asked, reading=ORIGINAL)[0].value
    assert names["word"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_become_pixels_as_in_pyiqa(owl: Owl2, dtype: torch.dtype) -> None:
    """``to_pil_image`` of torchvision, which pyiqa calls: ``pic.mul(255).byte()`` in the tensor's own arithmetic."""
    metric = create_metric("qalign", bundle=owl)
    tensor = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    pixels = tensor.mul(255).byte().permute(0, 2, 3, 1).numpy()
    expected = [score.value for score in owl.score([Image.fromarray(one) for one in pixels])]
    found = metric(tensor)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), np.array(expected, np.float32))
    if dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(metric(tensor.numpy()), np.array(expected, np.float32))
    eight_bits = torch.arange(256).to(dtype).div(255).reshape(1, 1, 16, 16)
    if dtype in (torch.float32, torch.float64):
        assert eight_bits.mul(255).byte().flatten().tolist() == list(range(256))


def test_what_a_metric_refuses(owl: Owl2) -> None:
    metric = create_metric("qalign", bundle=owl)
    for target, message in (
        (np.zeros((1, 3, 8, 8), np.uint8), "expected floats N x 3 x H x W, got uint8"),
        (np.full((1, 3, 8, 8), 2.0), "numbers from 0 to 1, got 2 to 2"),
        (np.zeros((1, 4, 8, 8)), "got float64"),
        (np.zeros((8, 8)), "got float64"),
        (object(), "expected floats"),
    ):
        with pytest.raises(ConfigError, match=message):
            metric(target)
    with pytest.raises(ConfigError, match=r"expected floats N x 3 x H x W, got torch\.uint8"):
        metric(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with Image.open(IMAGES[0]) as image:
        for wrong in (image, str(IMAGES[0])):
            with pytest.raises(ConfigError, match="images must be a list"):
                OneAlign(owl).score(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'psnr' is not offered"):
        create_metric("psnr", bundle=owl)
    with pytest.raises(ConfigError, match="gradients"):
        create_metric("qalign", True, bundle=owl)
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    assert metric(grey) == metric(np.repeat(grey, 3, 1))


def test_a_forced_choice(owl: Owl2) -> None:
    question, answers = "Which image is sharper?", ["the first", "the second image", "both"]
    found = owl.choose(question, answers, IMAGES[:2])
    for answer, logprob, count in zip(answers, found.logprobs, found.tokens):
        text = f"USER: <|image|><|image|>{question} ASSISTANT: {answer}"
        logits = owl.logits(text, images=IMAGES[:2]).astype(np.float64)
        ids = owl.model.tokenizer.encode_prompt(text)[-count:]
        rows = logits[-count - 1 : -1]
        shifted = rows - rows.max(1, keepdims=True)
        expected = sum(row[token] - math.log(np.exp(row).sum()) for row, token in zip(shifted, ids))
        assert logprob == pytest.approx(expected, abs=1e-3)
    assert sum(found.probabilities) == pytest.approx(1)
    assert found.best == int(np.argmax(found.probabilities))
    assert owl.choose("First <|image|> or second <|image|>?", answers, IMAGES[:2]) != found
    for bad in (["one"], "text", ["a", " "], []):
        with pytest.raises(ConfigError, match="two texts or more"):
            owl.choose(question, bad)
    assert "choose" in dir(owl2.Owl2)


def test_columns_for_tables(bundle_a1: Path, owl: Owl2, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    scorer = owl2.BatchScorer(bundle_a1, column="path", task=["quality", "aesthetics"])
    batch = {"path": np.array([str(IMAGES[0]), str(broken), str(IMAGES[1])], object), "id": np.arange(3)}
    columns = scorer(batch)
    assert list(columns) == [
        "path", "id", "quality", "quality_normalized", "quality_std", "aesthetics", "aesthetics_normalized",
        "aesthetics_std", "error",
    ]  # fmt: skip
    expected = [score.value for score in owl.score([IMAGES[0], IMAGES[1]], "aesthetics")]
    assert columns["aesthetics"][[0, 2]].tolist() == expected
    assert np.isnan(columns["quality"][1])
    assert [bool(error) for error in columns["error"]] == [False, True, False]
    with pytest.raises(ConfigError, match="no column 'path'; the batch has a"):
        scorer({"a": []})
