"""``owl2 eval`` end to end: figures against slow references, two models beside each other, the command."""

import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from click.testing import CliRunner, Result
from conftest import ROOT
from isolation import BLOCKED

from owl2 import Owl2
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.reference import TorchEngine, open_checkpoint
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.__main__ import cli
from owl2.runtime.errors import BackendError, BundleError, ConfigError, DataError, ReferenceModelError
from owl2.runtime.evaluation import Subject, measure, open_reference, read_items, summarise
from owl2.runtime.evaluation.divergence import log_softmax_rows
from owl2.runtime.evaluation.measure import Answered, Likelihood, Ranked
from owl2.runtime.families.mplug_owl2.template import Message
from owl2.runtime.preprocess import load_image

COMMAND = (sys.executable, "-m", "owl2.runtime")
IMAGES = ROOT / "sample" / "pictures"
CHOICES = ("a small purple star on the left", "a big red cross", "two stars")


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def eval_json(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, args)], prog_name="owl2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task, about the images of the sample."""
    known = {entry["file"]: entry["answer"] for entry in json.loads((IMAGES / "pictures.json").read_text())}
    first, third = str(IMAGES / "scene1.png"), str(IMAGES / "scene3.png")
    asked = "Describe the picture."
    return write(
        tmp_path_factory.mktemp("data") / "data.jsonl",
        {"image": first, "question": asked, "answers": [known["scene1.png"]], "kind": "one", "id": "first"},
        {"image": third, "question": asked, "answers": ["no"] * 7 + [known["scene3.png"]] * 3, "kind": "three"},
        {"image": first, "question": asked, "choices": CHOICES, "answer": CHOICES[0]},
        {"image": first, "question": "How many shapes are there?", "choices": ["one", "two"], "answer": "two"},
        {"image": third, "question": asked, "captions": [known["scene3.png"]]},
        {"image": first, "question": asked, "captions": ["a small purple star"]},
        {
            "image": [first, third],
            "conversations": [
                {"from": "human", "value": "<|image|>What is it?<|image|>"},
                {"from": "gpt", "value": "two pictures"},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "yes"},
            ],
        },
        {"text": "a small blue circle on the right " * 60},
    )


@pytest.fixture(scope="module")
def subject(sample_bundle: Path) -> Subject:
    return Subject.of(Owl2.load(sample_bundle), "bundle")


@pytest.fixture(scope="module")
def measured(subject: Subject, data: Path) -> list:
    return list(measure(subject, read_items(data)))


def likelihood(owl: Owl2, prompt: str, images: list[Path], spans: list[str]) -> tuple[float, int]:
    """Minus the log-probability of ``spans``, found at the end of the prompt, from logits of a full run."""
    logits = log_softmax_rows(owl.logits(prompt, images=images))
    ids = owl._model.tokenizer.encode_prompt(prompt)
    wanted = owl._model.tokenizer.encode_prompt(spans[-1])[1:]
    assert ids[-len(wanted) :] == wanted
    return -math.fsum(logits[-len(wanted) - 1 + i, token] for i, token in enumerate(wanted)), len(wanted)


