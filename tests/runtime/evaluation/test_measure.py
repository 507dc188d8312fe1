"""Results of each task against slow references."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import CHOICES, IMAGES, write_lines
from PIL import Image

from owl2 import Owl2
from owl2.runtime.engine import Engine, Floats
from owl2.runtime.errors import BackendError, DataError
from owl2.runtime.evaluation.data import Caption, Item, Question, Text, read_items
from owl2.runtime.evaluation.item_run import ItemRun
from owl2.runtime.evaluation.measure import Generation, ItemResult, Likelihood, measure
from owl2.runtime.evaluation.summary import summarise
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.likelihood import ChoiceLikelihoods, log_softmax_rows


def run(owl: Owl2, items: Sequence[Item]) -> list[ItemResult]:
    return list(measure(owl.model, items, max_new_tokens=64))


def likelihood(owl: Owl2, prompt: str, images: list[Path], span: str) -> tuple[float, int]:
    """Minus the log-probability of ``span``, the end of the prompt, from logits of a full run; and its tokens."""
    logits = log_softmax_rows(owl.logits(prompt, images=images))
    ids = owl.model.tokenizer.encode_prompt(prompt)
    expected = owl.model.tokenizer.encode_prompt(span)[1:]
    assert ids[-len(expected) :] == expected
    return -math.fsum(logits[-len(expected) - 1 + i, token] for i, token in enumerate(expected)), len(expected)


def test_answers_are_those_of_the_library(results: list[ItemResult], owl: Owl2) -> None:
    generated = [result for result in results if isinstance(result.output, Generation)]
    assert len(generated) == 4
    for result in generated:
        assert isinstance(result.item.task, Question | Caption)
        expected = owl.chat().ask(result.item.task.question, list(result.item.images), max_new_tokens=64)
        assert result.output == Generation(expected.text, expected.finish_reason)


def test_scores(results: list[ItemResult]) -> None:
    summary = summarise(results)
    tasks = {task.task: task for task in summary.tasks}
    assert list(tasks) == ["exact", "vqa", "choice", "caption", "conversation", "text"]
    assert tasks["exact"].whole.scores["exact_match"].value == 1
    assert list(tasks["exact"].categories) == ["one"]
    assert tasks["vqa"].whole.scores["vqa_accuracy"].value == pytest.approx(0.9)
    choice = tasks["choice"].whole.scores["accuracy"]
    assert choice.value == 0.5
    assert choice.standard_error == pytest.approx(math.sqrt(0.25 / 2))
    assert not tasks["choice"].categories
    scores = tasks["caption"].whole.scores
    precision, recall = 4 / 7, 1.0  # "on the left" is too much for the second reference
    rouge = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert scores["rouge_l"].value == pytest.approx((1 + rouge) / 2)
    # The first is exactly right; every n-gram of the second is in both references and weighs nothing.
    assert scores["cider_d"].value == pytest.approx((10 + 0) / 2)
    assert list(tasks["conversation"].whole.scores) == ["perplexity", "nats_per_token", "tokens"]
    assert list(tasks["text"].whole.scores) == ["perplexity", "nats_per_token", "bits_per_byte", "tokens"]
    assert summary.divergence is None
    json.dumps(summary.to_json(), allow_nan=False)


def test_choices_from_the_cache_are_those_of_full_runs(results: list[ItemResult], owl: Owl2) -> None:
    output = next(result.output for result in results if isinstance(result.output, ChoiceLikelihoods))
    for choice, logprob, tokens in zip(CHOICES, output.logprobs, output.tokens):
        prompt = f"USER: <|image|>Describe the picture. ASSISTANT: {choice}"
        nats, count = likelihood(owl, prompt, [IMAGES / "scene1.png"], choice)
        assert tokens == count
        assert logprob == pytest.approx(-nats, abs=1e-3)
    assert output.best == 0


def test_the_shared_prompt_runs_once(owl: Owl2, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Engine = owl.model.engine
    lengths: list[int] = []
    original = engine.prefill

    def prefill(embeds: Floats, *rest: Any) -> Floats:
        lengths.append(len(embeds))
        return original(embeds, *rest)

    monkeypatch.setattr(engine, "prefill", prefill)
    run(owl, [read_items(data)[2]])
    tokens = [len(owl.model.tokenizer.encode(choice)) for choice in CHOICES]
    assert len(lengths) == len(CHOICES)
    assert lengths[0] > owl.config.rows_per_image
    assert lengths[1:] == tokens[1:]  # the position that predicts the first token, and all tokens but the last


def test_perplexity_of_a_conversation(results: list[ItemResult], owl: Owl2) -> None:
    output = next(result.output for result in results if result.item.line == 7)
    assert isinstance(output, Likelihood)
    images = [IMAGES / "scene1.png", IMAGES / "scene3.png"]
    beginning = "USER: <|image|>What is it?<|image|> ASSISTANT: two pictures</s>"
    first = likelihood(owl, beginning, images, "two pictures</s>")
    second = likelihood(owl, beginning + "USER: And? ASSISTANT: yes</s>", images, "yes</s>")
    assert output.tokens == first[1] + second[1]
    assert output.nats == pytest.approx(first[0] + second[0], rel=1e-4)


def test_perplexity_of_text_longer_than_the_context(sample_bundle: Path, data: Path) -> None:
    owl = Owl2.load(sample_bundle, context=100)
    model, item = owl.model, read_items(data)[7]
    assert isinstance(item.task, Text)
    (result,) = run(owl, [item])
    ids, size = model.tokenizer.encode(item.task.text), len(item.task.text)
    assert len(ids) > 300
    nats = 0.0
    for start in range(0, len(ids), 99):
        window = [model.tokenizer.bos_id, *ids[start : start + 99]]
        embeds = model.table.rows(window)
        modality, rows = np.zeros(len(window), dtype=np.int64), np.arange(len(window))
        logits = model.engine.prefill(embeds, modality, 0, model.engine.allocate(len(window), None), rows)
        nats -= log_softmax_rows(logits)[rows[:-1], window[1:]].sum()
    assert isinstance(result.output, Likelihood)
    assert result.output.nats == pytest.approx(nats, rel=1e-4)
    assert (result.output.tokens, result.output.bytes) == (len(ids), size)
    figures = summarise([result]).tasks[0].whole.scores
    assert figures["perplexity"].value == pytest.approx(math.exp(nats / len(ids)), rel=1e-3)
    assert figures["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-3)


def test_items_do_not_depend_on_each_other(owl: Owl2, data: Path, results: list[ItemResult]) -> None:
    items = read_items(data)
    assert run(owl, items[::-1])[::-1] == results
    assert run(owl, items[3:5]) == results[3:5]


def test_items_that_do_not_fit_are_named_before_anything_runs(sample_bundle: Path, data: Path) -> None:
    owl = Owl2.load(sample_bundle, context=40)
    with pytest.raises(DataError, match=r"(?s)2 problems.*line 5: takes \d+ positions, the context holds 40\n  line 7"):
        measure(owl.model, read_items(data), max_new_tokens=64)


def test_images_that_the_mode_cannot_take_are_named_before_anything_runs(owl: Owl2, tmp_path: Path) -> None:
    for name, size in (("square.png", (8, 8)), ("wide.png", (40_000, 2)), ("tall.png", (2, 40_000))):
        Image.new("RGB", size).save(tmp_path / name)
    records: list[dict[str, object]] = [
        {"image": f"{name}.png", "captions": ["x"]} for name in ("square", "wide", "square", "tall", "wide")
    ]
    items = read_items(write_lines(tmp_path / "data.jsonl", *records))
    with pytest.raises(DataError, match=r"(?s)3 problems:\n  line 2: .*\n  line 4: .*\n  line 5: [^\n]*$"):
        measure(owl.model, items, max_new_tokens=4, preprocess="resize")


class TestLogits:
    """Blocks of one size, whatever the blocks of an engine are."""

    @pytest.mark.parametrize("sizes", [[700], [100, 256, 256, 88], [256, 256, 188], [0, 0, 700], [300, 0, 400]])
    def test_blocks(self, owl: Owl2, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
        rows = np.random.default_rng(0).normal(size=(700, 3)).astype(np.float32)

        def prompt_logits(*_: object) -> Iterator[tuple[int, Floats]]:
            start = 0
            for size in sizes:
                yield 7 + start, rows[start : start + size]
                start += size

        monkeypatch.setattr("owl2.runtime.evaluation.item_run.prompt_logits", prompt_logits)
        blocks = list(ItemRun(owl.model, owl.model.new_cache(), []).logits(Prompt([], {}), 7))
        assert [(start, len(logits)) for start, logits in blocks] == [(7, 256), (263, 256), (519, 188)]
        np.testing.assert_array_equal(np.concatenate([logits for _, logits in blocks]), rows)

    def test_overflow_is_an_error(self, owl: Owl2, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
        original = owl.model.engine.prefill
        monkeypatch.setattr(owl.model.engine, "prefill", lambda *given: original(*given) * np.inf)
        with pytest.raises(BackendError, match=r"logits are NaN or infinite.*use another device or a bundle of higher"):
            run(owl, [read_items(data)[7]])
