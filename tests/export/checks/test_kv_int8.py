"""The int8 K/V cache: the same weights, the codes that rounding gives, the cache's promises kept, and its cost told."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import MakeCheckpoint
from onnx import numpy_helper
from PIL import Image

from owl2 import BackendError, Chat, ConfigError, Owl2
from owl2.export import pipeline
from owl2.export.checks import kv_int8
from owl2.export.config import ExportConfig
from owl2.export.graph import kv_int8 as graph
from owl2.export.pipeline import export_bundle
from owl2.quant.kv import HEADROOM, KvRange, KvScales
from owl2.quant.models.mplug_owl2 import rotary_tables
from owl2.quant.models.mplug_owl2.decoder import rotate
from owl2.runtime import spec
from owl2.runtime.__main__ import cli
from owl2.runtime.backends.ort.engine import OrtBuffers, OrtEngine, OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import DecoderConfig
from owl2.runtime.errors import BackendUnavailableError, BundleCorruptError, ParityError
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.kv_cache import GROWTH, KvCache
from owl2.runtime.verification import hash_file

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
def owl(bundle_a1: Path) -> Owl2:
    return Owl2.load(bundle_a1, kv_cache="int8")


@pytest.fixture(scope="module")
def image(golden: Path) -> Path:
    return golden / "images" / "00_rgb_landscape_97x61.png"


@pytest.fixture
def copy(bundle_a1: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle_a1, tmp_path / "bundle"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / spec.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rows_of(owl: Owl2, prompt: str, image: Path) -> tuple[np.ndarray, np.ndarray]:
    merged = owl._prompt(prompt, owl._prepare([image], None))
    rows, _ = owl._model.encoder.rows(list(merged.images.values()))
    return embed(merged.keys, owl._model.table, rows)


def filled(engine: OrtEngine, embeds: np.ndarray, modality: np.ndarray) -> tuple[OrtBuffers, np.ndarray]:
    """Buffers with room for three more positions after one prefill, and its logits [T, V]."""
    buffers = engine.allocate(len(embeds) + 3, None)
    return buffers, engine.prefill(embeds, modality, 0, buffers, np.arange(len(embeds)))


def scales_of(bundle: Bundle) -> list[np.ndarray]:
    """Of keys and values of each layer in turn, as the graph holds them."""
    model = onnx.load(bundle.decoder_graph("int8"), load_external_data=False)
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = range(bundle.manifest.model.decoder.num_hidden_layers)
    return [numpy_helper.to_array(named[f"layers.{i}.{which}.cache_scales"]) for i in layers for which in "kv"]


def assert_same_codes(made: list[np.ndarray], expected: list[np.ndarray], positions: int) -> None:
    differences = [
        np.abs(a[:, :, :positions].astype(int) - b[:, :, :positions].astype(int)) for a, b in zip(made, expected)
    ]
    assert max(difference.max() for difference in differences) <= 1
    assert np.mean([np.count_nonzero(difference) / difference.size for difference in differences]) <= FLIPPED


class TestBundle:
    def test_the_weights_are_there_once(self, bundle: Bundle) -> None:
        assert list(bundle.folder.glob("decoder*.data")) == [bundle.path("decoder.onnx.data")]
        models = [onnx.load(bundle.decoder_graph(kind), load_external_data=False) for kind in ("fp32", "int8")]
        external = [
            {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer if tensor.external_data}
            for model in models
        ]
        assert external[0] == external[1] != {}
        inline = sum(len(tensor.raw_data) for tensor in models[1].graph.initializer)
        assert inline - sum(len(tensor.raw_data) for tensor in models[0].graph.initializer) == sum(
            scales.nbytes for scales in scales_of(bundle)
        )

    def test_the_graphs_differ_in_attention_alone(self, bundle: Bundle) -> None:
        nodes = [
            list(onnx.load(bundle.decoder_graph(kind), load_external_data=False).graph.node)
            for kind in ("fp32", "int8")
        ]
        changed = {one.op_type for one, other in zip(*nodes, strict=True) if one != other}
        assert changed == {"GroupQueryAttention"}

    def test_the_manifest_names_what_is_offered(self, bundle: Bundle) -> None:
        assert bundle.manifest.kv_cache == {"fp32": "1.22", "int8": "1.27"}

    def test_another_type_is_refused_with_those_offered(self, bundle_a1: Path) -> None:
        with pytest.raises(ConfigError, match=r"kv_cache 'int4': .* offers fp32, int8; choose one of these"):
            Owl2.load(bundle_a1, kv_cache="int4")

    def test_a_bundle_without_it(self, copy: Path) -> None:
        edit(copy, kv_cache={"fp32": "1.22"})
        with pytest.raises(ConfigError, match=r"kv_cache 'int8': .* offers fp32; choose"):
            Owl2.load(copy, kv_cache="int8")
        assert Owl2.load(copy).logits("Hi").shape[1] == 800

    def test_an_onnxruntime_too_old_for_it_still_runs_the_other(self, copy: Path) -> None:
        edit(copy, kv_cache={"fp32": "1.22", "int8": "99.1"})
        with pytest.raises(
            BackendUnavailableError,
            match=r"the int8 K/V cache needs onnxruntime 99\.1 or newer, .* is installed; upgrade it .* 'fp32'",
        ):
            Owl2.load(copy, kv_cache="int8")
        assert Owl2.load(copy).logits("Hi").shape[1] == 800

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
        edit(copy, kv_cache=offered)
        with pytest.raises(BundleCorruptError, match=message):
            Owl2.load(copy)

    def test_its_graph_must_be_listed(self, copy: Path) -> None:
        files = json.loads((copy / spec.MANIFEST).read_text())["files"]
        del files["decoder.kv_int8.onnx"]
        edit(copy, files=files)
        with pytest.raises(BundleCorruptError, match=r"decoder\.kv_int8\.onnx is not listed"):
            Owl2.load(copy)

    def test_a_graph_with_another_type_of_cache(self, copy: Path) -> None:
        path = copy / "decoder.kv_int8.onnx"
        shutil.copy(copy / "decoder.onnx", path)
        files = json.loads((copy / spec.MANIFEST).read_text())["files"]
        edit(copy, files=files | {path.name: {"size": path.stat().st_size, "sha256": hash_file(path)}})
        with pytest.raises(BackendError, match=r"past_key_values\.0\.key is a tensor\(float\), a tensor"):
            Owl2.load(copy, kv_cache="int8")


class TestCodes:
    def test_first_layer_holds_the_rounded_keys_and_values(self, bundle: Bundle, owl: Owl2, image: Path) -> None:
        """They depend on the input alone, so that the float32 cache says what is to be rounded."""
        embeds, modality = rows_of(owl, PROMPT, image)
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
        opened, owl = Bundle.open(tmp_path / "bundle"), Owl2.load(tmp_path / "bundle")
        embeds, modality = rows_of(owl, PROMPT, image)
        made, _ = filled(OrtEngine(opened, INT8), embeds, modality)
        exact, _ = filled(OrtEngine(opened), embeds, modality)
        half, padded = width // count // 2, spec.padded_head_dim(owl.config.decoder) // 2
        assert half < padded
        for codes, values, scales in zip(made.arrays, exact.arrays, scales_of(opened)):
            assert not codes.reshape(*codes.shape[:-1], 2, padded)[..., half:].any()
            assert (scales > 0).all()
            np.testing.assert_allclose(codes * scales, values, atol=8 * scales.max(), rtol=0)

    def test_cached_steps_and_blocks_give_the_codes_and_logits_of_one_prefill(
        self, engine: OrtEngine, owl: Owl2, image: Path
    ) -> None:
        """Attention reads what is stored, its own new positions included, however they came there."""
        embeds, modality = rows_of(owl, PROMPT, image)
        count = len(embeds)
        whole, expected = filled(engine, embeds, modality)
        for first in (5, count - 6):
            buffers = engine.allocate(count + 3, None)
            made = [engine.prefill(embeds[:first], modality[:first], 0, buffers, np.arange(first))]
            if modality[first:].any():
                made.append(engine.prefill(embeds[first:], modality[first:], first, buffers, np.arange(count - first)))
            else:
                made += [engine.decode(embeds[i : i + 1], i, buffers)[None] for i in range(first, count)]
            assert_same_codes(buffers.arrays, whole.arrays, count)
            np.testing.assert_allclose(np.concatenate(made), expected, atol=LOGITS, rtol=0)

    def test_positions_beyond_the_last_stay_untouched(self, engine: OrtEngine, owl: Owl2, image: Path) -> None:
        embeds, modality = rows_of(owl, PROMPT, image)
        buffers = engine.allocate(len(embeds) + 3, None)
        for array in buffers.arrays:
            array[:] = 77
        engine.prefill(embeds, modality, 0, buffers, np.array([0]))
        assert all((array[:, :, len(embeds) :] == 77).all() for array in buffers.arrays)


class TestCache:
    def test_growing_keeps_the_codes(self, engine: OrtEngine, owl: Owl2) -> None:
        cache = KvCache(engine, 2 * GROWTH)
        first = cache.reserve(5)
        for array in first.arrays:
            array[:, :, :5] = np.arange(-2, 3)[:, None]
        cache.commit(range(5))
        second = cache.reserve(GROWTH)
        assert second.capacity == cache.capacity == 2 * GROWTH
        assert all(array.dtype == np.int8 for array in second.arrays)
        assert all((array[:, :, :5] == np.arange(-2, 3)[:, None]).all() for array in second.arrays)
        assert cache.nbytes == 2 * GROWTH * spec.kv_bytes(owl.config.decoder, "int8")

    def test_it_takes_a_quarter_of_the_memory(self, bundle: Bundle, engine: OrtEngine) -> None:
        assert 4 * engine.allocate(100, None).nbytes == OrtEngine(bundle).allocate(100, None).nbytes


class TestConversation:
    def ask(self, chat: Chat, question: str, *images: Path) -> list[tuple[int, float]]:
        return [(chunk.token_id, chunk.logprob) for chunk in chat.ask(question, list(images), max_new_tokens=8)]

    def codes(self, chat: Chat, positions: int) -> list[np.ndarray]:
        buffers = chat._cache._buffers
        assert isinstance(buffers, OrtBuffers)
        return [array[:, :, :positions].copy() for array in buffers.arrays]

    def test_second_turn_equals_a_cold_start(self, owl: Owl2, image: Path) -> None:
        chat, cold = owl.chat(), owl.chat()
        self.ask(chat, "What is this?", image)
        self.ask(cold, "What is this?", image)
        cold._cache.clear()
        warm = self.ask(chat, "And its colour?")
        other = self.ask(cold, "And its colour?")
        assert chat._pending is not None
        assert chat._pending.stats.reused_tokens > owl.config.rows_per_image
        assert cold._pending is not None
        assert cold._pending.stats.reused_tokens == 0
        assert [token for token, _ in warm] == [token for token, _ in other]
        np.testing.assert_allclose([p for _, p in warm], [p for _, p in other], atol=LOGITS, rtol=0)
        assert chat._cache.keys == cold._cache.keys
        assert_same_codes(*(self.codes(each, chat._cache.length) for each in (chat, cold)), chat._cache.length)

    @pytest.mark.parametrize("way", ["cancelled", "failed"])
    def test_a_step_that_does_not_finish_leaves_the_codes(
        self, owl: Owl2, image: Path, monkeypatch: pytest.MonkeyPatch, way: str
    ) -> None:
        chat = owl.chat()
        self.ask(chat, "What is this?", image)
        before = self.codes(chat, chat._cache.length)
        answer = chat.ask("And then?", max_new_tokens=50)
        if way == "failed":
            monkeypatch.setattr(OrtEngine, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) if way == "failed" else contextlib.nullcontext():
            for _ in answer:
                answer.cancel()
        monkeypatch.undo()
        shared = answer.stats.reused_tokens
        assert shared > owl.config.rows_per_image
        for held, kept in zip(self.codes(chat, shared), before):
            np.testing.assert_array_equal(held, kept[:, :, :shared])
        fresh = owl.chat()
        self.ask(fresh, "What is this?", image)
        for (token, logprob), (expected, exact) in zip(self.ask(chat, "Why?"), self.ask(fresh, "Why?"), strict=True):
            assert token == expected
            assert logprob == pytest.approx(exact, abs=LOGITS)

    def test_a_prompt_in_blocks_equals_one_in_a_piece(
        self, owl: Owl2, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.ask(owl.chat(), "What is this?", image, image)
        monkeypatch.setattr("owl2.runtime.generate.PREFILL_BLOCK", 5)
        blocks = self.ask(owl.chat(), "What is this?", image, image)
        assert [token for token, _ in blocks] == [token for token, _ in whole]
        np.testing.assert_allclose([p for _, p in blocks], [p for _, p in whole], atol=LOGITS, rtol=0)


class TestScales:
    def test_rounding_against_a_loop(self) -> None:
        rng = np.random.default_rng(0)
        keys, values = (torch.from_numpy(rng.normal(0, 2, (1, 2, 5, 4)).astype(np.float32)) for _ in range(2))
        scales = KvScales(*(torch.from_numpy(rng.uniform(0.01, 0.03, (2, 4)).astype(np.float32)) for _ in range(2)))
        codes = scales.codes(keys, values)
        read = scales.values_of(codes)
        for x, steps, code, value in zip((keys, values), (scales.keys, scales.values), codes, read, strict=True):
            assert {int(code.min()), int(code.max())} == {-128, 127}
            for head, position, channel in np.ndindex(2, 5, 4):
                step, place = float(steps[head, channel]), (0, head, position, channel)
                expected = min(127, max(-128, round(float(x[place]) / step)))
                assert code[place] == expected
                assert float(value[place]) == pytest.approx(expected * step)

    def test_they_follow_the_channel(self) -> None:
        keys, values = torch.full((1, 2, 3, 4), 0.1), torch.full((1, 2, 3, 4), 0.1)
        keys[0, 1, 2, 3], values[0, 0, 1, 2] = 50, -20
        seen = KvRange()
        seen.add(keys[:, :, :1], values[:, :, :1])
        seen.add(keys[:, :, 1:], values[:, :, 1:])
        scales = seen.scales()
        assert (scales.values[0, 2] * 127).item() == pytest.approx(20 * HEADROOM)
        assert (scales.values * 127 > 0.2 * HEADROOM).sum() == 1
        # Both channels of the rotary pair (1, 3) of head 1.
        assert (scales.keys * 127 > 0.2 * HEADROOM).nonzero().tolist() == [[1, 1], [1, 3]]

    def test_those_of_keys_hold_at_every_position(self) -> None:
        config = DecoderConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=4000)
        plain = torch.randn(1, 2, 30, 16, generator=torch.Generator().manual_seed(1))
        cos, sin = rotary_tables(config, 4000, 4000)
        near, far = KvRange(), KvRange()
        near.add(rotate(plain, cos[:30], sin[:30]), plain)
        for first in range(30, 3970, 197):
            keys = rotate(plain, cos[first : first + 30], sin[first : first + 30])
            far.add(keys, plain)
            assert (keys.abs() <= near.scales().keys[:, None] * 127 / HEADROOM * 1.0001).all()
        torch.testing.assert_close(near.scales().keys, far.scales().keys)

    def test_a_channel_that_is_always_zero_has_a_positive_scale(self) -> None:
        seen = KvRange()
        seen.add(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
        scales = seen.scales()
        assert (scales.keys > 0).all()
        assert (scales.values > 0).all()
        assert not any(x.any() for x in scales.codes(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)))

    def test_both_modalities_and_the_calibration_are_looked_at(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With calibration the scales come from it alone, so that the held-out prompts stay unseen."""
        seen: list[int] = []
        original = KvRange.add

        def counted(self: KvRange, keys: torch.Tensor, values: torch.Tensor) -> None:
            seen.append(keys.shape[2])
            original(self, keys, values)

        monkeypatch.setattr(KvRange, "add", counted)
        for index in range(16):
            Image.new("RGB", (20, 20), (index * 15, 40, 90)).save(tmp_path / f"{index:02}.png")
        report = export_bundle(
            ExportConfig(golden / "a1_base_bin" / "model", tmp_path / "out" / "bundle", calibration=tmp_path)
        )
        calibrated = report.calibration.text_rows + report.calibration.image_rows
        assert report.calibration.image_rows > 0
        assert sum(seen[-report.calibration.samples :]) == calibrated