class TestTasks:
    def test_answers_are_those_of_the_library(self, measured: list, sample_bundle: Path) -> None:
        owl = Owl2.load(sample_bundle)
        for one in measured:
            if isinstance(one.output, Answered):
                question = one.item.task.question
                expected = owl.chat().ask(question, [*one.item.images], max_new_tokens=64)
                assert one.output.text == expected.text
                assert one.output.finish_reason == expected.finish_reason

    def test_scores(self, measured: list) -> None:
        summary = summarise(measured)
        tasks = {task.task: task for task in summary.tasks}
        assert list(tasks) == ["exact", "vqa", "choice", "caption", "conversation", "text"]
        assert tasks["exact"].whole.scores["exact_match"].value == 1
        assert list(tasks["exact"].kinds) == ["one"]
        assert tasks["vqa"].whole.scores["vqa_accuracy"].value == pytest.approx(0.9)
        choice = tasks["choice"].whole.scores["accuracy"]
        assert (choice.value, choice.standard_error) == (0.5, pytest.approx(math.sqrt(0.25 / 2)))
        assert not tasks["choice"].kinds
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

    def test_choices_from_the_cache_are_those_of_full_runs(self, measured: list, sample_bundle: Path) -> None:
        owl = Owl2.load(sample_bundle)
        ranked = next(one for one in measured if isinstance(one.output, Ranked))
        for choice, logprob, tokens in zip(CHOICES, ranked.output.logprobs, ranked.output.tokens):
            prompt = f"USER: <|image|>Describe the picture. ASSISTANT: {choice}"
            nats, count = likelihood(owl, prompt, [IMAGES / "scene1.png"], [choice])
            assert tokens == count
            assert logprob == pytest.approx(-nats, abs=1e-3)
        assert ranked.output.best == 0

    def test_the_shared_prompt_runs_once(self, subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        engine, ran = subject.model.engine, []
        original = engine.prefill
        monkeypatch.setattr(
            engine, "prefill", lambda embeds, *rest: (ran.append(len(embeds)), original(embeds, *rest))[1]
        )
        item = read_items(data)[2]
        list(measure(subject, [item]))
        lengths = [len(subject.model.tokenizer.encode(choice)) for choice in CHOICES]
        assert len(ran) == len(CHOICES)
        assert ran[0] > subject.config.rows_per_image
        assert ran[1:] == lengths[1:]  # the position that predicts the first token, and all tokens but the last

    def test_perplexity_of_a_conversation(self, measured: list, sample_bundle: Path) -> None:
        owl = Owl2.load(sample_bundle)
        output = next(one.output for one in measured if one.item.line == 7)
        images = [IMAGES / "scene1.png", IMAGES / "scene3.png"]
        beginning = "USER: <|image|>What is it?<|image|> ASSISTANT: two pictures</s>"
        first = likelihood(owl, beginning, images, ["two pictures</s>"])
        second = likelihood(owl, beginning + "USER: And? ASSISTANT: yes</s>", images, ["yes</s>"])
        assert output.tokens == first[1] + second[1]
        assert output.nats == pytest.approx(first[0] + second[0], rel=1e-4)

    def test_perplexity_of_text_longer_than_the_context(self, sample_bundle: Path, data: Path) -> None:
        owl = Owl2.load(sample_bundle, context=100)
        item = read_items(data)[7]
        (made,) = measure(Subject.of(owl, "bundle"), [item])
        ids = owl._model.tokenizer.encode(item.task.text)
        assert len(ids) > 300
        nats = 0.0
        for start in range(0, len(ids), 99):
            window = [owl._model.tokenizer.bos_id, *ids[start : start + 99]]
            embeds = owl._model.table[window].astype(np.float32)
            kinds, rows = np.zeros(len(window), dtype=np.int64), np.arange(len(window))
            logits = owl._engine.prefill(embeds, kinds, 0, owl._engine.allocate(len(window), None), rows)
            nats -= log_softmax_rows(logits)[rows[:-1], window[1:]].sum()
        assert made.output == Likelihood(pytest.approx(nats, rel=1e-4), len(ids), len(item.task.text))
        figures = summarise([made]).tasks[0].whole.scores
        assert figures["perplexity"].value == pytest.approx(math.exp(nats / len(ids)), rel=1e-3)
        assert figures["bits_per_byte"].value == pytest.approx(nats / math.log(2) / len(item.task.text), rel=1e-3)

    def test_items_do_not_depend_on_each_other(self, subject: Subject, data: Path, measured: list) -> None:
        items = read_items(data)
        assert list(measure(subject, items[::-1]))[::-1] == measured
        assert list(measure(subject, items[3:5])) == measured[3:5]

    def test_items_that_do_not_fit_are_named_before_anything_runs(self, sample_bundle: Path, data: Path) -> None:
        subject = Subject.of(Owl2.load(sample_bundle, context=40), "bundle")
        with pytest.raises(
            DataError, match=r"(?s)2 problems.*line 5: takes \d+ positions, the context holds 40\n  line 7"
        ):
            measure(subject, read_items(data))


class TestAgainst:
    def test_itself(self, sample_bundle: Path, data: Path) -> None:
        record = eval_json(sample_bundle, "--data", data, "--against", sample_bundle, "--items")
        for kind in ("text", "image"):
            assert record["divergence"][kind]["kl"] == 0
            assert record["divergence"][kind]["top1_agreement"] == 1
        for task in record["tasks"].values():
            assert task["scores"] == task["reference"]
            assert task.get("changes", {"changed": 0})["changed"] == 0
        assert record["kv_cache"] == "fp32"
        assert [one["line"] for one in record["predictions"]] == list(range(1, 9))
        assert all(one["output"] == one["reference"] for one in record["predictions"])
        positions = [one["divergence"]["image"]["positions"] for one in record["predictions"]]
        rows = Owl2.load(sample_bundle).config.rows_per_image
        assert positions == [rows] * 6 + [2 * rows, 0]

    def test_a_checkpoint_as_the_export_reports_it(self, tmp_path: Path, golden: Path) -> None:
        """KL and agreement on the held-out prompts of an export are those in its report."""
        checkpoint = golden / "a1_base_bin" / "model"
        names = [f"{i:02}" for i in range(16)]
        talks = [
            {
                "image": str(golden / "images" / "00_rgb_landscape_97x61.png"),
                "conversations": [
                    {"from": "human", "value": f"What about {name}?"},
                    {"from": "gpt", "value": f"Nothing is known about {name} in this picture."},
                ],
            }
            for name in names
        ]
        config = ExportConfig(
            checkpoint, tmp_path / "b", method="rtn", calibration=write(tmp_path / "all.jsonl", *talks)
        )
        expected = export_bundle(config).accuracy
        held_out = write(tmp_path / "held_out.jsonl", talks[7], talks[15])
        record = eval_json(tmp_path / "b", "--data", held_out, "--against", checkpoint)
        made = record["divergence"]
        assert expected.kl_text > 1e-4
        assert made["text"]["positions"] + made["image"]["positions"] == expected.positions
        assert made["text"]["kl"] == pytest.approx(expected.kl_text, rel=1e-3)
        assert made["image"]["kl"] == pytest.approx(expected.kl_image, rel=1e-3)
        assert made["text"]["top1_agreement"] == pytest.approx(expected.top1_agreement_text)
        assert made["image"]["top1_agreement"] == pytest.approx(expected.top1_agreement_image)
        assert made["mean_abs_logit_difference"] == pytest.approx(expected.mean_abs_logit_difference, rel=1e-3)

    def test_the_sample_checkpoint(self, sample_bundle: Path, sample_checkpoint: Path, data: Path) -> None:
        result = run(sample_bundle, "--data", data, "--against", sample_checkpoint)
        assert result.exit_code == 0
        assert result.stderr == ""
        assert "short answers, several people" in result.stdout
        assert "answers changed" in result.stdout
        assert f"against {sample_checkpoint}\n" in result.stdout
        assert "KL (nats)" in result.stdout

    def test_other_models_are_refused(
        self, sample_bundle: Path, bundle_a1: Path, data: Path, tmp_path: Path, golden: Path
    ) -> None:
        subject = Subject.of(Owl2.load(sample_bundle), "bundle")
        with pytest.raises(ReferenceModelError, match=r"has 800 tokens, bundle has .* these are different models"):
            open_reference(bundle_a1, subject)
        with pytest.raises(BundleError, match=r"is neither a bundle \(owl2.json\) nor an official checkpoint"):
            open_reference(tmp_path, subject)
        shorter = Path(shutil.copytree(sample_bundle, tmp_path / "shorter"))
        manifest = json.loads((shorter / "owl2.json").read_text())
        manifest["model"]["decoder"]["max_position_embeddings"] = 200
        (shorter / "owl2.json").write_text(json.dumps(manifest))
        with pytest.raises(ConfigError, match="exceeds the 200 positions"):
            open_reference(shorter, subject)

    def test_a_checkpoint_needs_the_extra(self, sample_bundle: Path, sample_checkpoint: Path, data: Path) -> None:
        script = BLOCKED + (
            "from owl2.runtime.__main__ import main\n"
            f"sys.argv = ['owl2', 'eval', {str(sample_bundle)!r}, '--data', {str(data)!r}, '--limit', '1', "
            f"'--against', {{}}]\n"
            "main()\n"
        )

        def against(path: Path) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-c", script.replace("{}", repr(str(path)))]
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.sep, timeout=120)

        refused = against(sample_checkpoint)
        assert refused.returncode == 1
        assert "is a checkpoint, which needs torch" in refused.stderr
        assert "pip install 'owl2[export]'; another bundle can be compared without it" in refused.stderr
        assert "Traceback" not in refused.stderr
        allowed = against(sample_bundle)
        assert allowed.returncode == 0, allowed.stderr
        assert "same best token" in allowed.stdout


