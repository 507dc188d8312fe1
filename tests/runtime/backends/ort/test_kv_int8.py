"""The int8 K/V cache: the same weights, the codes that rounding gives, the cache's promises kept, and its cost told."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, RunCommand, edit_manifest, rehash
from numpy.typing import NDArray
from onnx import numpy_helper

from owl2 import Answer, BackendError, Chat, ConfigError, GenerationConfig, Owl2
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.quant.kv import HEADROOM
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtBuffers, OrtEngine
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import EngineOptions, Floats, Ints, own
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed
from owl2.runtime.kv_cache import GROWTH, KvCache
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.stream import stream_answer

INT8 = OrtOptions(kv_cache="int8")
PROMPT = "USER: <|image|>What is it, and what does it mean? ASSISTANT: It is"
# Where float32 noise puts a value on the other side of the border between two codes, they differ by one.
FLIPPED = 1e-3
LOGITS = 2e-3


@pytest.fixture(scope="module")
def bundle(bundle_a1: Path) -> Bundle:
    return Bundle.open(bundle_a1)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OrtEngine:
    return OrtEngine(bundle, INT8)


@pytest.fixture(scope="module")
def model(bundle_a1: Path) -> Loaded:
    return open_bundle(bundle_a1, EngineOptions(kv_cache="int8", backend="onnxruntime"))[1]


@pytest.fixture(scope="module")
def image(golden: Path) -> Path:
    return golden / "images" / "00_rgb_landscape_97x61.png"


def rows_of(model: Loaded, text: str, image: Path) -> tuple[Floats, Ints]:
    prompt = model.encode(text, model.prepare(image))
    rows, _ = model.encoder.rows(list(prompt.images.values()))
    return embed(prompt.keys, model.table, rows)


def filled(engine: OrtEngine, embeds: Floats, modality: Ints) -> tuple[OrtBuffers, Floats]:
    """Buffers with room for three more positions after one prefill, and its logits [T, V]."""
    buffers = own(engine.allocate(len(embeds) + 3, None), OrtBuffers)
    return buffers, engine.prefill(embeds, modality, 0, buffers, np.arange(len(embeds)))


def scales_of(bundle: Bundle) -> list[NDArray[Any]]:
    """Of keys and values of each layer in turn, as the graph holds them."""
    model = onnx.load(bundle.decoder_graph("int8"), load_external_data=False)
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = range(bundle.manifest.model.decoder.num_hidden_layers)
    return [numpy_helper.to_array(named[f"layers.{i}.{which}.cache_scales"]) for i in layers for which in "kv"]


def assert_same_codes(made: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]], positions: int) -> None:
    differences = [
        np.abs(a[:, :, :positions].astype(int) - b[:, :, :positions].astype(int)) for a, b in zip(made, expected)
    ]
    assert max(difference.max() for difference in differences) <= 1
    assert np.mean([np.count_nonzero(difference) / difference.size for difference in differences]) <= FLIPPED


class TestBundle:
    def test_the_weights_are_stored_once(self, bundle: Bundle) -> None:
        assert list(bundle.folder.glob("decoder*.data")) == [bundle.path("decoder.onnx.data")]
        models = [onnx.load(bundle.decoder_graph(kv_type), load_external_data=False) for kv_type in ("fp32", "int8")]
        external = [
            {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer if tensor.external_data}
            for model in models
        ]
        assert external[0] == external[1] != {}
        inline = sum(len(tensor.raw_data) for tensor in models[1].graph.initializer)
        assert inline - sum(len(tensor.raw_data) for tensor in models[0].graph.initializer) == sum(
            scales.nbytes for scales in scales_of(bundle)
        )

    def test_the_graphs_differ_only_in_attention(self, bundle: Bundle) -> None:
        nodes = [
            list(onnx.load(bundle.decoder_graph(kv_type), load_external_data=False).graph.node)
            for kv_type in ("fp32", "int8")
        ]
        changed = {one.op_type for one, other in zip(*nodes, strict=True) if one != other}
        assert changed == {"GroupQueryAttention"}

    def test_the_manifest_names_what_is_offered(self, bundle: Bundle) -> None:
        assert bundle.manifest.kv_cache == {"fp32": "1.22", "int8": "1.27"}

    def test_another_type_is_refused_with_those_offered(self, bundle_a1: Path) -> None:
        with pytest.raises(ConfigError, match=r"kv_cache 'int4': .* offers fp32, int8; choose one of these"):
            Owl2.load(bundle_a1, kv_cache="int4", backend="onnxruntime")  # type: ignore[arg-type]

    def test_a_bundle_without_it(self, copy: Path) -> None:
        edit_manifest(copy, kv_cache={"fp32": "1.22"})
        with pytest.raises(ConfigError, match=r"kv_cache 'int8': .* offers fp32; choose"):
            Owl2.load(copy, kv_cache="int8", backend="onnxruntime")
        assert Owl2.load(copy, backend="onnxruntime").logits("Hi").shape[1] == 800

    def test_an_onnxruntime_too_old_for_it_still_runs_the_other(self, copy: Path) -> None:
        edit_manifest(copy, kv_cache={"fp32": "1.22", "int8": "99.1"})
        with pytest.raises(
            BackendUnavailableError,
            match=r"the int8 K/V cache needs onnxruntime 99\.1 or newer, .* is installed; upgrade it .* 'fp32'",
        ):
            Owl2.load(copy, kv_cache="int8", backend="onnxruntime")
        assert Owl2.load(copy, backend="onnxruntime").logits("Hi").shape[1] == 800

    @pytest.mark.parametrize(
        ("offered", "message"),
        [
            ({"fp32": "1.22", "int2": "1.22"}, "kv_cache: 'int2' is not known; known: fp32, fp16, int8"),
            ({"int8": "1.22"}, "kv_cache: fp32, the type of activations, is missing"),
            ({"fp32": 1.22}, r"kv_cache\.fp32: expected str, got 1\.22"),
            (["fp32"], "kv_cache: expected an object"),
        ],
    )
    def test_a_manifest_that_was_edited(self, copy: Path, offered: object, message: str) -> None:
        edit_manifest(copy, kv_cache=offered)
        with pytest.raises(BundleCorruptError, match=message):
            Owl2.load(copy)

    def test_its_graph_must_be_listed(self, copy: Path) -> None:
        files = json.loads((copy / spec.MANIFEST).read_text())["files"]
        del files["decoder.kv_int8.onnx"]
        edit_manifest(copy, files=files)
        with pytest.raises(BundleCorruptError, match=r"decoder\.kv_int8\.onnx is not listed"):
            Owl2.load(copy)

    def test_a_graph_with_another_type_of_cache(self, copy: Path) -> None:
        shutil.copy(copy / "decoder.onnx", copy / "decoder.kv_int8.onnx")
        rehash(copy, "decoder.kv_int8.onnx")
        with pytest.raises(BackendError, match=r"past_key_values\.0\.key is tensor\(float\), int8 is needed"):
            Owl2.load(copy, kv_cache="int8", backend="onnxruntime")


class TestCodes:
    def test_first_layer_holds_the_rounded_keys_and_values(self, bundle: Bundle, model: Loaded, image: Path) -> None:
        """They depend only on the input, so that the float32 cache says what is to be rounded."""
        embeds, modality = rows_of(model, PROMPT, image)
        assert set(modality) == {0, 1}
        made, _ = filled(OrtEngine(bundle, INT8), embeds, modality)
        exact, _ = filled(OrtEngine(bundle), embeds, modality)
        for codes, values, scales in zip(made.arrays[:2], exact.arrays[:2], scales_of(bundle)):
            assert codes.dtype == np.int8
            expected = np.clip(np.rint(values / scales), -128, 127)
            np.testing.assert_array_equal(codes, expected)
            assert np.abs(codes).max() > 127 / HEADROOM / 3

    @pytest.mark.parametrize("heads", [(72, 3), (64, 16)])
    def test_padded_channels_hold_nothing(
        self, make_checkpoint: MakeCheckpoint, tmp_path: Path, image: Path, heads: tuple[int, int]
    ) -> None:
        width, count = heads
        top = {"hidden_size": width, "num_attention_heads": count, "num_key_value_heads": count}
        export_bundle(ExportConfig(make_checkpoint(top=top), tmp_path / "bundle", weights="fp32"))
        opened, model = open_bundle(tmp_path / "bundle", EngineOptions(backend="onnxruntime"))
        embeds, modality = rows_of(model, PROMPT, image)
        made, _ = filled(OrtEngine(opened, INT8), embeds, modality)
        exact, _ = filled(OrtEngine(opened), embeds, modality)
        half, padded = width // count // 2, spec.padded_head_dim(model.config.decoder) // 2
        assert half < padded
        for codes, values, scales in zip(made.arrays, exact.arrays, scales_of(opened)):
            assert not codes.reshape(*codes.shape[:-1], 2, padded)[..., half:].any()
            assert (scales > 0).all()
            np.testing.assert_allclose(codes * scales, values, atol=8 * scales.max(), rtol=0)

    def test_cached_steps_and_blocks_give_the_codes_and_logits_of_one_prefill(
        self, engine: OrtEngine, model: Loaded, image: Path
    ) -> None:
        """Attention reads what is stored, its own new positions included, however they came there."""
        embeds, modality = rows_of(model, PROMPT, image)
        count = len(embeds)
        whole, expected = filled(engine, embeds, modality)
        for first in (5, count - 6):
            buffers = own(engine.allocate(count + 3, None), OrtBuffers)
            made = [engine.prefill(embeds[:first], modality[:first], 0, buffers, np.arange(first))]
            if modality[first:].any():
                made.append(engine.prefill(embeds[first:], modality[first:], first, buffers, np.arange(count - first)))
            else:
                made += [engine.decode(embeds[i : i + 1], i, buffers)[None] for i in range(first, count)]
            assert_same_codes(buffers.arrays, whole.arrays, count)
            np.testing.assert_allclose(np.concatenate(made), expected, atol=LOGITS, rtol=0)

    def test_positions_beyond_the_last_stay_untouched(self, engine: OrtEngine, model: Loaded, image: Path) -> None:
        embeds, modality = rows_of(model, PROMPT, image)
        buffers = own(engine.allocate(len(embeds) + 3, None), OrtBuffers)
        for array in buffers.arrays:
            array[:] = 77
        engine.prefill(embeds, modality, 0, buffers, np.array([0]))
        assert all((array[:, :, len(embeds) :] == 77).all() for array in buffers.arrays)


class TestCache:
    def test_growing_keeps_the_codes(self, engine: OrtEngine, model: Loaded) -> None:
        cache = KvCache(engine, 2 * GROWTH)
        claim = cache.claim()
        first = own(claim.reserve(5), OrtBuffers)
        for array in first.arrays:
            array[:, :, :5] = np.arange(-2, 3)[:, None]
        claim.commit(range(5))
        second = own(claim.reserve(GROWTH), OrtBuffers)
        assert second.capacity == cache.capacity == 2 * GROWTH
        assert all(array.dtype == np.int8 for array in second.arrays)
        assert all((array[:, :, :5] == np.arange(-2, 3)[:, None]).all() for array in second.arrays)
        assert cache.nbytes == 2 * GROWTH * spec.kv_bytes(model.config.decoder, "int8")

    def test_it_takes_a_quarter_of_the_memory(self, bundle: Bundle, engine: OrtEngine) -> None:
        assert 4 * engine.allocate(100, None).nbytes == OrtEngine(bundle).allocate(100, None).nbytes


class TestConversation:
    """Two prompts that share a beginning, and what the cache keeps between them."""

    def first(self, model: Loaded, image: Path) -> Prompt:
        return model.encode("USER: <|image|>What is this? ASSISTANT:", model.prepare(image))

    def ask(self, model: Loaded, cache: KvCache, prompt: Prompt) -> Answer:
        return stream_answer(model, cache, prompt, GenerationConfig(max_new_tokens=8)).read()

    def then(self, model: Loaded, prompt: Prompt, answer: Answer, question: str) -> Prompt:
        """The next turn."""
        words = model.tokenizer.encode(f"USER: {question} ASSISTANT:", parse_special=False)
        return Prompt([*prompt.keys, *answer.ids, *words], prompt.images)

    def codes(self, cache: KvCache, positions: int) -> list[NDArray[Any]]:
        return [array[:, :, :positions].copy() for array in own(cache.claim().reserve(0), OrtBuffers).arrays]

    def test_second_turn_equals_a_cold_start(self, model: Loaded, image: Path) -> None:
        warm, cold, prompt = model.new_cache(), model.new_cache(), self.first(model, image)
        prompt = self.then(model, prompt, self.ask(model, warm, prompt), "And its colour?")
        one, other = self.ask(model, warm, prompt), self.ask(model, cold, prompt)
        assert one.stats.reused_tokens > model.config.rows_per_image
        assert other.stats.reused_tokens == 0
        assert one.ids == other.ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=LOGITS, rtol=0)
        assert warm.length == cold.length
        assert_same_codes(self.codes(warm, warm.length), self.codes(cold, cold.length), warm.length)

    @pytest.mark.parametrize("way", ["cancelled", "failed"])
    def test_a_step_that_does_not_finish_leaves_the_codes(
        self, model: Loaded, image: Path, monkeypatch: pytest.MonkeyPatch, way: str
    ) -> None:
        cache, prompt = model.new_cache(), self.first(model, image)
        answer = self.ask(model, cache, prompt)
        before = self.codes(cache, cache.length)
        following = self.then(model, prompt, answer, "And then?")
        shared = cache.shared_prefix(following.keys)
        assert shared > model.config.rows_per_image
        stream = stream_answer(model, cache, following, GenerationConfig(max_new_tokens=50))
        if way == "failed":
            monkeypatch.setattr(OrtEngine, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) if way == "failed" else contextlib.nullcontext():
            for _ in stream:
                if way == "cancelled":
                    stream.cancel()
        monkeypatch.undo()
        for held, kept in zip(self.codes(cache, shared), before):
            np.testing.assert_array_equal(held, kept[:, :, :shared])
        last = self.then(model, prompt, answer, "Why?")
        made, expected = self.ask(model, cache, last), self.ask(model, model.new_cache(), last)
        assert made.ids == expected.ids
        np.testing.assert_allclose(made.logprobs, expected.logprobs, atol=LOGITS, rtol=0)

    def test_a_prompt_in_blocks_equals_one_in_a_piece(
        self, model: Loaded, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompt = self.first(model, image)
        whole = self.ask(model, model.new_cache(), prompt)
        monkeypatch.setattr(OrtEngine, "block", 5)
        blocks = self.ask(model, model.new_cache(), prompt)
        assert blocks.ids == whole.ids
        np.testing.assert_allclose(blocks.logprobs, whole.logprobs, atol=LOGITS, rtol=0)


class TestCommands:
    def output(self, run: RunCommand, *arguments: object) -> str:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_ask(self, run: RunCommand, bundle_a1: Path, model: Loaded, image: Path) -> None:
        limits = ("--image", image, "--max-new-tokens", 12, "--json", "--backend", "onnxruntime", "--kv-cache")
        asked = ("ask", bundle_a1, "What is it?", *limits)
        records = {kv_type: json.loads(self.output(run, *asked, kv_type)) for kv_type in ("int8", "fp32")}
        assert records["int8"]["text"] == Chat(model).ask("What is it?", image, max_new_tokens=12).text
        assert records["int8"]["kv_cache_positions"] == GROWTH
        assert records["int8"]["kv_cache_memory"] == GROWTH * spec.kv_bytes(model.config.decoder, "int8")
        assert records["fp32"]["kv_cache_memory"] == GROWTH * spec.kv_bytes(model.config.decoder, "fp32")

    def test_the_sample_model_answers_alike(
        self, run: RunCommand, sample_bundle: Path, sample_checkpoint: Path
    ) -> None:
        image = sample_checkpoint.parent / "pictures" / "scene3.png"
        asked = (
            "ask",
            sample_bundle,
            "Describe the picture.",
            "--image",
            image,
            "--backend",
            "onnxruntime",
            "--kv-cache",
        )
        assert self.output(run, *asked, "int8") == self.output(run, *asked, "fp32")

    def test_stats_name_the_memory(self, run: RunCommand, bundle_a1: Path) -> None:
        asked = ("ask", bundle_a1, "What is it?", "--max-new-tokens", 3, "--stats", "--kv-cache", "int8")
        result = run(*asked, "--backend", "onnxruntime")
        assert "96.0 KiB of it K/V cache for 256 positions" in result.stderr

    def test_info(self, run: RunCommand, bundle_a1: Path, copy: Path) -> None:
        record = json.loads(self.output(run, "info", bundle_a1, "--json"))
        assert record["kv_cache"]["int8"] == {
            "bytes_per_position": 384,
            "bytes_full_context": 384 * 2048,
            "minimum_onnxruntime": "1.27",
            "usable": True,
        }
        assert record["kv_int8"] == json.loads((bundle_a1 / "report.json").read_text())["kv_int8"]
        table = self.output(run, "info", bundle_a1)
        assert "  int8  384 B per position, 768.0 KiB at full context (float16 would take 768 B per position)" in table
        assert "int8 K/V cache against fp32\n  scales_from       the measured prompts\n" in table
        edit_manifest(copy, kv_cache={"fp32": "1.22", "int8": "99.1"})
        assert "; needs onnxruntime 99.1 or newer" in self.output(run, "info", copy)
