"""K/V buffers and inputs on a device: here the CPU plays the device, through the same calls of ONNX Runtime."""

import ctypes
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from owl2 import Owl2
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtBuffers, OrtDecoder, OrtEngine
from owl2.runtime.backends.ort.memory import Array, Memory, StepFeeds
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import Floats, Ints, own
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.generate import image_rows
from owl2.runtime.kv_cache import GROWTH, KvCache
from owl2.runtime.placement import Placement
from owl2.runtime.spec import KvType

HOST, DEVICE = Memory(None), Memory(("cpu", 0))
PROMPT = "USER: <|image|>What is it, and what does it mean? ASSISTANT: It is"
Rows = tuple[Floats, Ints]


def open_decoder(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, *, on_device: bool, kv_cache: KvType | None = None
) -> OrtDecoder:
    """A decoder that keeps its tensors in host memory, or as on a device."""
    monkeypatch.setattr(Memory, "of", lambda device: DEVICE if on_device else HOST)
    path, config = bundle.decoder_graph(kv_cache), bundle.manifest.model.decoder
    return OrtDecoder(path, config, OrtOptions(kv_cache=kv_cache))


@pytest.fixture
def on_device(bundle_a1: Path, monkeypatch: pytest.MonkeyPatch) -> OrtDecoder:
    return open_decoder(Bundle.open(bundle_a1), monkeypatch, on_device=True)


@pytest.fixture
def on_host(bundle_a1: Path, monkeypatch: pytest.MonkeyPatch) -> OrtDecoder:
    return open_decoder(Bundle.open(bundle_a1), monkeypatch, on_device=False)


