"""A closed engine gives its sessions back, whoever still holds K/V buffers, and says so from then on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from owl2 import BackendError, Owl2
from owl2.runtime.backends.ort.engine import OrtDecoder, OrtEngine
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import Floats

CLOSED = "^this model was closed; load the bundle again$"


@pytest.fixture(params=["bundle_a1", "bundle_a1_onnx"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.getfixturevalue(request.param))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the sessions of ONNX Runtime that are alive: its own, which bindings hold too."""
    opened: list[weakref.ref[object]] = []
    original = ort.InferenceSession.__init__

    def init(session: ort.InferenceSession, *arguments: object, **options: object) -> None:
        original(session, *arguments, **options)
        opened.append(weakref.ref(session._sess))

    monkeypatch.setattr(ort.InferenceSession, "__init__", init)
    return lambda: sum(session() is not None for session in opened)


def test_every_call_after_close_is_refused(bundle: Bundle, sessions: Callable[[], int]) -> None:
    engine = OrtEngine(bundle)
    model, row = bundle.manifest.model, np.zeros((1, bundle.manifest.model.decoder.hidden_size), np.float32)
    zero, pixels = np.zeros(1, np.int64), np.zeros((1, 3, *2 * [model.vision.image_size]), np.float32)
    buffers = engine.allocate(4, None)
    engine.decode(row, 0, buffers)
    assert sessions() == 2
    engine.close()
    assert sessions() == 0, "though the buffers are still held"
    engine.close()
    for call in (
        lambda: engine.decode(row, 1, buffers),
        lambda: engine.prefill(row, zero, 1, buffers, zero),
        lambda: engine.allocate(8, buffers),
        lambda: engine.encode_images(pixels),
    ):
        with pytest.raises(BackendError, match=CLOSED):
            call()


def test_a_closed_model_holds_nothing_and_says_so(
    bundle: Bundle, golden: Path, sessions: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = golden / "images" / "00_rgb_landscape_97x61.png"
    with Owl2.load(bundle.folder) as owl:
        chat, unfinished = owl.chat(), owl.stream("Hello", max_new_tokens=9)
        chat.ask("What is it?", [image], max_new_tokens=4)
        next(unfinished)
    assert sessions() == 0
    for call in (
        lambda: chat.ask("And then?"),
        lambda: next(unfinished),
        lambda: owl.chat().ask("What is it?", [image]),
        lambda: owl.logits("Hi"),
    ):
        with pytest.raises(BackendError, match=CLOSED):
            call()


def test_a_step_that_is_running_ends(
    bundle: Bundle, sessions: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OrtEngine(bundle)
    row, buffers = np.zeros((1, bundle.manifest.model.decoder.hidden_size), np.float32), engine.allocate(4, None)
    expected = engine.decode(row, 0, buffers)
    running, closed, made = threading.Event(), threading.Event(), list[Floats]()
    original = ort.InferenceSession.run_with_iobinding

    def run(session: ort.InferenceSession, *arguments: object) -> None:
        running.set()
        assert closed.wait(10)
        original(session, *arguments)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)
    thread = threading.Thread(target=lambda: made.append(engine.decode(row, 0, buffers)))
    thread.start()
    assert running.wait(10)
    engine.close()
    closed.set()
    thread.join()
    np.testing.assert_array_equal(made, [expected])
    assert sessions() == 0


def test_buffers_of_another_engine_are_refused(bundle_a1: Path, bundle_a1_onnx: Path) -> None:
    bundle, other = Bundle.open(bundle_a1), Bundle.open(bundle_a1_onnx)
    config = bundle.manifest.model.decoder
    row, decoder = (
        np.zeros((1, config.hidden_size), np.float32),
        OrtDecoder(bundle.decoder_graph(), config, OrtOptions()),
    )
    with pytest.raises(BackendError, match="belong to another backend: RowBuffers"):
        decoder.decode(row, 0, OrtEngine(other).allocate(4, None))
    with pytest.raises(BackendError, match="belong to another model"):
        decoder.decode(row, 0, OrtEngine(bundle).allocate(4, None))
    with pytest.raises(BackendError, match="belong to another backend: OrtBuffers"):
        OrtEngine(other).decode(row, 0, decoder.allocate(4, None))
