"""From an official checkpoint through a float32 bundle to logits and words, against the original implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeCheckpoint
from PIL import Image

from owl2 import Chat, ConfigError, ContextOverflowError, Owl2, PromptError
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime.backends.ort.engine import OrtEngine
from owl2.runtime.bundle import Bundle
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.families.mplug_owl2.template import Message, render

TOLERANCE = 1e-3
CASES = {
    "a1": "a1_base_bin",
    "a2": "a2_fp16_safetensors",
    "a1_onnx": "a1_base_bin",
    "a2_onnx": "a2_fp16_safetensors",
}
GROUPS = ("text", "image", "two_images", "image_mid", "multi_turn_image", "two_adjacent", "raw_image_first")
DECODED = ("text", "image", "two_images")


class Case:
    """A golden case with its bundle."""

    def __init__(self, folder: Path, images: Path, bundle: Path) -> None:
        self.folder = folder
        self.bundle = bundle
        self.owl = Owl2.load(bundle)
        names = json.loads((folder / "checks.json").read_text())["images"]
        self.files = [images / name for name in names]
        prompts = {entry["id"]: entry["prompt"] for entry in json.loads((folder / "prompts.json").read_text())}
        index = json.loads((folder / "forward_index.json").read_text())
        self.prompts = {entry["name"]: prompts[entry["prompt_id"]] for entry in index}
        self.images = {entry["name"]: [images / name for name in entry["images"]] for entry in index}

    def array(self, file: str, name: str) -> np.ndarray:
        return np.load(self.folder / file)[name]


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, golden: Path) -> Case:
    bundle = request.getfixturevalue(f"bundle_{request.param}")
    return Case(golden / CASES[request.param], golden / "images", bundle)


@pytest.mark.parametrize("group", GROUPS)
def test_logits_of_every_merged_position(case: Case, group: str) -> None:
    made = case.owl.logits(case.prompts[group], images=case.images[group], preprocess="resize")
    expected = case.array("forward.npz", f"{group}/logits")
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_rows_of_the_vision_graph(case: Case, mode: str) -> None:
    engine = OrtEngine(Bundle.open(case.bundle))
    rows = engine.encode_images(case.array("vision.npz", f"pixel_values_{mode}"))
    np.testing.assert_allclose(rows, case.array("vision.npz", f"image_tokens_{mode}"), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("group", DECODED)
def test_greedy_ids(case: Case, group: str) -> None:
    answer = case.owl.generate(case.prompts[group], images=case.images[group], preprocess="resize", max_new_tokens=16)
    _ = answer.text
    assert answer.ids == case.array("decode.npz", f"{group}/new_ids").tolist()
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("group", DECODED)
def test_cached_steps_have_the_recorded_logits_and_those_of_a_full_run(case: Case, group: str) -> None:
    expected = case.array("decode.npz", f"{group}/step_logits")
    ids = case.array("decode.npz", f"{group}/new_ids").tolist()
    owl = case.owl
    prompt = owl._prompt(case.prompts[group], owl._prepare(case.images[group], "resize"))
    rows, _ = owl._model.encoder.rows(list(prompt.images.values()))
    embeds, modality = embed([*prompt.keys, *ids], owl._model.table, rows)
    engine, first = owl._engine, len(prompt.keys)
    buffers = engine.allocate(len(embeds), None)
    steps = [engine.prefill(embeds[:first], modality[:first], 0, buffers, np.array([first - 1]))[0]]
    steps += [engine.decode(embeds[i : i + 1], i, buffers) for i in range(first, len(embeds) - 1)]
    np.testing.assert_allclose(steps, expected, atol=TOLERANCE, rtol=0)
    whole = engine.prefill(embeds, modality, 0, engine.allocate(len(embeds), None), np.arange(len(embeds)))
    np.testing.assert_allclose(steps, whole[first - 1 : -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["quality", "aesthetics"])
def test_rating_prompts_in_pad_mode(case: Case, kind: str) -> None:
    prompt = json.loads((case.folder / "qalign.json").read_text())["tasks"][f"{kind}_image"]["prompt"]
    expected = case.array("qalign.npz", f"{kind}_image/last_logits")
    for image, logits in zip(case.files, expected):
        made = case.owl.logits(prompt, images=image, preprocess="pad")[-1]
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


class TestConversation:
    def ask_twice(self, case: Case) -> tuple[Chat, str]:
        chat = case.owl.chat()
        first = chat.ask("What is this?", images=case.files[:1], max_new_tokens=6).text
        return chat, first

    def test_second_turn_equals_a_cold_start(self, case: Case) -> None:
        chat, first = self.ask_twice(case)
        second = chat.ask("And its colour?", max_new_tokens=12)
        _ = second.text
        prompt = render(
            [
                Message("USER", "<|image|>What is this?"),
                Message("ASSISTANT", first),
                Message("USER", "And its colour?"),
                Message("ASSISTANT"),
            ]
        )
        cold = case.owl.generate(prompt, images=case.files[:1], max_new_tokens=12)
        assert second.text == cold.text
        assert second.ids == cold.ids
        assert second.stats.images_encoded == 0
        assert second.stats.reused_tokens > case.owl.config.rows_per_image
        assert second.stats.prompt_tokens == cold.stats.prompt_tokens
        assert cold.stats.reused_tokens == 0

    def test_reused_prefix_has_the_logits_of_a_cold_start(self, case: Case) -> None:
        """The log-probabilities of the chosen tokens depend on every cached position."""
        chat, first = self.ask_twice(case)
        warm = [chunk.logprob for chunk in chat.ask("Why?", max_new_tokens=8)]
        again = case.owl.chat()
        assert again.ask("What is this?", images=case.files[:1], max_new_tokens=6).text == first
        again._cache.clear()
        cold = [chunk.logprob for chunk in again.ask("Why?", max_new_tokens=8)]
        np.testing.assert_allclose(warm, cold, atol=1e-4, rtol=0)

    def test_another_image_is_not_taken_for_the_first(self, case: Case) -> None:
        chat = case.owl.chat()
        _ = chat.ask("q", images=case.files[:1], max_new_tokens=4).text
        chat.reset()
        warm = chat.ask("q", images=case.files[1:2], max_new_tokens=4)
        cold = case.owl.chat().ask("q", images=case.files[1:2], max_new_tokens=4)
        assert warm.text == cold.text
        assert warm.stats.reused_tokens == 0

    def test_an_unread_answer_is_generated_before_the_next_question(self, case: Case) -> None:
        chat = case.owl.chat()
        unread = chat.ask("What is this?", images=case.files[:1], max_new_tokens=6)
        second = chat.ask("And its colour?", max_new_tokens=6).text
        other, first = self.ask_twice(case)
        assert unread.text == first
        assert second == other.ask("And its colour?", max_new_tokens=6).text

    def test_leaving_an_answer_half_read_undoes_the_turn(self, case: Case) -> None:
        chat, _ = self.ask_twice(case)
        before = chat.messages
        for chunk in chat.ask("And then?", images=case.files[1:3], max_new_tokens=50):
            if chunk.text:
                break
        assert chat.messages == before
        expected = self.ask_twice(case)[0].ask("Why?", max_new_tokens=8).text
        assert chat.ask("Why?", max_new_tokens=8).text == expected

    def test_a_refused_question_changes_nothing(self, case: Case) -> None:
        chat, _ = self.ask_twice(case)
        before = chat.messages
        with pytest.raises(PromptError, match=r"has 2 <\|image\|> placeholders, but 1 image given"):
            chat.ask("<|image|> or <|image|>?", images=case.files[:1])
        with pytest.raises(ContextOverflowError, match=f"the context holds {case.owl.context} positions"):
            chat.ask("word " * 3000)
        assert chat.messages == before
        expected = self.ask_twice(case)[0].ask("Why?", max_new_tokens=8).text
        assert chat.ask("Why?", max_new_tokens=8).text == expected

    def test_a_failing_decoder_leaves_the_conversation_as_it_was(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat, _ = self.ask_twice(case)
        before = chat.messages
        answer = chat.ask("Why?", max_new_tokens=8)
        original = OrtEngine.decode
        calls = []

        def failing(self: OrtEngine, *arguments: object) -> np.ndarray:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("the third step fails")
            return original(self, *arguments)

        monkeypatch.setattr(OrtEngine, "decode", failing)
        with pytest.raises(RuntimeError, match="third step"):
            _ = answer.text
        monkeypatch.undo()
        assert chat.messages == before
        expected = self.ask_twice(case)[0].ask("Why?", max_new_tokens=8).text
        assert chat.ask("Why?", max_new_tokens=8).text == expected

    def test_messages_can_be_read_while_an_answer_streams(self, case: Case) -> None:
        chat, first = self.ask_twice(case)
        seen = [(chunk.text, len(chat.messages)) for chunk in chat.ask("Why?", max_new_tokens=8)]
        assert [count for _, count in seen[:-1]] == [2] * (len(seen) - 1)
        assert [message.text for message in chat.messages[1::2]] == [first, "".join(text for text, _ in seen)]

    def test_reset_while_an_answer_streams_ends_it(self, case: Case) -> None:
        chat, _ = self.ask_twice(case)
        answer = chat.ask("Why?", max_new_tokens=50)
        stream = iter(answer)
        next(stream)
        chat.reset()
        assert list(stream) == []
        assert answer.state == "cancelled"
        assert chat.messages == ()
        cold = case.owl.chat().ask("Hi", max_new_tokens=5)
        assert chat.ask("Hi", max_new_tokens=5).text == cold.text

    def test_an_abandoned_stream_does_not_disturb_the_next_question(self, case: Case) -> None:
        chat, _ = self.ask_twice(case)
        stream = iter(chat.ask("And then?", max_new_tokens=50))
        next(stream)
        expected = self.ask_twice(case)[0].ask("Why?", max_new_tokens=8).text
        assert chat.ask("Why?", max_new_tokens=8).text == expected
        assert list(stream) == []
        assert len(chat.messages) == 4

    def test_cancelling_stops_and_undoes(self, case: Case) -> None:
        chat, _ = self.ask_twice(case)
        before = chat.messages
        answer = chat.ask("And then?", max_new_tokens=50)
        pieces = 0
        for _ in answer:
            pieces += 1
            if pieces == 3:
                answer.cancel()
        assert (pieces, answer.state, answer.finish_reason) == (3, "cancelled", None)
        assert chat.messages == before

    def test_cancelling_before_the_start_runs_nothing(self, case: Case) -> None:
        chat = case.owl.chat()
        answer = chat.ask("Hi", max_new_tokens=1)
        answer.cancel()
        assert answer.text == ""
        assert answer.stats.generated_tokens == 0
        assert chat.messages == ()

    def test_cancelling_takes_effect_between_blocks_of_a_long_prompt(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = case.owl.chat().ask("word " * 80, max_new_tokens=5)
        original, blocks = OrtEngine.prefill, []

        def counted(self: OrtEngine, embeds: np.ndarray, *others: object) -> np.ndarray:
            blocks.append(len(embeds))
            answer.cancel()
            return original(self, embeds, *others)

        monkeypatch.setattr("owl2.runtime.generate.PREFILL_BLOCK", 32)
        monkeypatch.setattr(OrtEngine, "prefill", counted)
        assert answer.text == ""
        assert blocks == [32]

    def test_a_prompt_in_blocks_has_the_logits_of_one_in_a_piece(
        self, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def logprobs() -> list[float]:
            answer = case.owl.chat().ask("What is this?", images=case.files[:2], max_new_tokens=6)
            return [chunk.logprob for chunk in answer]

        whole = logprobs()
        monkeypatch.setattr("owl2.runtime.generate.PREFILL_BLOCK", 5)
        np.testing.assert_allclose(logprobs(), whole, atol=1e-4, rtol=0)

    def test_a_placeholder_that_the_model_wrote_stands_for_no_image(self, case: Case) -> None:
        chat, _ = self.ask_twice(case)
        answer = chat.ask("Why?", max_new_tokens=2)
        assert answer._finish is not None
        answer._finish("It is <|image|>.")
        assert case.owl.chat().messages == ()
        assert chat._messages[-1].text == "It is <image>."

    def test_preparing_images_counts_as_time_to_the_first_token(self, case: Case) -> None:
        answer = case.owl.chat().ask("What?", images=case.files[:3], max_new_tokens=1)
        _ = answer.text
        stats = answer.stats
        assert stats.preprocess_seconds > 0
        assert stats.time_to_first_token > stats.preprocess_seconds + stats.vision_seconds + stats.prefill_seconds

    def test_an_unknown_mode_is_refused(self, case: Case) -> None:
        with pytest.raises(ConfigError, match="preprocess 'stretch' is not known; use resize, pad, crop"):
            case.owl.chat().ask("What?", images=case.files[:1], preprocess="stretch")

    def test_kv_buffers_are_written_in_place_and_grow(self, case: Case) -> None:
        chat = case.owl.chat()
        _ = chat.ask("q", images=case.files[:1], max_new_tokens=4).text
        before = chat._cache._buffers
        _ = chat.ask("r", max_new_tokens=4).text
        assert chat._cache._buffers is before
        _ = chat.ask("word " * 120, max_new_tokens=4).text
        after = chat._cache._buffers
        assert after is not None
        assert before is not None
        assert after.capacity > before.capacity


def test_streamed_pieces_make_the_whole_text(case: Case) -> None:
    answer = case.owl.generate(case.prompts["image"], images=case.images["image"], max_new_tokens=20)
    pieces = [chunk.text for chunk in answer]
    assert len(pieces) == 20
    assert "".join(pieces) == answer.text
    assert case.owl._model.tokenizer.decode(answer.ids) == answer.text


def test_sampling_is_reproducible_by_seed(case: Case) -> None:
    def ids(seed: int) -> list[int]:
        answer = case.owl.generate("USER: Hi ASSISTANT:", temperature=1.5, top_k=0, seed=seed, max_new_tokens=12)
        _ = answer.text
        return answer.ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_a_context_can_be_chosen(case: Case) -> None:
    owl = Owl2.load(case.bundle, context=40, threads=1)
    answer = owl.generate("USER: Hi ASSISTANT:", max_new_tokens=100)
    _ = answer.text
    assert answer.finish_reason == "context"
    assert answer.stats.prompt_tokens + answer.stats.generated_tokens - 1 == 40
    with pytest.raises(ContextOverflowError) as caught:
        owl.generate("USER: " + "word " * 50)
    assert caught.value.context == 40


def test_keys_of_stretched_positions_are_not_reused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Dynamic scaling turns the keys of a long sequence by other angles than those of a short one."""
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 48}
    export_bundle(ExportConfig(make_checkpoint(top=scaling), tmp_path / "bundle", weights="fp32"))
    owl = Owl2.load(tmp_path / "bundle", context=400)

    def logprobs(chat: Chat, question: str) -> list[float]:
        return [chunk.logprob for chunk in chat.ask(question, max_new_tokens=4)]

    chat = owl.chat()
    next(iter(chat.ask("word " * 40)))  # longer than the limit, and left again
    np.testing.assert_allclose(logprobs(chat, "Hi"), logprobs(owl.chat(), "Hi"), atol=1e-5, rtol=0)
    second = chat.ask("Hello", max_new_tokens=4)
    assert second.text is not None
    assert second.stats.reused_tokens > 0  # as long as everything stays short, the cache is used
    again = owl.chat()
    again._messages = list(chat.messages)
    warm, cold = logprobs(chat, "word " * 40), logprobs(again, "word " * 40)
    np.testing.assert_allclose(warm, cold, atol=1e-5, rtol=0)