@pytest.mark.slow
class TestExport:
    def planted(self, golden: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(ParityError, match=rf"decoder\.kv_int8\.onnx {message}"):
            export_bundle(ExportConfig(golden / "a1_base_bin" / "model", tmp_path / "bundle", weights="fp32"))
        assert list(tmp_path.iterdir()) == []

    def test_heads_exchanged(self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = graph.padded
        monkeypatch.setattr(graph, "padded", lambda steps, config: original(steps, config)[:, ::-1].copy())
        self.planted(golden, tmp_path, r"does not round keys as torch does: \d+\.\d% of the codes in the first layer")

    def test_values_a_little_off(self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = pipeline.write_int8_kv_graph

        def write(source: Path, target: Path, config: DecoderConfig, scales: list[KvScales]) -> None:
            original(source, target, config, [KvScales(entry.keys, entry.values * 1.05) for entry in scales])

        monkeypatch.setattr(pipeline, "write_int8_kv_graph", write)
        self.planted(golden, tmp_path, "does not round values as torch does")

    def test_far_too_wide_steps_in_later_layers(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = pipeline.write_int8_kv_graph

        def write(source: Path, target: Path, config: DecoderConfig, scales: list[KvScales]) -> None:
            wide = [KvScales(entry.keys * 8, entry.values * 8) for entry in scales[1:]]
            original(source, target, config, [scales[0], *wide])

        monkeypatch.setattr(pipeline, "write_int8_kv_graph", write)
        self.planted(golden, tmp_path, "does not compute what torch computes with keys and values rounded")

    def test_nothing_is_written_that_cannot_be_checked(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kv_int8, "MINIMUM_ONNXRUNTIME", "99.1")
        report = export_bundle(ExportConfig(golden / "a1_base_bin" / "model", tmp_path / "bundle", weights="fp32"))
        assert report.kv_int8 is None
        assert Bundle.open(tmp_path / "bundle").manifest.kv_cache == {"fp32": "1.22"}
        assert not (tmp_path / "bundle" / "decoder.kv_int8.onnx").exists()
        with pytest.raises(ConfigError, match="offers fp32; choose"):
            Owl2.load(tmp_path / "bundle", kv_cache="int8")

    def test_the_report_tells_loss_and_memory(self, sample_bundle: Path) -> None:
        report = json.loads((sample_bundle / "report.json").read_text())
        loss, accuracy = report["kv_int8"], report["accuracy"]
        assert loss["positions"] == accuracy["positions"]
        assert loss["scales_from"] == "calibration"
        assert 0 < loss["kl_text"] < 0.1 * accuracy["kl_text"]
        assert 0 < loss["kl_image"] < accuracy["kl_image"]
        assert loss["agreement"] > 0.95
        assert loss["torch_difference"] < 0.1
        assert loss["bytes_per_position"] == 2 * 5 * 256
        assert loss["bytes_per_position_fp16"] == 2 * loss["bytes_per_position"]
        assert loss["bytes_per_position_fp32"] == 4 * loss["bytes_per_position"]

    def test_no_more_logits_are_kept_than_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept, modality = kv_int8.FloatLogits(), np.zeros(4, np.int64)
        monkeypatch.setattr(kv_int8, "MAX_KEPT_BYTES", 1000)
        for count in (10, 20, 5):  # 400, 800 and 200 bytes
            kept.offer(np.zeros((count, 3), np.float32), modality, np.zeros((count, 10), np.float32))
        assert [len(logits) for _, _, logits in kept.prompts] == [10, 5]


class TestCommands:
    def run(self, *args: object) -> str:
        result = CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="owl2")
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_ask(self, bundle_a1: Path, owl: Owl2, image: Path) -> None:
        asked = ("ask", bundle_a1, "What is it?", "--image", image, "--max-new-tokens", 12, "--json", "--kv-cache")
        records = {kind: json.loads(self.run(*asked, kind)) for kind in ("int8", "fp32")}
        assert records["int8"]["text"] == owl.chat().ask("What is it?", image, max_new_tokens=12).text
        assert records["int8"]["kv_cache_positions"] == GROWTH
        assert records["int8"]["kv_cache_memory"] == GROWTH * spec.kv_bytes(owl.config.decoder, "int8")
        assert records["fp32"]["kv_cache_memory"] == GROWTH * spec.kv_bytes(owl.config.decoder, "fp32")

    def test_the_sample_model_answers_alike(self, sample_bundle: Path, sample_checkpoint: Path) -> None:
        image = sample_checkpoint.parent / "pictures" / "scene3.png"
        asked = ("ask", sample_bundle, "Describe the picture.", "--image", image, "--kv-cache")
        assert self.run(*asked, "int8") == self.run(*asked, "fp32")

    def test_stats_name_the_memory(self, bundle_a1: Path) -> None:
        asked = ("ask", bundle_a1, "What is it?", "--max-new-tokens", 3, "--stats", "--kv-cache", "int8")
        result = CliRunner().invoke(cli, [str(arg) for arg in asked], prog_name="owl2")
        assert "96.0 KiB of it K/V cache for 256 positions" in result.stderr

    def test_info(self, bundle_a1: Path, copy: Path) -> None:
        record = json.loads(self.run("info", bundle_a1, "--json"))
        assert record["kv_cache"]["int8"] == {
            "bytes_per_position": 384,
            "bytes_full_context": 384 * 2048,
            "minimum_onnxruntime": "1.27",
            "usable": True,
        }
        assert record["kv_int8"] == json.loads((bundle_a1 / "report.json").read_text())["kv_int8"]
        table = self.run("info", bundle_a1)
        assert "  int8  384 B per position, 768.0 KiB at full context (float16 would take 768 B per position)" in table
        assert "int8 K/V cache against fp32\n  scales_from       the measured prompts\n" in table
        edit(copy, kv_cache={"fp32": "1.22", "int8": "99.1"})
        assert "; needs onnxruntime 99.1 or newer" in self.run("info", copy)