class TestTorchEngine:
    def test_is_the_torch_model(self, golden: Path) -> None:
        """Blocks, cached steps and a reused prefix lead to the logits of one run of the whole model."""
        folder = golden / "a1_base_bin" / "model"
        model, config = open_checkpoint(folder)
        subject = Subject("torch", model, config, config.decoder.max_position_embeddings)
        images = subject.open([load_image(golden / "images" / "00_rgb_landscape_97x61.png")])
        prompt = subject.encode([Message("USER", "<|image|>What is it?"), Message("ASSISTANT", "It is")], images)
        with Checkpoint(folder) as checkpoint:
            whole = Owl2Model(checkpoint.config)
            checkpoint.load_into(whole, "")
        ids = torch.tensor([model.tokenizer.encode_prompt("USER: <|image|>What is it? ASSISTANT: It is</s>")])
        with torch.no_grad():
            expected = reference.logits(whole, ids, torch.from_numpy(images[0].pixels)[None])[0].numpy()
        made = np.concatenate([logits for _, logits in subject.logit_blocks(prompt)])
        np.testing.assert_allclose(made, expected, atol=1e-5)
        ((start, again),) = subject.logit_blocks(prompt, 20)  # from the cache
        assert start == 20
        np.testing.assert_allclose(again, expected[20:], atol=1e-5)

    def test_layers_may_stay_on_disk(self, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("owl2.export.checkpoint.reference.RESIDENT_SHARE", 0.0)
        folder = golden / "a1_base_bin" / "model"
        with Checkpoint(folder) as checkpoint:
            engine = TorchEngine(checkpoint)
            rows = np.random.default_rng(0).normal(size=(5, checkpoint.config.decoder.hidden_size)).astype(np.float32)
            kinds, wanted = np.array([0, 1, 1, 0, 0]), np.arange(5)
            made = engine.prefill(rows, kinds, 0, engine.allocate(5, None), wanted)
            monkeypatch.undo()
            kept = TorchEngine(checkpoint)
            np.testing.assert_array_equal(made, kept.prefill(rows, kinds, 0, kept.allocate(5, None), wanted))
            with pytest.raises(BackendError, match="belong to another backend"):
                engine.prefill(rows, kinds, 0, object(), wanted)


class TestCommand:
    def test_help_teaches(self) -> None:
        text = run("--help").stdout
        assert "Examples:" in text
        assert '{"image": "a.jpg", "captions"' in text

    def test_errors_are_lines_and_come_before_the_model(self, tmp_path: Path) -> None:
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"text": ""}\nno\n')
        result = run(tmp_path / "no bundle", "--data", bad)
        assert result.exit_code == 1
        assert "nothing was measured; 2 problems:\n  line 1: " in result.stderr
        assert run("b", "--data", bad, "--items").exit_code == 1
        good = write(tmp_path / "good.jsonl", {"text": "x"})
        assert "is neither a bundle" in run(tmp_path / "no bundle", "--data", good, "--against", tmp_path).stderr
        assert "--items writes into the JSON" in run("b", "--data", bad, "--items").stderr
        assert "max_new_tokens 0 must be at least 1" in run("b", "--data", bad, "--max-new-tokens", 0).stderr
        assert run("b").exit_code == 2

    def test_the_same_every_time(self, sample_bundle: Path, data: Path) -> None:
        one, other = (eval_json(sample_bundle, "--data", data, "--items", "--limit", 4) for _ in range(2))
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
        assert one["complete"]
        assert one["items"] == one["asked"] == 4

    def test_ctrl_c_shows_what_was_measured(self, sample_bundle: Path, tmp_path: Path) -> None:
        record = {"image": str(IMAGES / "scene1.png"), "question": "Describe the picture.", "answers": ["x"]}
        many = write(tmp_path / "many.jsonl", *[record] * 5000)
        master, slave = pty.openpty()  # progress tells when the first items are done
        command = [*COMMAND, "eval", sample_bundle, "--data", many, "--json"]
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=slave, text=True)
        os.close(slave)
        seen, end = "", time.monotonic() + 60
        while " 3/5000" not in seen:
            assert time.monotonic() < end, seen
            seen += os.read(master, 4096).decode()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        while True:
            try:
                seen += os.read(master, 4096).decode()
            except OSError:  # the other end is closed
                break
        os.close(master)
        assert process.returncode == 130
        result = json.loads(output)
        assert not result["complete"]
        assert 3 <= result["items"] < 5000
        assert result["tasks"]["exact"]["items"] == result["items"]
        assert f"owl2: stopped after {result['items']} of 5000 items" in seen
        assert "Traceback" not in seen
