"""The native TensorRT backend on a GPU that does not exist: see ``fake_tensorrt``."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from fake_tensorrt import FakeEngineFile, FakeGpu, FakeTensorRt, IExecutionContext, Profile
from PIL import Image

from owl2 import ConfigError, Owl2
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.export.tensorrt.profiles import Limits, decoder_profiles, vision_profile
from owl2.runtime import spec
from owl2.runtime.__main__ import cli
from owl2.runtime.backends import choose
from owl2.runtime.backends.ort.engine import OrtEngine
from owl2.runtime.backends.ort.installation import driver_problem
from owl2.runtime.backends.steps import row_inputs
from owl2.runtime.backends.tensorrt import context as tensorrt_context, cuda as cuda_memory, engine as tensorrt
from owl2.runtime.backends.tensorrt.cuda import CudaGpu, Slots, Strided, version_problem
from owl2.runtime.backends.tensorrt.engine import (
    DeviceRows,
    TensorRtEngine,
    TensorRtOptions,
    block_end,
    decode_rows,
    routed,
)
from owl2.runtime.backends.tensorrt.records import FORMAT, EngineRecord, read_record
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import (
    BackendError,
    BackendUnavailableError,
    BundleCorruptError,
    BundleError,
    InsufficientMemoryError,
)
from owl2.runtime.evaluation.verify import verify
from owl2.runtime.kv_cache import KvCache
from owl2.runtime.placement import Placement
from owl2.runtime.verification import FileEntry, hash_file

VERSION = "10.3.0"
CONTEXT = 640


def profiles(bundle: Bundle, record: EngineRecord) -> tuple[list[Profile], list[Profile]]:
    """Those that the exporter builds with: of the decoder and of the vision tower."""
    model, limits = bundle.manifest.model, Limits(record.context, record.prefill, record.images)
    made = (decoder_profiles(model, limits), (vision_profile(model, limits),))
    decoder, vision = ([{name: (least, most) for name, (least, _, most) in one.items()} for one in of] for of in made)
    return decoder, vision


def build(folder: Path, **changes: Any) -> EngineRecord:
    """Put "engines" into a bundle."""
    bundle = Bundle.open(folder)
    listed = bundle.manifest.files
    names = [name for name in listed if name.startswith(("decoder.onnx", "vision.onnx"))]
    record = EngineRecord(
        format=FORMAT,
        kind="tensorrt",
        tensorrt=VERSION,
        gpu="Fake Orin",
        compute_capability=(8, 7),
        driver=None,
        context=CONTEXT,
        prefill=512,
        images=1,
        source={name: listed[name].sha256 for name in names},
        files={name: FileEntry(0, "") for name in ("decoder.engine", "vision.engine")},
    )
    record = replace(record, **changes)
    target = folder / "engines" / f"{record.kind}-sm87"
    target.mkdir(parents=True)
    decoder, vision = profiles(bundle, record)
    FakeEngineFile(str(folder / spec.DECODER_GRAPH), decoder, [5000, 300]).write(target / "decoder.engine")
    FakeEngineFile(str(folder / spec.VISION_GRAPH), vision, [1000]).write(target / "vision.engine")
    files = {path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in target.iterdir()}
    record = replace(record, files=files)
    write_record(target, record.to_json())
    return record


def write_record(target: Path, content: dict[str, Any]) -> Path:
    """Write ``engine.json`` and let the manifest name it."""
    path, manifest = target / "engine.json", target.parents[1] / "owl2.json"
    path.write_text(json.dumps(content))
    listed = json.loads(manifest.read_text())
    listed["engines"][target.name] = hash_file(path)
    manifest.write_text(json.dumps(listed))
    return path


def with_engines(source: Path, target: Path, **changes: Any) -> Bundle:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("engines"))
    build(target, **changes)
    return Bundle.open(target)


class Fake:
    """An engine on a fake GPU."""

    def __init__(self, bundle: Bundle, *, rtx: bool = False, device: FakeGpu | None = None, **options: Any) -> None:
        self.device = device or FakeGpu()
        self.trt = FakeTensorRt(self.device, rtx=rtx)
        self.engine = TensorRtEngine(bundle, TensorRtOptions(**options), self.trt, self.device)
        self.owl = Owl2(bundle, self.engine)
        self.prefilling, self.decoding, self.vision = self.trt.contexts

    def host_copies_of(self, rows: DeviceRows) -> list[fake_tensorrt.Copy]:
        """Copies between the host and K/V rows."""
        end = rows.address + rows.nbytes
        return [c for c in self.device.copies if c.direction != "within" and rows.address < c.address + c.nbytes <= end]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Path:
    target = tmp_path_factory.mktemp("trt") / "bundle"
    export_bundle(ExportConfig(sample_checkpoint, target, method="rtn", dialect="onnx"))
    build(target)
    return target


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder)


@pytest.fixture
def fake(bundle: Bundle) -> Fake:
    return Fake(bundle)


@pytest.fixture(scope="module")
def float32(bundle_a2_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Golden a2 in float32, with engines."""
    return with_engines(bundle_a2_onnx, tmp_path_factory.mktemp("a2") / "bundle")


@pytest.fixture
def image(request: pytest.FixtureRequest) -> Image.Image:
    with Image.open(request.config.rootpath / "sample" / "pictures" / "scene3.png") as opened:
        return opened.convert("RGB")


def converse(owl: Owl2, image: Image.Image) -> list[list[int]]:
    chat, ids = owl.chat(), []
    for question, images in (("Describe the picture.", [image]), ("What colour is the largest shape?", [])):
        answer = chat.ask(question, images, max_new_tokens=24)
        _ = answer.text
        ids.append(answer.ids)
    return ids


