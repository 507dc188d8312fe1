"""The native TensorRT backend on a GPU that does not exist: see ``fake_tensorrt``."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fake_engines import CONTEXT, FakeModel, Steps, read_record, with_engines
from fake_tensorrt import FakeGpu, IExecutionContext
from PIL import Image

from owl2 import BackendError, ConfigError, Owl2
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtEngine
from owl2.runtime.backends.tensorrt.engine import block_size
from owl2.runtime.backends.tensorrt.rows import DeviceRows
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import KvBuffers
from owl2.runtime.preprocess import AS_ORIGINAL


def converse(owl: Owl2, image: Image.Image) -> list[tuple[int, ...]]:
    chat = owl.chat()
    return [
        chat.ask("Describe the picture.", [image], max_new_tokens=24).ids,
        chat.ask("What colour is the largest shape?", max_new_tokens=24).ids,
    ]


class TestConversation:
    @pytest.mark.parametrize("captures_fail", [False, True])
    def test_is_that_of_onnx_runtime(self, bundle: Bundle, image: Image.Image, captures_fail: bool) -> None:
        fake = FakeModel(bundle, FakeGpu(captures_fail=captures_fail))
        expected = converse(Owl2.load(bundle.folder), image)
        assert converse(fake.owl, image) == expected
        assert sum(map(len, expected)) > 8
        assert (fake.gpu.launches > 4) != captures_fail

    def test_golden_logits(self, fake: FakeModel, golden: Path) -> None:
        case = golden / "a2_fp16_safetensors"
        prompts = {entry["id"]: entry["prompt"] for entry in json.loads((case / "prompts.json").read_text())}
        recorded = np.load(case / "forward.npz")
        for entry in json.loads((case / "forward_index.json").read_text()):
            images = [golden / "images" / name for name in entry["images"]]
            made = fake.owl.logits(prompts[entry["prompt_id"]], images=images, preprocess="resize", reading=AS_ORIGINAL)
            np.testing.assert_allclose(made, recorded[f"{entry['name']}/logits"], atol=1e-4, rtol=0)

    def test_the_host_never_sees_keys_and_values(
        self, bundle: Bundle, image: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake, kept = FakeModel(bundle), list[DeviceRows]()
        allocate = fake.engine.allocate

        def keep(capacity: int, previous: KvBuffers | None) -> DeviceRows:
            kept.append(allocate(capacity, previous))
            return kept[-1]

        monkeypatch.setattr(fake.engine, "allocate", keep)
        converse(fake.owl, image)
        assert kept
        assert not any(fake.host_copies_of(rows) for rows in kept)
        model = fake.owl.config.decoder
        down = [copy.nbytes for copy in fake.gpu.copies if copy.direction == "down"]
        rows = fake.owl.config.rows_per_image * model.hidden_size * 4
        assert set(down) == {model.vocab_size * 4, rows}, "logits of one row, and the rows of the image"
        step = next(i for i, copy in enumerate(fake.gpu.copies) if copy.direction == "within")
        up = [copy.nbytes for copy in fake.gpu.copies[step:] if copy.direction == "up"]
        assert max(up) <= 2 * CONTEXT * 512

    def test_two_chats_take_turns(self, bundle: Bundle) -> None:
        """Their buffers differ, so a graph of one must not serve the other."""
        fake, asked = FakeModel(bundle), "Name a colour."
        expected = fake.owl.chat().ask(asked, max_new_tokens=6).text
        streams = [fake.owl.chat().stream(asked, max_new_tokens=6) for _ in range(2)]
        texts = ["", ""]
        for chunks in zip(*streams):
            texts = [text + chunk.text for text, chunk in zip(texts, chunks)]
        assert texts == [expected, expected]

    def test_rtx_captures_graphs_itself(self, bundle: Bundle, tmp_path: Path, image: Image.Image) -> None:
        fake = FakeModel(with_engines(bundle.folder, tmp_path / "b", kind="tensorrt-rtx"), kind="tensorrt-rtx")
        assert converse(fake.owl, image) == converse(Owl2.load(bundle.folder), image)
        assert (fake.gpu.captures, fake.decoding.config.cuda_graph_strategy) == (0, "whole")

    def test_a_cancelled_answer_can_be_followed_by_another(self, bundle: Bundle) -> None:
        fake = FakeModel(bundle)
        fresh = fake.owl.chat().ask("Name a colour.", max_new_tokens=8).text
        chat = fake.owl.chat()
        next(chat.stream("Tell me of something else entirely.", max_new_tokens=8))
        assert chat.ask("Name a colour.", max_new_tokens=8).text == fresh

    def test_the_context_is_that_of_the_engine(self, float32: Bundle, tmp_path: Path) -> None:
        bundle = with_engines(float32.folder, tmp_path / "b", context=40, prefill=40)
        assert FakeModel(bundle).owl.context == 40
        assert FakeModel(bundle, context=30).owl.context == 30
        with pytest.raises(ConfigError, match="context 41 exceeds the 40 positions that the engine holds"):
            FakeModel(bundle, context=41)


class TestSteps:
    @pytest.mark.parametrize("prefill", [7, 16, 39])
    def test_prefill_in_blocks(self, float32: Bundle, tmp_path: Path, prefill: int) -> None:
        """Of which one of 7 has only image rows."""
        fake = FakeModel(with_engines(float32.folder, tmp_path / "b", prefill=prefill))
        assert fake.engine.block == prefill
        steps, rows = Steps(float32, 60), fake.engine.allocate(64, None)
        wanted = np.array([59, 0, 11, 11, 30])
        made = fake.engine.prefill(steps.embeds[:40], steps.modality[:40], 0, rows, np.array([39, 3]))
        np.testing.assert_allclose(made, steps.expected()[[39, 3]], atol=1e-4)
        made = fake.engine.prefill(steps.embeds, steps.modality, 0, rows, wanted)
        np.testing.assert_allclose(made, steps.expected()[wanted], atol=1e-4)
        assert max(shapes[spec.MODALITY][0] for shapes in fake.prefilling.enqueued) == prefill

    def test_blocks_stay_within_the_engine(self, float32: Bundle) -> None:
        record = replace(read_record(float32.folder / "engines" / "tensorrt-sm87"), context=20, prefill=8)
        assert [block_size(record, 26, past) for past in (4, 12, 15, 19)] == [8, 8, 5, 1]
        assert block_size(record, 2, 4) == 2
        with pytest.raises(ConfigError, match="position 20 does not fit the engine's context of 20"):
            block_size(record, 26, 20)

    def test_angles_of_a_stretched_model_are_those_of_the_whole_prompt(
        self, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        scaling = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}
        export_bundle(ExportConfig(make_checkpoint(top=scaling), tmp_path / "s", weights="fp32", dialect="onnx"))
        bundle = with_engines(tmp_path / "s", tmp_path / "b", prefill=9)
        fake, steps = FakeModel(bundle), Steps(bundle, 40)
        made = fake.engine.prefill(steps.embeds, steps.modality, 0, fake.engine.allocate(64, None), np.arange(40))
        np.testing.assert_allclose(made, steps.expected(), atol=1e-4)

    def test_the_whole_context_can_be_used(self, float32: Bundle, steps: Steps, tmp_path: Path) -> None:
        fake = FakeModel(with_engines(float32.folder, tmp_path / "b", context=40, prefill=40))
        rows = fake.engine.allocate(40, None)
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
        fake = FakeModel(with_engines(float32.folder, tmp_path / "b", images=2))
        size = float32.manifest.model.vision.image_size
        pixels = np.random.default_rng(0).standard_normal((5, 3, size, size), dtype=np.float32)
        np.testing.assert_allclose(
            fake.engine.encode_images(pixels), OrtEngine(float32).encode_images(pixels), atol=1e-4
        )
        assert [shapes[spec.PIXELS][0] for shapes in fake.vision.enqueued] == [2, 2, 1]

    def test_rows_of_other_backends_are_refused(self, fake: FakeModel, float32: Bundle) -> None:
        embeds = np.zeros((1, fake.owl.config.decoder.hidden_size), np.float32)
        foreign = OrtEngine(float32).allocate(4, None)
        with pytest.raises(BackendError, match="belong to another backend: RowBuffers"):
            fake.engine.decode(embeds, 0, foreign)
        with pytest.raises(BackendError, match="belong to another backend: RowBuffers"):
            fake.engine.allocate(8, foreign)

    @pytest.mark.parametrize("failing", ["prefill", "decode"])
    def test_a_failure_leaves_what_was_cached(self, float32: Bundle, steps: Steps, failing: str) -> None:
        """Decoding without graphs: one that was captured does not ask the context again."""
        fake, expected = FakeModel(float32, FakeGpu(captures_fail=True)), steps.expected()
        engine, rows = fake.engine, fake.engine.allocate(64, None)
        engine.prefill(steps.embeds[:35], steps.modality[:35], 0, rows, np.array([34]))
        made = [engine.decode(steps.embeds[i : i + 1], i, rows) for i in (35, 36)]
        context: IExecutionContext = fake.prefilling if failing == "prefill" else fake.decoding
        context.failures = 1

        def step() -> None:
            if failing == "prefill":
                engine.prefill(steps.embeds[:3], steps.modality[:3], 37, rows, np.array([0]))
            else:
                engine.decode(steps.embeds[:1], 37, rows)

        with pytest.raises(BackendError, match=r"the decoder failed: Cuda Runtime \(an illegal memory access"):
            step()
        made += [engine.decode(steps.embeds[i : i + 1], i, rows) for i in range(37, 40)]
        np.testing.assert_allclose(np.stack(made), expected[35:], atol=1e-4)


class TestMemory:
    def test_everything_is_given_back(self, fake: FakeModel) -> None:
        engine, embeds = fake.engine, np.zeros((1, fake.owl.config.decoder.hidden_size), np.float32)
        rows = engine.allocate(300, None)
        grown = engine.allocate(600, rows)
        assert grown.nbytes == 2 * rows.nbytes
        del rows
        gc.collect()
        assert fake.gpu.allocated >= grown.nbytes
        for i in range(3):
            engine.decode(embeds, i, grown)
        assert fake.gpu.graphs
        engine.close()
        assert set(fake.gpu.allocations) == {grown.address}
        assert not {**fake.gpu.graphs, **fake.gpu.streams}
        engine.close()
        with pytest.raises(BackendError, match=r"^this model was closed; load the bundle again$"):
            engine.decode(embeds, 0, grown)
        del grown
        gc.collect()
        assert not fake.gpu.allocations

    def test_a_closed_model_holds_nothing_and_says_so(self, bundle: Bundle, image: Image.Image) -> None:
        fake = FakeModel(bundle)
        chat = fake.owl.chat()
        chat.ask("Describe the picture.", [image], max_new_tokens=4)
        fake.owl.close()
        assert not {**fake.gpu.allocations, **fake.gpu.graphs, **fake.gpu.streams}
        for call in (
            lambda: chat.ask("And then?"),
            lambda: fake.owl.chat().ask("Describe the picture.", [image]),
            lambda: fake.owl.logits("Hi"),
        ):
            with pytest.raises(BackendError, match=r"^this model was closed; load the bundle again$"):
                call()

    def test_without_being_asked(self, float32: Bundle) -> None:
        gpu = FakeGpu()
        owl = FakeModel(float32, gpu).owl
        assert owl.generate("Hello", max_new_tokens=4).ids
        del owl
        gc.collect()
        assert not {**gpu.allocations, **gpu.graphs, **gpu.streams}

    def test_at_the_end_of_the_process(self, float32: Bundle) -> None:
        """Whatever is still alive then."""
        script = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            "import atexit, pathlib\n"
            "from fake_engines import *\n"
            "gpu = FakeGpu()\n"
            "atexit.register(lambda: print('left', len(gpu.allocations), len(gpu.streams)))\n"
            f"fake = FakeModel(Bundle.open(pathlib.Path({str(float32.folder)!r})), gpu)\n"
            "rows = fake.engine.allocate(8, None)\n"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert (result.returncode, result.stdout, result.stderr) == (0, "left 0 0\n", "")

    def test_a_failed_load_leaves_nothing(self, float32: Bundle) -> None:
        gpu = FakeGpu(limit=6000)
        with pytest.raises(BackendError, match="no room"):
            FakeModel(float32, gpu)
        gc.collect()
        assert not {**gpu.allocations, **gpu.streams}

    def test_contexts_share_scratch_memory(self, fake: FakeModel) -> None:
        assert {context.memory for context in fake.trt.contexts} == {fake.decoding.memory}
        assert fake.decoding.memory[1] == 5120

    def test_no_room_for_a_longer_conversation(self, fake: FakeModel) -> None:
        rows = fake.engine.allocate(8, None)
        fake.gpu.limit = fake.gpu.allocated + rows.nbytes
        with pytest.raises(BackendError, match="no room"):
            fake.engine.allocate(16, rows)
        gc.collect()
        assert rows.address in fake.gpu.allocations
