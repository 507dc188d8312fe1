"""From an official checkpoint through a float32 bundle to logits and words, against the original implementation."""

import base64
import copy
import json
import logging
import multiprocessing
import pickle
import time
import typing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Case
from PIL import Image
from workers import overflow

import owl2
from owl2 import (
    BackendError,
    Chat,
    ConfigError,
    ContextOverflowError,
    GenerationConfig,
    ImageError,
    LoadProgress,
    Owl2,
    Owl2Error,
    PromptError,
)
from owl2.export import ExportConfig
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.preprocess import AS_ORIGINAL
from owl2.runtime.sampling import GenerationOptions

TOLERANCE = 1e-3
GROUPS = ("text", "image", "two_images", "image_mid", "multi_turn_image", "two_adjacent", "raw_image_first")
DECODED = ("text", "image", "two_images")


@pytest.mark.parametrize("group", GROUPS)
def test_logits_of_every_merged_position(case: Case, group: str) -> None:
    made = case.owl.logits(case.prompts[group], images=case.images[group], preprocess="resize", reading=AS_ORIGINAL)
    expected = case.array("forward.npz", f"{group}/logits")
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_rows_of_the_vision_graph(case: Case, mode: str) -> None:
    rows = case.owl.model.engine.encode_images(case.array("vision.npz", f"pixel_values_{mode}"))
    np.testing.assert_allclose(rows, case.array("vision.npz", f"image_tokens_{mode}"), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("group", DECODED)
def test_greedy_ids(case: Case, group: str) -> None:
    answer = case.owl.generate(case.prompts[group], images=case.images[group], preprocess="resize", max_new_tokens=16)
    assert list(answer.ids) == case.array("decode.npz", f"{group}/new_ids").tolist()
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("group", DECODED)
def test_cached_steps_have_the_recorded_logits_and_those_of_a_full_run(case: Case, group: str) -> None:
    expected = case.array("decode.npz", f"{group}/step_logits")
    ids = case.array("decode.npz", f"{group}/new_ids").tolist()
    model = case.owl.model
    prompt = model.encode(case.prompts[group], model.prepare(case.images[group], "resize"))
    rows, _ = model.encoder.rows(list(prompt.images.values()))
    embeds, modality = embed([*prompt.keys, *ids], model.table, rows)
    engine, first = model.engine, len(prompt.keys)
    buffers = engine.allocate(len(embeds), None)
    steps = [engine.prefill(embeds[:first], modality[:first], 0, buffers, np.array([first - 1]))[0]]
    steps += [engine.decode(embeds[i : i + 1], i, buffers) for i in range(first, len(embeds) - 1)]
    np.testing.assert_allclose(steps, expected, atol=TOLERANCE, rtol=0)
    whole = engine.prefill(embeds, modality, 0, engine.allocate(len(embeds), None), np.arange(len(embeds)))
    np.testing.assert_allclose(steps, whole[first - 1 : -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", ["quality", "aesthetics"])
def test_rating_prompts_in_pad_mode(case: Case, task: str) -> None:
    prompt = json.loads((case.folder / "qalign.json").read_text())["tasks"][f"{task}_image"]["prompt"]
    expected = case.array("qalign.npz", f"{task}_image/last_logits")
    for image, logits in zip(case.files, expected):
        made = case.owl.logits(prompt, images=image, preprocess="pad", reading=AS_ORIGINAL)[-1]
        np.testing.assert_allclose(made, logits, atol=TOLERANCE, rtol=0)


def test_images_as_paths_pil_images_and_arrays_are_the_same(case: Case) -> None:
    prompt, (path,) = case.prompts["image"], case.images["image"]
    with Image.open(path) as image:
        loaded = image.convert("RGB")
    expected = case.owl.logits(prompt, images=[path])
    for given in (str(path), loaded, np.asarray(loaded)):
        np.testing.assert_array_equal(case.owl.logits(prompt, images=given), expected)


def test_the_bundle_s_own_mode_is_the_checkpoint_s(case: Case, golden: Path) -> None:
    config = json.loads((case.folder / "model" / "config.json").read_text())
    own = "pad" if config.get("image_aspect_ratio") == "pad" else "resize"
    prompt, image = case.prompts["image"], golden / "images" / "00_rgb_landscape_97x61.png"
    made = case.owl.logits(prompt, images=image)
    np.testing.assert_array_equal(made, case.owl.logits(prompt, images=image, preprocess=own))
    other = "pad" if own == "resize" else "resize"
    assert np.abs(made - case.owl.logits(prompt, images=image, preprocess=other)).max() > 0.01


def test_streamed_pieces_make_the_whole_text(case: Case) -> None:
    stream = case.owl.stream(case.prompts["image"], images=case.images["image"], max_new_tokens=20)
    chunks = list(stream)
    assert len(chunks) == 20
    answer = stream.answer
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * 19 + ["length"]
    assert answer.ids == tuple(chunk.token_id for chunk in chunks)
    assert answer.logprobs == tuple(chunk.logprob for chunk in chunks)
    assert case.owl.model.tokenizer.decode(answer.ids) == answer.text
    whole = case.owl.generate(case.prompts["image"], images=case.images["image"], max_new_tokens=20)
    assert (whole.text, whole.ids, whole.logprobs) == (answer.text, answer.ids, answer.logprobs)


def test_sampling_is_reproducible_by_seed(case: Case) -> None:
    def ids(seed: int) -> tuple[int, ...]:
        config = GenerationConfig(temperature=1.5, top_k=0, seed=seed)
        return case.owl.generate("USER: Hi ASSISTANT:", config=config, max_new_tokens=12).ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_a_context_can_be_chosen(case: Case) -> None:
    owl = Owl2.load(case.bundle, context=40, threads=1)
    answer = owl.generate("USER: Hi ASSISTANT:", max_new_tokens=100)
    assert answer.finish_reason == "context"
    assert answer.stats.prompt_tokens + answer.stats.generated_tokens - 1 == 40
    with pytest.raises(ContextOverflowError) as caught:
        owl.generate("USER: " + "word " * 50)
    assert caught.value.context == 40


def test_a_prompt_that_cannot_fit_is_not_tokenized(case: Case) -> None:
    """Tokenizing 50 MB takes minutes and gigabytes."""
    text = "What is it? " * (50_000_000 // 12)
    began = time.process_time()
    for run in (case.owl.chat().ask, case.owl.generate, case.owl.logits):
        with pytest.raises(ContextOverflowError, match=r"shorten the prompt, which has \d{8} characters"):
            run(text)
    assert time.process_time() - began < 5


def test_a_prompt_in_blocks_has_the_logits_of_one_in_a_piece(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.owl.logits(case.prompts["two_images"], images=case.images["two_images"])
    monkeypatch.setattr(type(case.owl.model.engine), "block", 7)
    blocks = case.owl.logits(case.prompts["two_images"], images=case.images["two_images"])
    np.testing.assert_allclose(blocks, whole, atol=1e-4, rtol=0)


class TestLife:
    def test_close_gives_everything_back(self, bundle_a1: Path) -> None:
        with Owl2.load(bundle_a1) as owl:
            assert repr(owl) == f"<Owl2 {bundle_a1} on cpu, context {owl.context}>"
            chat = owl.chat()
            chat.ask("Hi", max_new_tokens=2)
            stream = chat.stream("Go on", max_new_tokens=50)
            next(stream)
        assert repr(chat).endswith(f"1 turn, 0 of {owl.context} positions>")
        for step in (lambda: next(stream), lambda: chat.ask("Hi"), lambda: owl.logits("Hi")):
            with pytest.raises(BackendError, match="this model was closed; load the bundle again"):
                step()
        owl.close()

    def test_progress_is_told(self, bundle_a1: Path) -> None:
        told: list[LoadProgress] = []
        Owl2.load(bundle_a1, verify=True, progress=told.append).close()
        stages = [progress.stage for progress in told]
        assert stages == sorted(stages, reverse=True), "verifying comes before loading"
        assert set(stages) == {"verifying", "loading"}
        hashed = [progress for progress in told if progress.stage == "verifying"]
        assert (
            hashed[-1].done
            == hashed[-1].total
            == sum(f.stat().st_size for f in bundle_a1.iterdir()) - (bundle_a1 / "owl2.json").stat().st_size
        )
        assert str(told[-1]) == "loading: 100 %"
        again: list[LoadProgress] = []
        Owl2.load(bundle_a1, progress=again.append).close()
        assert {progress.stage for progress in again} == {"loading"}, "nothing changed since"

    @pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
    def test_it_cannot_be_pickled_and_says_what_to_do(self, case: Case, copied: Callable[[object], object]) -> None:
        with pytest.raises(Owl2Error, match=r"cannot be pickled; .*Owl2\.load\('"):
            copied(case.owl)
        with pytest.raises(Owl2Error, match=r"cannot be pickled; .*messages=chat\.messages"):
            copied(case.owl.chat())

    def test_a_stream_cannot_be_pickled(self, case: Case) -> None:
        with pytest.raises(Owl2Error, match=r"read it to its end and send stream\.answer"):
            pickle.dumps(case.owl.stream("Hi"))

    def test_an_answer_can_be_pickled(self, case: Case) -> None:
        answer = case.owl.chat().ask("Hi", max_new_tokens=3)
        assert pickle.loads(pickle.dumps(answer)) == answer
        assert str(answer) == answer.text


class TestWorkers:
    """A worker that raises must neither hang nor break its pool."""

    def test_process_pool_executor(self, bundle_a1: Path) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            for _ in range(2):
                with pytest.raises(ContextOverflowError, match="the context holds 20 positions") as caught:
                    pool.submit(overflow, str(bundle_a1)).result(timeout=60)
                assert (caught.value.context, caught.value.used) == (20, 0)

    def test_multiprocessing_pool(self, bundle_a1: Path) -> None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for _ in range(2):
                with pytest.raises(ContextOverflowError, match="the context holds 20 positions"):
                    pool.apply_async(overflow, (str(bundle_a1),)).get(timeout=60)


class TestWrongCalls:
    def test_an_unknown_option_names_the_known_ones(self, case: Case) -> None:
        for call in (case.owl.generate, case.owl.stream, case.owl.chat().ask, case.owl.chat().stream):
            with pytest.raises(
                ConfigError, match=r"max_tokens is not an option.*did you mean max_new_tokens.*temperature"
            ):
                call("Hi", max_tokens=5)  # type: ignore[call-arg]

    def test_an_unknown_argument_names_the_known_ones(self, case: Case) -> None:
        with pytest.raises(ConfigError, match=r"devise is not an argument of Owl2\.load; did you mean device\? known"):
            Owl2.load(case.bundle, devise="cpu")  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match=r"history is not an argument of Owl2\.chat; known: messages"):
            case.owl.chat(history=[])  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match=r"seed is not an argument of Owl2\.logits; known: prompt, images"):
            case.owl.logits("Hi", seed=1)  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match="max_tokens is not an argument of GenerationConfig; did you mean max"):
            GenerationConfig(max_tokens=3)  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match="wieghts is not an argument of ExportConfig; did you mean weights"):
            ExportConfig(case.folder, case.bundle, wieghts="int4")  # type: ignore[call-arg]
        for function in (owl2.verify, owl2.plan, owl2.evaluate):
            with pytest.raises(ConfigError, match=rf"foo is not an argument of {function.__name__}; known: bundle"):
                function(case.bundle, foo=1)  # type: ignore[call-arg]

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (3, "cannot be given as int; pass a path"),
            (b"\x89PNG", "cannot read the image in bytes: its format cannot be identified"),
            ("https://example.org/a.png", "owl2 opens no URLs; download https://example.org/a.png first"),
            (np.zeros((4, 4, 3)), r"must be uint8 .* got float64 \[4, 4, 3\]; scale values to 0\.\.255"),
            ([None], "cannot be given as NoneType"),
            ({"a.png"}, "cannot be given as set"),
        ],
    )
    def test_what_is_not_an_image(self, case: Case, images: Any, message: str) -> None:
        with pytest.raises(ImageError, match=message):
            case.owl.chat().ask("What?", images=images)

    def test_an_open_file(self, case: Case) -> None:
        chat, expected = case.owl.chat(), case.owl.chat().ask("What?", images=case.files[0], max_new_tokens=3)
        with case.files[0].open("rb") as file:
            assert chat.ask("What?", images=file, max_new_tokens=3).ids == expected.ids
            assert not file.closed
        content = case.files[0].read_bytes()
        assert chat.messages[0]["content"][0]["image"] == content  # it can be asked about again
        for given in (content, bytearray(content), f"data:image/png;base64,{base64.b64encode(content).decode()}"):
            assert case.owl.chat().ask("What?", images=given, max_new_tokens=3).ids == expected.ids
            assert case.owl.chat(chat.messages).ask("And?", max_new_tokens=2).stats.reused_tokens == 0

    def test_none_stands_for_no_image(self, case: Case) -> None:
        assert case.owl.chat().ask("Hi", images=None, max_new_tokens=2).stats.images_encoded == 0

    def test_settings_of_a_wrong_type(self, case: Case) -> None:
        with pytest.raises(ConfigError, match="bundle must be a path, got 3"):
            Owl2.load(3)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="threads must be a whole number or None, got '2'"):
            Owl2.load(case.bundle, threads="2")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"context must be a whole number or None, got 10\.5"):
            Owl2.load(case.bundle, context=10.5)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="device must be a text, got 0"):
            Owl2.load(case.bundle, device=0)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="temperature 'hot' must be a number"):
            case.owl.chat().ask("Hi", temperature="hot")  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError, match="config must be a GenerationConfig, got dict; give its fields as keywords"
        ):
            case.owl.chat().ask("Hi", config={"seed": 1})  # type: ignore[arg-type]

    def test_a_question_that_is_not_a_text(self, case: Case) -> None:
        with pytest.raises(PromptError, match="must be a text, got int"):
            case.owl.chat().ask(3)  # type: ignore[arg-type]
        with pytest.raises(PromptError, match="must be a text, got NoneType"):
            case.owl.generate(None)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "method", [Owl2.load, Owl2.chat, Owl2.generate, Owl2.stream, Owl2.logits, Chat.ask, Chat.stream, Chat.fork]
    )
    def test_types_can_be_read(self, method: Callable[..., object]) -> None:
        assert "return" in typing.get_type_hints(method)

    def test_options_are_the_fields_of_the_config(self) -> None:
        assert typing.get_type_hints(GenerationOptions) == typing.get_type_hints(GenerationConfig)


def test_logging_is_left_to_the_application() -> None:
    assert not logging.getLogger("owl2").handlers