class TestConversation:
    @pytest.mark.parametrize("cuda_graphs", [True, False])
    def test_is_that_of_onnx_runtime(self, bundle: Bundle, image: Image.Image, cuda_graphs: bool) -> None:
        fake = Fake(bundle, cuda_graphs=cuda_graphs)
        expected = converse(Owl2.load(bundle.folder), image)
        assert converse(fake.owl, image) == expected
        assert sum(map(len, expected)) > 8
        assert (fake.device.launches > 4) == cuda_graphs

    def test_golden_logits(self, float32: Bundle, golden: Path) -> None:
        case, fake = golden / "a2_fp16_safetensors", Fake(float32)
        prompts = {entry["id"]: entry["prompt"] for entry in json.loads((case / "prompts.json").read_text())}
        recorded = np.load(case / "forward.npz")
        for entry in json.loads((case / "forward_index.json").read_text()):
            images = [golden / "images" / name for name in entry["images"]]
            made = fake.owl.logits(prompts[entry["prompt_id"]], images=images, preprocess="resize")
            np.testing.assert_allclose(made, recorded[f"{entry['name']}/logits"], atol=1e-4, rtol=0)

    def test_the_host_never_sees_keys_and_values(self, fake: Fake, image: Image.Image) -> None:
        kept: list[DeviceRows] = []
        allocate = fake.engine.allocate
        fake.engine.allocate = lambda *given: kept.append(allocate(*given)) or kept[-1]  # type: ignore[method-assign]
        converse(fake.owl, image)
        assert kept
        assert not any(fake.host_copies_of(rows) for rows in kept)
        model = fake.owl.config.decoder
        down = [copy.nbytes for copy in fake.device.copies if copy.direction == "down"]
        rows = fake.owl.config.rows_per_image * model.hidden_size * 4
        assert set(down) == {model.vocab_size * 4, rows}, "logits of one row, and the rows of the image"
        step = next(i for i, copy in enumerate(fake.device.copies) if copy.direction == "within")
        up = [copy.nbytes for copy in fake.device.copies[step:] if copy.direction == "up"]
        assert max(up) <= 2 * CONTEXT * 512

    def test_two_chats_take_turns(self, fake: Fake) -> None:
        """Their buffers differ, so a graph of one must not serve the other."""
        asked = "Name a colour."
        expected = fake.owl.chat().ask(asked, max_new_tokens=6).text
        answers = [iter(fake.owl.chat().ask(asked, max_new_tokens=6)) for _ in range(2)]
        texts = ["", ""]
        for chunks in zip(*answers):
            texts = [text + chunk.text for text, chunk in zip(texts, chunks)]
        assert texts == [expected, expected]

    def test_rtx_makes_its_own_graphs(self, bundle: Bundle, tmp_path: Path, image: Image.Image) -> None:
        made = with_engines(bundle.folder, tmp_path / "b", kind="tensorrt-rtx")
        fake = Fake(made, rtx=True, kind="tensorrt-rtx")
        assert converse(fake.owl, image) == converse(Owl2.load(bundle.folder), image)
        assert (fake.device.captures, fake.decoding.config.cuda_graph_strategy) == (0, "whole")
        assert (
            Fake(made, rtx=True, kind="tensorrt-rtx", cuda_graphs=False).decoding.config.cuda_graph_strategy != "whole"
        )


class Steps:
    """The same random rows through both backends."""

    def __init__(self, bundle: Bundle, count: int) -> None:
        self.reference = OrtEngine(bundle)
        hidden = bundle.manifest.model.decoder.hidden_size
        generator = np.random.default_rng(5)
        self.embeds = generator.standard_normal((count, hidden), dtype=np.float32)
        self.modality = np.zeros(count, np.int64)
        self.modality[10:30] = 1

    def expected(self) -> np.ndarray:
        """Logits of all rows."""
        count = len(self.embeds)
        buffers = self.reference.allocate(count, None)
        return self.reference.prefill(self.embeds, self.modality, 0, buffers, np.arange(count))


class TestSteps:
    def test_decoding_over_more_than_256_positions(self, float32: Bundle) -> None:
        fake, steps = Fake(float32), Steps(float32, 530)
        expected = steps.expected()
        cache, made = KvCache(fake.engine, 600), []
        embeds, modality = steps.embeds, steps.modality
        made.append(fake.engine.prefill(embeds[:250], modality[:250], 0, cache.reserve(250), np.arange(250)))
        cache.commit(range(250))
        for i in range(250, 530):
            made.append(fake.engine.decode(embeds[i : i + 1], i, cache.reserve(1))[None])
            cache.commit([i])
        np.testing.assert_allclose(np.concatenate(made), expected, atol=1e-4)
        # Up to 256 positions, up to 512, to the end of the buffers; the first step of each runs by itself.
        seen = {shapes[spec.past_names(0)[0]][0] for shapes in fake.decoding.enqueued}
        assert seen == {256, 512, 600}
        assert fake.device.captures == 3
        assert fake.device.launches == 280 - 3
        assert len(fake.device.graphs) == 1
        row, sizes = cache.nbytes // 600, [array.nbytes for array in fake.device.allocations.values()]
        assert [sizes.count(capacity * row) for capacity in (256, 512, 600)] == [0, 0, 1], "earlier ones are given back"

    @pytest.mark.parametrize("prefill", [7, 16, 39])
    def test_prefill_in_blocks(self, float32: Bundle, tmp_path: Path, prefill: int) -> None:
        """Of which one of 7 has image rows alone."""
        fake = Fake(with_engines(float32.folder, tmp_path / "b", prefill=prefill))
        steps, rows = Steps(float32, 60), fake.engine.allocate(64, None)
        wanted = np.array([59, 0, 11, 11, 30])
        made = fake.engine.prefill(steps.embeds[:40], steps.modality[:40], 0, rows, np.array([39, 3]))
        np.testing.assert_allclose(made, steps.expected()[[39, 3]], atol=1e-4)
        made = fake.engine.prefill(steps.embeds, steps.modality, 0, rows, wanted)
        np.testing.assert_allclose(made, steps.expected()[wanted], atol=1e-4)
        assert max(shapes[spec.MODALITY][0] for shapes in fake.prefilling.enqueued) == prefill

    def test_angles_of_a_stretched_model_are_those_of_the_whole_prompt(
        self, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        scaling = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}
        export_bundle(ExportConfig(make_checkpoint(top=scaling), tmp_path / "s", weights="fp32", dialect="onnx"))
        bundle = with_engines(tmp_path / "s", tmp_path / "b", prefill=9)
        fake, steps = Fake(bundle), Steps(bundle, 40)
        made = fake.engine.prefill(steps.embeds, steps.modality, 0, fake.engine.allocate(64, None), np.arange(40))
        np.testing.assert_allclose(made, steps.expected(), atol=1e-4)

    def test_the_whole_context_can_be_used(self, float32: Bundle, tmp_path: Path) -> None:
        fake = Fake(with_engines(float32.folder, tmp_path / "b", context=40, prefill=40))
        steps, rows = Steps(float32, 40), fake.engine.allocate(40, None)
        made = [fake.engine.prefill(steps.embeds[:39], steps.modality[:39], 0, rows, np.arange(39))]
        made.append(fake.engine.decode(steps.embeds[39:], 39, rows)[None])
        np.testing.assert_allclose(np.concatenate(made), steps.expected(), atol=1e-4)
        fake.engine.prefill(steps.embeds, steps.modality, 0, rows, np.arange(40))
        with pytest.raises(ConfigError, match="do not fit K/V buffers of 40"):
            fake.engine.decode(steps.embeds[39:], 40, rows)
        larger = fake.engine.allocate(64, rows)
        with pytest.raises(ConfigError, match="position 40 does not fit the engine's context of 40"):
            fake.engine.decode(steps.embeds[39:], 40, larger)
        with pytest.raises(ConfigError, match="position 40 does not fit the engine's context of 40"):
            fake.engine.prefill(steps.embeds[:1], steps.modality[:1], 40, larger, np.array([0]))

    def test_images_in_blocks(self, float32: Bundle, tmp_path: Path) -> None:
        fake = Fake(with_engines(float32.folder, tmp_path / "b", images=2))
        size = float32.manifest.model.vision.image_size
        pixels = np.random.default_rng(0).standard_normal((5, 3, size, size), dtype=np.float32)
        np.testing.assert_allclose(
            fake.engine.encode_images(pixels), OrtEngine(float32).encode_images(pixels), atol=1e-4
        )
        assert [shapes[spec.PIXELS][0] for shapes in fake.vision.enqueued] == [2, 2, 1]

    def test_rows_of_other_backends_are_refused(self, fake: Fake, bundle: Bundle) -> None:
        embeds = np.zeros((1, fake.owl.config.decoder.hidden_size), np.float32)
        with pytest.raises(BackendError, match="belong to another backend: RowBuffers"):
            fake.engine.decode(embeds, 0, OrtEngine(bundle).allocate(4, None))