@pytest.fixture(scope="module")
def rows(bundle_a1: Path, golden: Path) -> Rows:
    """Embeddings and modality of a prompt with an image."""
    model = Owl2.load(bundle_a1).model
    prompt = model.encode(PROMPT, model.prepare(golden / "images" / "00_rgb_landscape_97x61.png"))
    images, _ = image_rows(model, prompt, 0)
    return embed(prompt.keys, model.table, images)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts copies to the device by their bytes."""
    counted: Counter[int] = Counter()
    original = ort.OrtValue.update_inplace

    def counting(value: ort.OrtValue, array: Array) -> None:
        counted[array.nbytes] += 1
        original(value, array)

    monkeypatch.setattr(ort.OrtValue, "update_inplace", counting)
    return counted


def talk(decoder: OrtDecoder, embeds: Floats, modality: Ints) -> tuple[Floats, list[Array]]:
    """Logits and K/V of a prompt in two blocks, and then step by step, with a growing cache."""
    count = len(embeds)
    cut, first = count // 2, count - 4
    buffers = decoder.allocate(first, None)
    logits = [decoder.prefill(embeds[:cut], modality[:cut], 0, buffers, np.arange(cut))]
    logits.append(decoder.prefill(embeds[cut:first], modality[cut:first], cut, buffers, np.arange(first - cut)))
    buffers = decoder.allocate(count + 3, buffers)
    logits += [decoder.decode(embeds[i : i + 1], i, buffers)[None] for i in range(first, count)]
    return np.concatenate(logits), list(buffers.arrays)


def test_only_a_gpu_has_memory_of_its_own() -> None:
    assert Memory.of(Placement("cpu")) == Memory(None)
    assert Memory.of(Placement("cuda", 1)) == Memory.of(Placement("tensorrt-rtx", 1)) == Memory(("cuda", 1))


def test_a_conversation_is_the_same_to_the_bit(on_device: OrtDecoder, on_host: OrtDecoder, rows: Rows) -> None:
    logits, kept = talk(on_device, *rows)
    expected, expected_kept = talk(on_host, *rows)
    assert on_device.allocate(7, None).buffers[0].host is None
    assert on_host.allocate(7, None).buffers[0].host is not None
    np.testing.assert_array_equal(logits, expected)
    for one, other in zip(kept, expected_kept, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("memory", ["on_device", "on_host"])
def test_two_conversations_do_not_share_inputs(memory: str, rows: Rows, request: pytest.FixtureRequest) -> None:
    decoder: OrtDecoder = request.getfixturevalue(memory)
    embeds, modality = rows
    first, second = decoder.allocate(64, None), decoder.allocate(64, None)
    apart = decoder.allocate(64, None)
    text = embeds[modality == 0]
    alone = [decoder.decode(text[i : i + 1], i, apart) for i in range(3)]
    for i in range(3):
        np.testing.assert_array_equal(decoder.decode(text[i : i + 1], i, first), alone[i])
        decoder.decode(text[-i - 1 :][:1], i, second)


def test_a_decoded_step_copies_one_row_and_the_length(
    on_device: OrtDecoder, rows: Rows, copies: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds, modality = rows
    count = len(embeds)
    buffers = on_device.allocate(count + 8, None)
    on_device.prefill(embeds, modality, 0, buffers, np.array([count - 1]))
    on_device.decode(embeds[-1:], count, buffers)
    copies.clear()
    monkeypatch.setattr(Memory, "copy", lambda *_: pytest.fail("a step allocates"))
    for step in range(1, 6):
        on_device.decode(embeds[-1:], count + step, buffers)
    assert copies == {embeds[:1].nbytes: 5, 4: 5}


@pytest.mark.parametrize("memory", [HOST, DEVICE])
class TestFeeds:
    @pytest.fixture
    def feeds(self, on_host: OrtDecoder, bundle_a1: Path, memory: Memory) -> StepFeeds:
        return StepFeeds(ort.InferenceSession(bundle_a1 / "decoder.onnx").io_binding(), memory)

    @pytest.fixture
    def bound(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of inputs as they are bound."""
        seen: list[str] = []

        def recording(method: str) -> Callable[[ort.IOBinding, str, object], None]:
            original = getattr(ort.IOBinding, method)

            def bind(binding: ort.IOBinding, name: str, value: object) -> None:
                seen.append(name)
                original(binding, name, value)

            return bind

        for method in ("bind_cpu_input", "bind_ortvalue_input"):
            monkeypatch.setattr(ort.IOBinding, method, recording(method))
        return seen

    def test_an_array_that_may_change_is_read_each_time(self, feeds: StepFeeds, memory: Memory) -> None:
        array = np.zeros(3, np.int64)
        for value in range(3):
            array[:] = value
            feeds.put({spec.LOGIT_ROWS: array})
            if memory is DEVICE:
                np.testing.assert_array_equal(feeds.copies[spec.LOGIT_ROWS].numpy(), array)

    def test_constants_are_bound_once(
        self,
        memory: Memory,
        bound: list[str],
        bundle_a1: Path,
        rows: Rows,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        decoder = open_decoder(Bundle.open(bundle_a1), monkeypatch, on_device=memory is DEVICE)
        embeds, modality = rows
        tables, last = {spec.ROTARY_COS, spec.ROTARY_SIN}, np.array([len(embeds) - 1])
        buffers = decoder.allocate(len(embeds) + 8, None)
        assert tables <= set(bound)
        logits: list[Floats] = []
        for _ in range(2):
            bound.clear()
            decoder.prefill(embeds, modality, 0, buffers, last)
            logits.append(decoder.decode(embeds[-1:], len(embeds), buffers))
            assert not tables & set(bound)
            bound.clear()
            logits += [decoder.decode(embeds[-1:], len(embeds), buffers) for _ in range(3)]
            changing = [spec.TOTAL_LENGTH] if memory is DEVICE else [spec.EMBEDS, spec.LENGTHS, spec.TOTAL_LENGTH]
            assert bound == 3 * changing
        for again in logits[1:]:
            np.testing.assert_array_equal(again, logits[0])


def test_growing_keeps_the_content_and_shrinking_cuts_it() -> None:
    for memory in (HOST, DEVICE):
        old = memory.zeros((1, 2, 4, 3), np.float16)
        content = np.arange(24, dtype=np.float16).reshape(1, 2, 4, 3)
        old.value.update_inplace(content)
        longer, shorter = memory.grown(old, 6), memory.grown(old, 2)
        np.testing.assert_array_equal(longer.numpy()[:, :, :4], content)
        assert not longer.numpy()[:, :, 4:].any()
        np.testing.assert_array_equal(shorter.numpy(), content[:, :, :2])
        assert (longer.positions, longer.nbytes, longer.value.shape()) == (6, 72, [1, 2, 6, 3])
        assert longer.value.data_ptr() != old.value.data_ptr()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_a_new_buffer_is_full_of_zeros(dtype: type[np.generic]) -> None:
    for memory in (HOST, DEVICE):
        buffer = memory.zeros((1, 2, 5, 16), dtype)
        assert buffer.numpy().dtype == dtype
        content = (ctypes.c_char * buffer.nbytes).from_address(buffer.value.data_ptr()).raw
        assert content == bytes(2 * 5 * 16 * np.dtype(dtype).itemsize)


def test_the_cache_of_a_chat_grows_on_a_device(bundle_a1: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    monkeypatch.setattr(Memory, "of", lambda device: DEVICE)
    engine = OrtEngine(Bundle.open(bundle_a1))
    embeds, modality = rows
    cache = KvCache(engine, 2 * GROWTH)
    claim = cache.claim()
    first = own(claim.reserve(len(embeds)), OrtBuffers)
    engine.prefill(embeds, modality, 0, first, np.array([0]))
    claim.commit(range(len(embeds)))
    before = [array[:, :, : len(embeds)].copy() for array in first.arrays]
    grown = own(claim.reserve(GROWTH), OrtBuffers)
    assert (grown.capacity, cache.nbytes) == (2 * GROWTH, 2 * first.nbytes)
    for old, new in zip(before, grown.arrays, strict=True):
        np.testing.assert_array_equal(new[:, :, : len(embeds)], old)


def test_int8_k_v_on_a_device(bundle_a1: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    bundle = Bundle.open(bundle_a1)
    expected, codes = talk(open_decoder(bundle, monkeypatch, on_device=False, kv_cache="int8"), *rows)
    logits, same = talk(open_decoder(bundle, monkeypatch, on_device=True, kv_cache="int8"), *rows)
    np.testing.assert_array_equal(logits, expected)
    assert all((one == other).all() and one.dtype == np.int8 for one, other in zip(same, codes, strict=True))


@pytest.fixture(scope="module")
def fp16_bundle(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle as a GPU needs it: activations and K/V in float16."""
    folder = tmp_path_factory.mktemp("fp16") / "bundle"
    checkpoint = golden / "a1_base_bin" / "model"
    export_bundle(ExportConfig(checkpoint, folder, weights="int4", method="rtn", vision="fp16", activations="fp16"))
    return Bundle.open(folder)


def test_float16_on_a_device(fp16_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    expected, kept = talk(open_decoder(fp16_bundle, monkeypatch, on_device=False), *rows)
    decoder = open_decoder(fp16_bundle, monkeypatch, on_device=True)
    logits, same = talk(decoder, *rows)
    np.testing.assert_array_equal(logits, expected)
    assert logits.dtype == np.float32
    assert same[0].dtype == np.float16
    assert all((one == other).all() for one, other in zip(same, kept, strict=True))
    assert decoder.allocate(10, None).nbytes == 10 * fp16_bundle.manifest.kv_bytes("fp16")


def test_a_float16_step_copies_half_a_row(
    fp16_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, rows: Rows, copies: Counter[int]
) -> None:
    decoder, row = open_decoder(fp16_bundle, monkeypatch, on_device=True), rows[0][:1]
    buffers = decoder.allocate(4, None)
    decoder.decode(row, 0, buffers)
    copies.clear()
    decoder.decode(row, 1, buffers)
    assert copies == {row.nbytes // 2: 1, 4: 1}
