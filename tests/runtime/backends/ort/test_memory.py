"""K/V buffers and inputs on a device: here the CPU plays the device, behind the same calls of ONNX Runtime."""

import ctypes
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from owl2 import Owl2
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime import spec
from owl2.runtime.backends.ort import engine as backend
from owl2.runtime.backends.ort.engine import OrtEngine, OrtOptions
from owl2.runtime.backends.ort.memory import DeviceMemory, HostMemory, memory_of
from owl2.runtime.bundle import Bundle
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.kv_cache import GROWTH, KvCache
from owl2.runtime.placement import Placement

DEVICE = DeviceMemory("cpu", 0)
PROMPT = "USER: <|image|>What is it, and what does it mean? ASSISTANT: It is"


@pytest.fixture
def on_device(bundle_a1: Path, monkeypatch: pytest.MonkeyPatch) -> OrtEngine:
    """An engine that keeps its tensors as on a device."""
    monkeypatch.setattr(backend, "memory_of", lambda device: DEVICE)
    return OrtEngine(Bundle.open(bundle_a1))


@pytest.fixture
def on_host(bundle_a1: Path) -> OrtEngine:
    return OrtEngine(Bundle.open(bundle_a1))


@pytest.fixture
def rows(bundle_a1: Path, golden: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and modality of a prompt with an image."""
    owl = Owl2.load(bundle_a1)
    prompt = owl._prompt(PROMPT, owl._prepare([golden / "images" / "00_rgb_landscape_97x61.png"], None))
    images, _ = owl._model.encoder.rows(list(prompt.images.values()))
    return embed(prompt.keys, owl._model.table, images)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts copies to the device by their bytes."""
    counted: Counter[int] = Counter()
    original = ort.OrtValue.update_inplace

    def counting(value: ort.OrtValue, array: np.ndarray) -> None:
        counted[array.nbytes] += 1
        original(value, array)

    monkeypatch.setattr(ort.OrtValue, "update_inplace", counting)
    return counted


def talk(engine: OrtEngine, embeds: np.ndarray, modality: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and K/V of a prompt in two blocks, and then step by step, with a growing cache."""
    count = len(embeds)
    cut, first = count // 2, count - 4
    buffers = engine.allocate(first, None)
    logits = [engine.prefill(embeds[:cut], modality[:cut], 0, buffers, np.arange(cut))]
    logits.append(engine.prefill(embeds[cut:first], modality[cut:first], cut, buffers, np.arange(first - cut)))
    buffers = engine.allocate(count + 3, buffers)
    logits += [engine.decode(embeds[i : i + 1], i, buffers)[None] for i in range(first, count)]
    return np.concatenate(logits), buffers.arrays


def test_only_a_gpu_has_memory_of_its_own() -> None:
    assert isinstance(memory_of(Placement("cpu")), HostMemory)
    assert memory_of(Placement("cuda", 1)) == memory_of(Placement("tensorrt-rtx", 1)) == DeviceMemory("cuda", 1)


def test_a_conversation_is_the_same_to_the_bit(
    on_device: OrtEngine, on_host: OrtEngine, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    logits, kept = talk(on_device, *rows)
    expected, expected_kept = talk(on_host, *rows)
    assert on_device.allocate(7, None).buffers[0].host is None
    np.testing.assert_array_equal(logits, expected)
    for one, other in zip(kept, expected_kept, strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_conversations_do_not_share_inputs(on_device: OrtEngine, rows: tuple[np.ndarray, np.ndarray]) -> None:
    embeds, modality = rows
    first, second = on_device.allocate(64, None), on_device.allocate(64, None)
    apart = on_device.allocate(64, None)
    text = embeds[modality == 0]
    alone = [on_device.decode(text[i : i + 1], i, apart) for i in range(3)]
    for i in range(3):
        np.testing.assert_array_equal(on_device.decode(text[i : i + 1], i, first), alone[i])
        on_device.decode(text[-i - 1 :][:1], i, second)


def test_a_decoded_step_copies_one_row_and_the_length(
    on_device: OrtEngine, rows: tuple[np.ndarray, np.ndarray], copies: Counter[int]
) -> None:
    embeds, modality = rows
    count = len(embeds)
    buffers = on_device.allocate(count + 8, None)
    on_device.prefill(embeds, modality, 0, buffers, np.array([count - 1]))
    on_device.decode(embeds[-1:], count, buffers)
    address = buffers.feeds._values[spec.EMBEDS].data_ptr()
    copies.clear()
    for step in range(1, 6):
        on_device.decode(embeds[-1:], count + step, buffers)
    assert copies == {embeds[:1].nbytes: 5, 4: 5}
    assert buffers.feeds._values[spec.EMBEDS].data_ptr() == address


def test_an_array_that_may_change_is_copied_each_time(on_device: OrtEngine) -> None:
    feeds = DEVICE.feeds(on_device._decoder._session.io_binding(), frozenset())
    array = np.zeros(3, np.int64)
    for value in range(3):
        array[:] = value
        feeds.put(spec.LOGIT_ROWS, array)
        np.testing.assert_array_equal(feeds._values[spec.LOGIT_ROWS].numpy(), array)


def test_growing_keeps_the_content_and_shrinking_cuts_it() -> None:
    for memory in (HostMemory(), DEVICE):
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
    for memory in (HostMemory(), DEVICE):
        buffer = memory.zeros((1, 2, 5, 16), dtype)
        assert buffer.numpy().dtype == dtype
        content = (ctypes.c_char * buffer.nbytes).from_address(buffer.value.data_ptr()).raw
        assert content == bytes(2 * 5 * 16 * np.dtype(dtype).itemsize)


def test_the_cache_of_a_chat_grows_on_a_device(on_device: OrtEngine, rows: tuple[np.ndarray, np.ndarray]) -> None:
    embeds, modality = rows
    cache = KvCache(on_device, 2 * GROWTH)
    first = cache.reserve(len(embeds))
    on_device.prefill(embeds, modality, 0, first, np.array([0]))
    cache.commit(range(len(embeds)))
    before = [array[:, :, : len(embeds)].copy() for array in first.arrays]
    grown = cache.reserve(GROWTH)
    assert (grown.capacity, cache.nbytes) == (2 * GROWTH, 2 * first.nbytes)
    for old, new in zip(before, grown.arrays, strict=True):
        np.testing.assert_array_equal(new[:, :, : len(embeds)], old)


def test_int8_k_v_on_a_device(bundle_a1: Path, monkeypatch: pytest.MonkeyPatch, rows: tuple) -> None:
    options = OrtOptions(kv_cache="int8")
    expected, codes = talk(OrtEngine(Bundle.open(bundle_a1), options), *rows)
    monkeypatch.setattr(backend, "memory_of", lambda device: DEVICE)
    logits, same = talk(OrtEngine(Bundle.open(bundle_a1), options), *rows)
    np.testing.assert_array_equal(logits, expected)
    assert all((one == other).all() and one.dtype == np.int8 for one, other in zip(same, codes, strict=True))


@pytest.fixture(scope="module")
def fp16_bundle(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What a GPU is given: activations and K/V in float16."""
    folder = tmp_path_factory.mktemp("fp16") / "bundle"
    checkpoint = golden / "a1_base_bin" / "model"
    export_bundle(ExportConfig(checkpoint, folder, weights="int4", method="rtn", vision="fp16", activations="fp16"))
    return Bundle.open(folder)


def test_float16_on_a_device(
    fp16_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    expected, kept = talk(OrtEngine(fp16_bundle), *rows)
    monkeypatch.setattr(backend, "memory_of", lambda device: DEVICE)
    engine = OrtEngine(fp16_bundle)
    logits, same = talk(engine, *rows)
    np.testing.assert_array_equal(logits, expected)
    assert (logits.dtype, same[0].dtype) == (np.float32, np.float16)
    assert all((one == other).all() for one, other in zip(same, kept, strict=True))
    assert engine.allocate(10, None).nbytes == 10 * fp16_bundle.manifest.kv_bytes("fp16")


def test_a_float16_step_copies_half_a_row(
    fp16_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, rows: tuple[np.ndarray, np.ndarray], copies: Counter[int]
) -> None:
    monkeypatch.setattr(backend, "memory_of", lambda device: DEVICE)
    engine, row = OrtEngine(fp16_bundle), rows[0][:1]
    buffers = engine.allocate(4, None)
    engine.decode(row, 0, buffers)
    copies.clear()
    engine.decode(row, 1, buffers)
    assert copies == {row.nbytes // 2: 1, 4: 1}