class TestFailure:
    @pytest.fixture
    def steps(self, float32: Bundle) -> Steps:
        return Steps(float32, 40)

    @pytest.fixture
    def fake(self, float32: Bundle) -> Fake:
        return Fake(float32)

    @pytest.mark.parametrize("failing", ["prefill", "decode"])
    def test_leaves_what_was_cached(self, fake: Fake, steps: Steps, failing: str) -> None:
        rows, engine, expected = fake.engine.allocate(64, None), fake.engine, steps.expected()
        engine.prefill(steps.embeds[:35], steps.modality[:35], 0, rows, np.array([34]))
        made = [engine.decode(steps.embeds[i : i + 1], i, rows) for i in (35, 36)]
        context: IExecutionContext = fake.prefilling if failing == "prefill" else fake.decoding
        context.failures = 1
        engine._decoding.graphs = False  # a graph that was captured does not ask the context again
        engine._parts.drop_graph()

        def step() -> None:
            if failing == "prefill":
                engine.prefill(steps.embeds[:3], steps.modality[:3], 37, rows, np.array([0]))
            else:
                engine.decode(steps.embeds[:1], 37, rows)

        with pytest.raises(BackendError, match=r"the decoder failed: Cuda Runtime \(an illegal memory access"):
            step()
        made += [engine.decode(steps.embeds[i : i + 1], i, rows) for i in range(37, 40)]
        np.testing.assert_allclose(np.stack(made), expected[35:], atol=1e-4)

    def test_a_cancelled_answer_can_be_followed_by_another(self, bundle: Bundle) -> None:
        fake = Fake(bundle)
        fresh = fake.owl.chat().ask("Name a colour.", max_new_tokens=8).text
        chat = fake.owl.chat()
        next(iter(chat.ask("Tell me of something else entirely.", max_new_tokens=8)))
        assert chat.ask("Name a colour.", max_new_tokens=8).text == fresh

    def test_capturing_goes_on_without(self, fake: Fake, steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
        fake.device.captures_fail = True
        rows, expected = fake.engine.allocate(64, None), steps.expected()
        fake.engine.prefill(steps.embeds[:30], steps.modality[:30], 0, rows, np.array([0]))
        with caplog.at_level(logging.WARNING):
            made = [fake.engine.decode(steps.embeds[i : i + 1], i, rows) for i in range(30, 40)]
        np.testing.assert_allclose(np.stack(made), expected[30:], atol=1e-4)
        assert [record.getMessage() for record in caplog.records] == [
            "decoding goes on without CUDA graphs: cudaStreamEndCapture failed: cudaErrorStreamCaptureInvalidated"
        ]
        assert not fake.device.recording

    def test_capturing_refused_by_tensorrt(self, fake: Fake, steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
        rows, expected = fake.engine.allocate(64, None), steps.expected()
        fake.engine.prefill(steps.embeds[:30], steps.modality[:30], 0, rows, np.array([0]))
        made = [fake.engine.decode(steps.embeds[30:31], 30, rows)]
        fake.decoding.failures = 1
        made += [fake.engine.decode(steps.embeds[i : i + 1], i, rows) for i in range(31, 40)]
        np.testing.assert_allclose(np.stack(made), expected[30:], atol=1e-4)
        assert "without CUDA graphs: capturing the decoder failed: Cuda Runtime" in caplog.text
        assert not fake.device.recording
        assert not fake.device.graphs

    def test_a_full_gpu_leaves_other_conversations_and_their_graph(self, float32: Bundle) -> None:
        fake, steps = Fake(float32), Steps(float32, 301)
        engine, embeds = fake.engine, steps.embeds
        short, long = engine.allocate(256, None), engine.allocate(640, None)
        for rows, count in ((short, 20), (long, 300)):
            engine.prefill(embeds[:count], steps.modality[:count], 0, rows, np.array([count - 1]))
        expected = [engine.decode(embeds[20:21], 20, short) for _ in range(2)][-1]
        assert fake.device.graphs
        fake.device.limit = fake.device.allocated
        # Its mask is longer than those before.
        np.testing.assert_allclose(engine.decode(embeds[300:], 300, long), steps.expected()[300], atol=1e-4)
        for _ in range(3):
            np.testing.assert_array_equal(engine.decode(embeds[20:21], 20, short), expected)

    def test_a_slot_that_cannot_grow_stays(self) -> None:
        device = FakeGpu()
        slots = Slots(device)
        address = slots.reserve("mask", 100)
        device.limit = 1024
        with pytest.raises(BackendError, match="no room"):
            slots.reserve("mask", 1000)
        assert slots.reserve("mask", 256) == address
        device.limit = 2048
        assert slots.reserve("mask", 1000) != address
        assert list(device.allocations) == [slots.reserve("mask", 1000)]

    @pytest.mark.parametrize("undone", ["prefill", "decode", "failed"])
    def test_an_overflowing_step_that_was_undone_spoils_nothing(self, float32: Bundle, undone: str) -> None:
        fake, steps = Fake(float32), Steps(float32, 40)
        engine, embeds, modality = fake.engine, steps.embeds, steps.modality
        rows = engine.allocate(64, None)
        engine.prefill(embeds[:35], modality[:35], 0, rows, np.array([0]))
        overflowing = np.full_like(embeds[:9], np.inf)
        if undone == "decode":
            assert not np.isfinite(engine.decode(overflowing[:1], 35, rows)).all()
        else:
            assert not np.isfinite(engine.prefill(overflowing, modality[:9], 35, rows, np.array([8]))).all()
        if undone == "failed":  # the first step after it, so that what is stale is still known to be
            fake.decoding.failures = 1
            with pytest.raises(BackendError, match="the decoder failed"):
                engine.decode(embeds[35:36], 35, rows)
        grown = engine.allocate(128, rows)
        for buffers in (rows, grown):
            made = [engine.decode(embeds[i : i + 1], i, buffers) for i in range(34, 40)]
            np.testing.assert_allclose(np.stack(made), steps.expected()[34:], atol=1e-4)

    def test_nor_does_one_from_the_beginning(self, float32: Bundle, fake: Fake, steps: Steps) -> None:
        for engine in (fake.engine, OrtEngine(float32)):
            rows, every = engine.allocate(64, None), np.arange(40)
            engine.prefill(np.full_like(steps.embeds, np.inf), steps.modality, 0, rows, every)
            made = engine.prefill(steps.embeds, steps.modality, 0, rows, every)
            np.testing.assert_allclose(made, steps.expected(), atol=1e-4)

    def test_only_what_was_undone_is_cleared(self, float32: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        fake, steps = Fake(float32), Steps(float32, 40)
        engine, embeds, modality = fake.engine, steps.embeds, steps.modality
        rows, cleared = engine.allocate(64, None), []
        clear = fake.device.clear
        monkeypatch.setattr(fake.device, "clear", lambda *given: cleared.append(given[:2]) or clear(*given))
        engine.prefill(embeds[:30], modality[:30], 0, rows, np.array([0]))
        for i in range(30, 36):
            engine.decode(embeds[i : i + 1], i, rows)
        assert not cleared
        for _ in range(2):
            engine.prefill(embeds[:4], modality[:4], 31, rows, np.array([0]))
            assert cleared == [(rows.at(index, 31), 5 * rows.row) for index in range(rows.count)]
            cleared.clear()
            engine.decode(embeds[:1], 35, rows)

    def test_old_messages_are_not_the_reason(self, fake: Fake) -> None:
        rows = fake.engine.allocate(8, None)
        fake.engine._parts.messages.add("something of long ago")
        fake.decoding.failures = 1
        with pytest.raises(BackendError, match=r"^the decoder failed: Cuda Runtime \(an illegal memory access"):
            fake.engine.decode(np.zeros((1, fake.owl.config.decoder.hidden_size), np.float32), 0, rows)
        fake.engine._parts.messages.add("something of long ago")
        with pytest.raises(BackendError, match=r"refuses the shape \[0, 3, 1, 1\] of pixel_values: pixel_values: "):
            fake.engine._vision.bind(spec.PIXELS, 256, (0, 3, 1, 1))

    def test_a_shape_outside_the_profile(self, fake: Fake) -> None:
        with pytest.raises(BackendError, match=r"refuses the shape \[0, 3, 1, 1\] of pixel_values: pixel_values: "):
            fake.engine._vision.bind(spec.PIXELS, 256, (0, 3, 1, 1))


class TestMemory:
    def test_everything_is_given_back(self, float32: Bundle) -> None:
        fake = Fake(float32)
        rows = fake.engine.allocate(300, None)
        grown = fake.engine.allocate(600, rows)
        assert grown.nbytes == 2 * rows.nbytes
        del rows
        gc.collect()
        assert fake.device.allocated >= grown.nbytes
        for i in range(3):
            fake.engine.decode(
                np.zeros((1, grown.row // 4), np.float32)[:, : fake.owl.config.decoder.hidden_size], i, grown
            )
        assert fake.device.graphs
        fake.engine.close()
        assert set(fake.device.allocations) == {grown.address}
        assert not {**fake.device.graphs, **fake.device.streams}
        fake.engine.close()
        with pytest.raises(BackendError, match="was closed"):
            fake.engine.decode(np.zeros((1, 64), np.float32), 0, grown)
        del grown
        gc.collect()
        assert not fake.device.allocations

    def test_without_being_asked(self, float32: Bundle) -> None:
        device = FakeGpu()
        owl = Fake(float32, device=device).owl
        text = owl.generate("Hello", max_new_tokens=4).text
        assert text is not None
        del owl
        gc.collect()
        assert not {**device.allocations, **device.graphs, **device.streams}

    def test_at_the_end_of_the_process(self, float32: Bundle) -> None:
        """Whatever is still alive then."""
        script = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            "from fake_tensorrt import *\n"
            "from owl2.runtime.backends.tensorrt.engine import *\n"
            "import atexit\n"
            "device = FakeGpu()\n"
            f"bundle = Bundle.open(__import__('pathlib').Path({str(float32.folder)!r}))\n"
            "atexit.register(lambda: print('left', len(device.allocations), len(device.streams)))\n"
            "engine = TensorRtEngine(bundle, TensorRtOptions(), FakeTensorRt(device), device)\n"
            "rows = engine.allocate(8, None)\n"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert (result.returncode, result.stdout, result.stderr) == (0, "left 0 0\n", "")

    def test_a_failed_load_leaves_nothing(self, float32: Bundle, tmp_path: Path) -> None:
        device = FakeGpu(limit=6000)
        with pytest.raises(BackendError, match="no room"):
            Fake(float32, device=device)
        gc.collect()
        assert not {**device.allocations, **device.streams}

    def test_contexts_share_scratch_memory(self, fake: Fake) -> None:
        assert {context.memory for context in fake.trt.contexts} == {fake.decoding.memory}
        assert fake.decoding.memory[1] == 5120

    def test_no_room_for_a_longer_conversation(self, float32: Bundle) -> None:
        device = FakeGpu()
        fake = Fake(float32, device=device)
        rows = fake.engine.allocate(8, None)
        device.limit = device.allocated + rows.nbytes
        with pytest.raises(BackendError, match="no room"):
            fake.engine.allocate(16, rows)
        gc.collect()
        assert rows.address in device.allocations


class TestBundle:
    """What is wrong with the engines of a bundle is said before any of them is loaded."""

    @pytest.fixture
    def copy(self, float32: Bundle, tmp_path: Path) -> Path:
        return Path(shutil.copytree(float32.folder, tmp_path / "bundle"))

    def load(self, folder: Path, **changes: Any) -> Fake:
        bundle, device = Bundle.open(folder), FakeGpu(**changes)
        return Fake(bundle, device=device)

    def edit(self, folder: Path, **changes: Any) -> Path:
        target = folder / "engines" / "tensorrt-sm87"
        return write_record(target, json.loads((target / "engine.json").read_text()) | changes)

    def test_is_opened_with_and_without(self, copy: Path) -> None:
        assert Bundle.open(copy).manifest == Bundle.open(copy).manifest
        assert OrtEngine(Bundle.open(copy))

    def test_none(self, bundle_a2_onnx: Path) -> None:
        again = f"run on this device: owl2-export engine {bundle_a2_onnx} --kind tensorrt"
        with pytest.raises(BundleError, match=rf"has no engines of tensorrt; {again}$"):
            self.load(bundle_a2_onnx)

    def test_of_another_gpu(self, copy: Path) -> None:
        message = (
            rf"are for other GPUs \(tensorrt-sm87\), this device is a Thor \(sm110\); "
            rf"run on this device: owl2-export engine {copy} --kind tensorrt$"
        )
        with pytest.raises(BackendUnavailableError, match=message):
            self.load(copy, name="Thor", compute_capability=(11, 0))

    @pytest.mark.parametrize(
        ("capability", "where", "gpu"),
        [
            ((8, 9), "any machine", " --gpu sm89"),
            ((12, 1), "this device", ""),
            ((12, 0), "any machine", " --gpu sm120"),
        ],
    )
    def test_the_command_builds_the_kind_that_is_missing(
        self, copy: Path, capability: tuple[int, int], where: str, gpu: str
    ) -> None:
        """For a GPU that the exporter knows by number, anywhere; it would build the other kind on a server's."""
        again = f"run on {where}: owl2-export engine {copy} --kind tensorrt-rtx{gpu}$"
        device = FakeGpu(compute_capability=capability)
        with pytest.raises(BundleError, match=f"has no engines of tensorrt-rtx; {again}"):
            Fake(Bundle.open(copy), device=device, rtx=True, kind="tensorrt-rtx")
        build(copy, kind="tensorrt-rtx")
        with pytest.raises(BackendUnavailableError, match=rf"other GPUs \(tensorrt-rtx-sm87\), .*; {again}"):
            Fake(Bundle.open(copy), device=device, rtx=True, kind="tensorrt-rtx")

    def test_whose_record_is_of_another_gpu(self, copy: Path) -> None:
        self.edit(copy, compute_capability=[11, 0])
        with pytest.raises(BundleCorruptError, match=r"engine\.json is of engines tensorrt-sm110, not tensorrt-sm87"):
            self.load(copy)

    def test_whose_record_was_edited(self, copy: Path) -> None:
        path = copy / "engines" / "tensorrt-sm87" / "engine.json"
        path.write_text(path.read_text().replace(f'"context": {CONTEXT}', '"context": 4096'))
        with pytest.raises(BundleCorruptError, match=r"engine\.json is not the one that owl2\.json names"):
            self.load(copy)

    def test_of_another_tensorrt(self, copy: Path) -> None:
        bundle, device = Bundle.open(copy), FakeGpu()
        message = r"were built with tensorrt 10\.3\.0, 10\.7\.0 is installed, .* to read them; .*owl2-export engine"
        with pytest.raises(BackendUnavailableError, match=message):
            TensorRtEngine(bundle, TensorRtOptions(), FakeTensorRt(device, "10.7.0"), device)

    def test_of_other_graphs(self, copy: Path) -> None:
        source = read_record(copy / "engines" / "tensorrt-sm87").source
        self.edit(copy, source={**source, "decoder.onnx.data": "0" * 64})
        with pytest.raises(BundleError, match=r"built from another decoder\.onnx\.data than the bundle has now"):
            self.load(copy)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.unlink(), "decoder.engine is missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"decoder.engine has .*truncated"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "decoder.engine was changed"),
        ],
    )
    def test_damaged(self, copy: Path, damage: Callable[[Path], object], message: str) -> None:
        damage(copy / "engines" / "tensorrt-sm87" / "decoder.engine")
        again = f"run on this device: owl2-export engine {copy} --kind tensorrt"
        with pytest.raises(BundleCorruptError, match=f"{message}.*; {again}$"):
            self.load(copy)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 1}, "format 1 is not known; this owl2 reads 2"),
            ({"context": 0}, "context must be positive, got 0"),
            ({"files": {}}, "files: decoder.engine is missing"),
            ({"source": {}}, "source: decoder.onnx is missing"),
            ({"kind": "openvino"}, "expected one of tensorrt, tensorrt-rtx"),
            ({"extra": 1}, "unknown keys extra"),
        ],
    )
    def test_records_that_cannot_be(self, copy: Path, changes: dict[str, Any], message: str) -> None:
        path = self.edit(copy, **changes)
        with pytest.raises(
            BundleCorruptError,
            match=rf"^{path} cannot be used: .*{message}.*owl2-export engine {copy} --kind tensorrt$",
        ):
            self.load(copy)

    def test_a_record_that_is_no_json(self, copy: Path) -> None:
        (copy / "engines" / "tensorrt-sm87" / "engine.json").write_text("{")
        with pytest.raises(BundleCorruptError, match="cannot be used: Expecting"):
            self.load(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("damage", "sm87: vision.engine was changed"),
            ("edit", "engine.json is not the one that owl2.json names"),
            ("graphs", "built from another decoder.onnx than the bundle has now"),
            ("gpu", "engine.json is of engines tensorrt-sm110, not tensorrt-sm87"),
            ("remove", "engine.json cannot be used"),
            ("rename", "engines: '../x-sm87' is no name such as tensorrt-sm87"),
        ],
    )
    def test_info_and_verify_tell_wherever_they_run(self, copy: Path, change: str, message: str) -> None:
        folder, manifest = copy / "engines" / "tensorrt-sm87", copy / "owl2.json"
        if change == "damage":
            path = folder / "vision.engine"
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        elif change == "edit":
            path = folder / "engine.json"
            path.write_text(path.read_text().replace(f'"context": {CONTEXT}', '"context": 4096'))
        elif change == "graphs":
            self.edit(copy, source={**read_record(folder).source, "decoder.onnx": "0" * 64})
        elif change == "gpu":
            self.edit(copy, compute_capability=[11, 0])
        elif change == "remove":
            shutil.rmtree(folder)
        else:
            manifest.write_text(manifest.read_text().replace("tensorrt-sm87", "../x-sm87"))
        for command, shown in (("info", "1 problem:"), ("verify", "nothing was replayed")):
            result = CliRunner().invoke(cli, [command, str(copy)], prog_name="owl2")
            assert result.exit_code == 1
            assert message in result.stdout
            assert shown in result.stdout

    def test_info_and_verify_are_content_with_whole_ones(self, copy: Path) -> None:
        for command in ("info", "verify"):
            result = CliRunner().invoke(cli, [command, str(copy)], prog_name="owl2")
            assert result.exit_code == 0, result.stdout
            assert "files verified" in result.stdout

    def test_tensorrt_refuses(self, copy: Path) -> None:
        path = copy / "engines" / "tensorrt-sm87" / "decoder.engine"
        path.write_bytes(b"no engine at all")
        files = read_record(path.parent).to_json()["files"]
        files["decoder.engine"] = {"size": 16, "sha256": hash_file(path)}
        self.edit(copy, files=files)
        with pytest.raises(
            BackendError, match=r"decoder\.engine cannot be loaded: magicTag failed: it is no TRT engine"
        ):
            self.load(copy)

    def test_of_another_model(self, copy: Path, bundle_a1_onnx: Path) -> None:
        """Whose record was copied together with it."""
        record = read_record(copy / "engines" / "tensorrt-sm87")
        other = shutil.copytree(bundle_a1_onnx, copy.parent / "other")
        shutil.rmtree(other / "engines", ignore_errors=True)
        build(other)
        path = shutil.copy(
            other / "engines/tensorrt-sm87/decoder.engine", copy / "engines/tensorrt-sm87/decoder.engine"
        )
        files = record.to_json()["files"] | {
            "decoder.engine": {"size": Path(path).stat().st_size, "sha256": hash_file(Path(path))}
        }
        self.edit(copy, files=files)
        with pytest.raises(BackendError, match=r"does not fit the manifest: .* is .* needed; build the engines again"):
            self.load(copy)

    def test_the_context_is_that_of_the_engine(self, float32: Bundle, tmp_path: Path) -> None:
        bundle = with_engines(float32.folder, tmp_path / "b", context=40, prefill=40)
        fake = Fake(bundle)
        assert fake.owl.context == 40
        assert Owl2(bundle, fake.engine, 30).context == 30
        with pytest.raises(ConfigError, match="context 41 exceeds the 40 positions that this bundle's engines"):
            Owl2(bundle, fake.engine, 41)


