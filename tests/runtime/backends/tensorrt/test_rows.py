"""Steps that were undone spoil no later step: what they wrote is cleared before it is read."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engines import FakeModel, Steps

from owl2 import BackendError
from owl2.runtime.backends.ort.engine import OrtEngine
from owl2.runtime.bundle import Bundle


@pytest.mark.parametrize("undone", ["prefill", "decode", "failed"])
def test_an_overflowing_step_that_was_undone_spoils_nothing(fake: FakeModel, steps: Steps, undone: str) -> None:
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


def test_nor_does_one_from_the_beginning(float32: Bundle, fake: FakeModel, steps: Steps) -> None:
    for engine in (fake.engine, OrtEngine(float32)):
        rows, every = engine.allocate(64, None), np.arange(40)
        engine.prefill(np.full_like(steps.embeds, np.inf), steps.modality, 0, rows, every)
        made = engine.prefill(steps.embeds, steps.modality, 0, rows, every)
        np.testing.assert_allclose(made, steps.expected(), atol=1e-4)


def test_only_what_was_undone_is_cleared(fake: FakeModel, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, embeds, modality = fake.engine, steps.embeds, steps.modality
    rows, cleared = engine.allocate(64, None), list[tuple[int, int]]()
    clear = fake.gpu.clear

    def record(address: int, nbytes: int, stream: int) -> None:
        cleared.append((address, nbytes))
        clear(address, nbytes, stream)

    monkeypatch.setattr(fake.gpu, "clear", record)
    engine.prefill(embeds[:30], modality[:30], 0, rows, np.array([0]))
    for i in range(30, 36):
        engine.decode(embeds[i : i + 1], i, rows)
    assert not cleared
    for _ in range(2):
        engine.prefill(embeds[:4], modality[:4], 31, rows, np.array([0]))
        assert cleared == [(rows.at(index, 31), 5 * rows.row) for index in range(rows.count)]
        cleared.clear()
        engine.decode(embeds[:1], 35, rows)