class TestChoice:
    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        """As if it were there; its name tells which one was asked for."""
        device = FakeGpu()

        def opened(index: int) -> FakeGpu:
            device.name = f"GPU {index}"
            return device

        monkeypatch.setattr(choose, "open_gpu", opened)
        monkeypatch.setattr(choose, "import_tensorrt", lambda kind: FakeTensorRt(device, rtx=kind == "tensorrt-rtx"))
        return device

    @pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
    def test_engines_are_run_natively(self, float32: Bundle, gpu: FakeGpu, tmp_path: Path, kind: Any) -> None:
        bundle = with_engines(float32.folder, tmp_path / "b", kind=kind, context=300, prefill=64)
        owl = Owl2.load(bundle.folder, device=f"{kind}:1")
        _ = owl.generate("Hello", max_new_tokens=3).text
        assert gpu.copies
        assert (gpu.name, owl.context) == ("GPU 1", 300)
        with pytest.raises(ConfigError, match="context 301 exceeds the 300 positions that this bundle's engines"):
            Owl2.load(bundle.folder, device=kind, context=301)

    def test_certificates_are_replayed_there(self, folder: Path, gpu: FakeGpu) -> None:
        verdict = verify(folder, device="tensorrt")
        assert verdict.passed, verdict
        assert gpu.launches > 0

    @pytest.mark.parametrize(
        ("device", "capability", "version", "context", "error", "message"),
        [
            ("tensorrt-rtx", (8, 7), VERSION, None, BundleError, "has no engines of tensorrt-rtx"),
            ("tensorrt", (11, 0), VERSION, None, BackendUnavailableError, "are for other GPUs"),
            ("tensorrt", (8, 7), "10.7.0", None, BackendUnavailableError, "were built with tensorrt 10.3.0"),
            ("tensorrt", (8, 7), VERSION, 301, ConfigError, "context 301 exceeds the 300 positions"),
            ("cuda:1", (8, 7), VERSION, None, BackendError, "onnx on the CPU only, .* cuda:1 export .* --dialect ort"),
        ],
    )
    def test_what_cannot_run_is_refused_before_anything_large_is_read(
        self,
        float32: Bundle,
        gpu: FakeGpu,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        device: str,
        capability: tuple[int, int],
        version: str,
        context: int | None,
        error: type[Exception],
        message: str,
    ) -> None:
        """So damage to files, which only reading them tells, is not what is told."""
        copy = with_engines(float32.folder, tmp_path / "b", context=300, prefill=64).folder
        for path in (copy / "decoder.onnx.data", copy / "engines" / "tensorrt-sm87" / "decoder.engine"):
            path.write_bytes(b"damaged")
        gpu.compute_capability = capability
        monkeypatch.setattr(choose, "import_tensorrt", lambda kind: FakeTensorRt(gpu, version))
        with pytest.raises(error, match=message):
            Owl2.load(copy, device=device, context=context)
        if context is None:
            with pytest.raises(error, match=message):
                verify(copy, device=device)

    def test_a_bundle_with_engines_is_whole_without_onnxruntime(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        result = CliRunner().invoke(cli, ["info", str(folder)], prog_name="owl2")
        assert result.exit_code == 0, result.output
        assert "none installed" in result.stdout
        assert "TensorRT engines" in result.stdout

    def test_what_cannot_fit_the_gpu_is_refused(
        self, folder: Path, gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before anything is allocated there; by what nvidia-smi says."""
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288, 2, 8.6'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(InsufficientMemoryError, match="not enough memory"):
            Owl2.load(folder, device="tensorrt")
        with pytest.raises(InsufficientMemoryError, match="not enough memory"):
            verify(folder, device="tensorrt")
        assert verify(folder, device="tensorrt", check_memory=False).passed

    @pytest.mark.parametrize("place", ["cpu", "tensorrt-rtx"])
    def test_graphs_are_run_by_onnx_runtime(self, float32: Bundle, monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
        monkeypatch.setattr("owl2.runtime.backends.ort.session.prepare", lambda place: None)
        manifest = replace(float32.manifest, dialect="ort")
        assert choose.choose_backend(Placement(place), float32.folder, manifest, threads=1).onnxruntime
        decoder = float32.manifest.model.decoder
        assert choose.fitting_context(OrtEngine(float32), decoder, None) == decoder.max_position_embeddings

    def test_the_other_dialect(self, bundle_a2: Path) -> None:
        with pytest.raises(ConfigError, match=r"device tensorrt runs engines .* dialect ort; .*--dialect onnx"):
            Owl2.load(bundle_a2, device="tensorrt")

    def test_int8_keys_and_values(self, float32: Bundle) -> None:
        with pytest.raises(ConfigError, match=r"kv_cache 'int8': this bundle offers fp32"):
            Owl2.load(float32.folder, device="tensorrt", kv_cache="int8")

    def test_threads(self, float32: Bundle) -> None:
        with pytest.raises(ConfigError, match="threads 2: device tensorrt has none to set"):
            Owl2.load(float32.folder, device="tensorrt", threads=2)


NOT_INSTALLED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onnxruntime":
            raise ImportError(f"{name} is blocked in this test", name=name)
sys.meta_path.insert(0, Blocker())
"""


class TestMissing:
    """Parts that this machine lacks, for real."""

    def test_the_package_of_cuda(self, float32: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
        with pytest.raises(BackendUnavailableError, match=r"cuda-python, which cannot be imported .*owl2\[tensorrt\]"):
            Owl2.load(float32.folder, device="tensorrt")

    def test_the_driver_and_onnx_runtime_which_engines_do_not_need(self, float32: Bundle) -> None:
        pytest.importorskip("cuda.bindings.runtime", reason="cuda-python has no wheel here")
        if not driver_problem(0):
            pytest.skip("there is a driver")
        script = NOT_INSTALLED + f"from owl2 import Owl2; Owl2.load({str(float32.folder)!r}, device='tensorrt')"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert re.search("BackendUnavailableError: engines cannot be run: .*libcuda.so.1", result.stderr), result.stderr

    @pytest.mark.parametrize(
        ("kind", "hint"), [("tensorrt", "--system-site-packages"), ("tensorrt-rtx", "pip install")]
    )
    def test_tensorrt(self, monkeypatch: pytest.MonkeyPatch, kind: Any, hint: str) -> None:
        module = tensorrt_context.MODULES[kind]
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(BackendUnavailableError, match=rf"module {module} cannot be imported.*{hint}"):
            tensorrt_context.import_tensorrt(kind)


class TestCuda:
    @pytest.mark.parametrize(
        ("driver", "built", "message"),
        [(12060, 12090, ""), (13000, 12090, ""), (12060, 13040, r"driver knows CUDA 12.6, .*CUDA 13.4; .*==12.*")],
    )
    def test_a_package_for_a_newer_driver(self, driver: int, built: int, message: str) -> None:
        runtime = SimpleNamespace(
            cudaError_t=SimpleNamespace(cudaSuccess=0),
            cudaDriverGetVersion=lambda: (0, driver),
            cudaRuntimeGetVersion=lambda: (0, built),
        )
        assert re.search(message, version_problem(runtime))
        assert bool(version_problem(runtime)) == bool(message)

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            (lambda device: device.name, "cudaGetDeviceProperties"),
            (lambda device: device.compute_capability, "cudaDeviceGetAttribute"),
            (lambda device: device.use(), "cudaSetDevice"),
            (lambda device: device.memory(), "cudaMemGetInfo"),
            (lambda device: device.allocate(256), "cudaMalloc"),
            (lambda device: device.free(256), "cudaFree"),
            (lambda device: device.create_stream(), "cudaStreamCreateWithFlags"),
            (lambda device: device.destroy_stream(1), "cudaStreamDestroy"),
            (lambda device: device.synchronize(1), "cudaStreamSynchronize"),
            (lambda device: device.upload(256, np.zeros(3), 1), "cudaMemcpyAsync"),
            (lambda device: device.download(np.zeros(3), 256, 1), "cudaMemcpyAsync"),
            (lambda device: device.copy(Strided(256, 512), Strided(1024, 512), 512, 3, 1), "cudaMemcpy2DAsync"),
            (lambda device: device.clear(256, 3, 1), "cudaMemsetAsync"),
            (lambda device: device.begin_capture(1), "cudaStreamBeginCapture"),
            (lambda device: device.end_capture(1), "cudaStreamEndCapture"),
            (lambda device: device.launch(1, 1), "cudaGraphLaunch"),
            (lambda device: device.destroy_graph(0), "cudaGraphExecDestroy"),
        ],
    )
    def test_the_real_package_takes_every_call(self, call: Callable[[CudaGpu], object], name: str) -> None:
        """It answers that there is no driver, and not that names or arguments are wrong."""
        runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python has no wheel here")
        if runtime.cudaDriverGetVersion()[1]:
            pytest.skip("these calls would reach a GPU with made-up addresses")
        with pytest.raises(BackendError, match=rf"^{name} failed: cudaErrorInsufficientDriver$"):
            call(CudaGpu(runtime, 0))

    def test_memory_that_is_not_there(self) -> None:
        codes = SimpleNamespace(
            cudaSuccess=0, cudaErrorMemoryAllocation=SimpleNamespace(name="cudaErrorMemoryAllocation")
        )

        def cudaMalloc(size: int) -> tuple[object, None]:
            return codes.cudaErrorMemoryAllocation, None

        def cudaMemGetInfo() -> tuple[int, int, int]:
            return 0, 50 << 20, 7000 << 20

        runtime = SimpleNamespace(cudaError_t=codes, cudaMalloc=cudaMalloc, cudaMemGetInfo=cudaMemGetInfo)
        with pytest.raises(BackendError, match=r"no room for 100 MiB: 50 of 7000 MiB are free; .*smaller context"):
            CudaGpu(runtime, 0).allocate(100 << 20)

    def test_arrays_in_pieces(self) -> None:
        with pytest.raises(BackendError, match="was to be copied as one block"):
            cuda_memory.host_address(np.zeros((4, 4))[:, :2])


class TestRealTensorRt:
    """What TensorRT for RTX says without a GPU, and that the fake's calls are TensorRT's."""

    @pytest.mark.parametrize("kind", ["IExecutionContext", "ICudaEngine", "Runtime", "IRuntimeConfig", "ILogger"])
    def test_the_fake_has_its_names_and_parameters(self, kind: str) -> None:
        real = getattr(pytest.importorskip("tensorrt_rtx", reason="there is no wheel here"), kind)
        ours = {name: value for name, value in vars(getattr(fake_tensorrt, kind)).items() if not name.startswith("_")}
        assert ours
        for name, value in ours.items():
            assert hasattr(real, name), name
            if inspect.isfunction(value):
                wanted = list(inspect.signature(value).parameters)
                offered = [re.findall(r"(\w+):", line) for line in signatures(getattr(real, name))]
                assert wanted in offered or kind == "ILogger", f"{name}{wanted}: {offered}"

    def test_enumerators(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx", reason="there is no wheel here")
        for name in ("DataType", "TensorLocation", "ExecutionContextAllocationStrategy", "CudaGraphStrategy"):
            for member in vars(getattr(fake_tensorrt, name)):
                assert hasattr(getattr(trt, name), member), f"{name}.{member}"
        assert tensorrt_context.makes_graphs(trt)
        assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")

    @pytest.mark.parametrize("kind", ["decoder", "vision"])
    def test_its_parser_sees_the_inputs_and_outputs_that_an_engine_must_have(self, bundle: Bundle, kind: str) -> None:
        trt = pytest.importorskip("tensorrt_rtx", reason="there is no wheel here")
        logger, model, types = trt.Logger(trt.Logger.ERROR), bundle.manifest.model, trt.DataType
        network = trt.Builder(logger).create_network(0)
        graph = bundle.folder / f"{kind}.onnx"
        assert trt.OnnxParser(network, logger).parse_from_file(str(graph))
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        by_name = {tensor.name: tensor for tensor in tensors}
        engine = SimpleNamespace(
            num_io_tensors=len(tensors),
            num_optimization_profiles=1,
            get_tensor_name=lambda index: tensors[index].name,
            get_tensor_shape=lambda name: by_name[name].shape,
            get_tensor_dtype=lambda name: by_name[name].dtype,
            get_tensor_location=lambda name: (
                trt.TensorLocation.HOST if by_name[name].is_shape_tensor else trt.TensorLocation.DEVICE
            ),
        )
        expected = {
            "decoder": tensorrt.decoder_tensors(model, types.HALF, types.FLOAT, types.INT64),
            "vision": tensorrt.vision_tensors(model, types.FLOAT),
        }[kind]
        tensorrt_context.check_engine(trt, engine, graph, expected, 1)
        with pytest.raises(BackendError, match="1 optimization profiles, 2 are needed"):
            tensorrt_context.check_engine(trt, engine, graph, expected, 2)
        missing = dict(list(expected.items())[1:])
        with pytest.raises(BackendError, match=r"does not fit the manifest: .* None is needed"):
            tensorrt_context.check_engine(trt, engine, graph, missing, 1)

    def test_reasons_come_with_the_error(self, tmp_path: Path) -> None:
        """Without a GPU, a runtime can be made, and refuses with reasons. In a process of its own, lest it crash."""
        pytest.importorskip("tensorrt_rtx", reason="there is no wheel here")
        (tmp_path / "decoder.engine").write_bytes(b"abc" * 1000)
        script = (
            "import pathlib, tensorrt_rtx as trt\n"
            "from owl2.runtime.backends.tensorrt.context import Messages, load_engine\n"
            "from owl2.runtime.errors import BackendError\n"
            "messages = Messages(); logger = messages.logger(trt)\n"
            "try:\n"
            f"    load_engine(trt.Runtime(logger), pathlib.Path({str(tmp_path / 'decoder.engine')!r}), messages)\n"
            "except BackendError as error:\n    print(error)\n"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.search(r"decoder\.engine cannot be loaded: .*magicTag", result.stdout)


def signatures(function: object) -> list[str]:
    """Of all overloads, from the documentation that TensorRT's functions carry."""
    text = inspect.getdoc(function) or ""
    return [
        re.sub("= <.*?>", "", line.split("->")[0])
        for line in text.splitlines()
        if re.match(r"(\d+\. )?\w+\(self", line)
    ]


class TestSmallParts:
    def test_decoding_sees_whole_blocks_of_rows(self) -> None:
        assert [decode_rows(past, 4096, 4096) for past in (0, 255, 256, 257, 4095)] == [256, 256, 512, 512, 4096]
        assert decode_rows(10, 40, 4096) == 40
        assert decode_rows(300, 512, 400) == 400

    @pytest.mark.parametrize("modality", [[1, 1, 1], [0, 0], [1, 0, 1]])
    @pytest.mark.parametrize("wanted", [[], [1, 0]])
    def test_stand_ins_change_no_row(self, modality: list[int], wanted: list[int]) -> None:
        kinds, rows = np.array(modality), np.array(wanted, np.int64)
        made, exact = routed(kinds, rows), row_inputs(kinds, rows)

        def order(inputs: dict[str, np.ndarray]) -> list[int]:
            both = np.concatenate([inputs[spec.TEXT_ROWS], inputs[spec.IMAGE_ROW_INDEX]])
            return both[inputs[spec.ROW_ORDER]].tolist()

        assert order(made) == order(exact) == list(range(len(modality)))
        assert len(made[spec.TEXT_ROWS]) > 0
        assert made[spec.LOGIT_ROWS].tolist() == (wanted or [0])

    def test_blocks_stay_within_the_engine(self, float32: Bundle) -> None:
        record = replace(read_record(float32.folder / "engines" / "tensorrt-sm87"), context=20, prefill=8)
        assert [block_end(record, 30, 4, past) for past in (4, 12, 15, 19)] == [12, 12, 9, 5]
        assert block_end(record, 6, 4, 4) == 6
        with pytest.raises(ConfigError, match="position 20 does not fit the engine's context of 20"):
            block_end(record, 30, 4, 20)
