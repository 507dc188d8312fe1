"""Decoding steps: how many rows they read, and the CUDA graphs that repeat them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from fake_engines import FakeModel, Steps
from fake_tensorrt import ILogger

from owl2 import BackendError
from owl2.runtime import spec
from owl2.runtime.backends.tensorrt.decoding import cached_rows
from owl2.runtime.bundle import Bundle
from owl2.runtime.kv_cache import KvCache


def test_decoding_reads_whole_blocks_of_rows() -> None:
    assert [cached_rows(past, 4096, 4096) for past in (0, 255, 256, 257, 4095)] == [256, 256, 512, 512, 4096]
    assert cached_rows(10, 40, 4096) == 40
    assert cached_rows(300, 512, 400) == 400


def test_more_than_256_positions(float32: Bundle, fake: FakeModel) -> None:
    steps = Steps(float32, 530)
    expected = steps.expected()
    claim, made = KvCache(fake.engine, 600).claim(), []
    embeds, modality = steps.embeds, steps.modality
    made.append(fake.engine.prefill(embeds[:250], modality[:250], 0, claim.reserve(250), np.arange(250)))
    claim.commit(range(250))
    for i in range(250, 530):
        made.append(fake.engine.decode(embeds[i : i + 1], i, claim.reserve(1))[None])
        claim.commit([i])
    np.testing.assert_allclose(np.concatenate(made), expected, atol=1e-4)
    # Up to 256 positions, up to 512, to the end of the buffers; the first step of each runs by itself.
    seen = {shapes[spec.past_names(0)[0]][0] for shapes in fake.decoding.enqueued}
    assert seen == {256, 512, 600}
    assert fake.gpu.captures == 3
    assert fake.gpu.launches == 280 - 3
    assert len(fake.gpu.graphs) == 1
    row, sizes = claim.cache.nbytes // 600, [array.nbytes for array in fake.gpu.allocations.values()]
    assert [sizes.count(capacity * row) for capacity in (256, 512, 600)] == [0, 0, 1], "earlier ones are given back"


def test_a_capture_that_fails(fake: FakeModel, steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    fake.gpu.captures_fail = True
    rows, expected = fake.engine.allocate(64, None), steps.expected()
    fake.engine.prefill(steps.embeds[:30], steps.modality[:30], 0, rows, np.array([0]))
    with caplog.at_level(logging.WARNING):
        made = [fake.engine.decode(steps.embeds[i : i + 1], i, rows) for i in range(30, 40)]
    np.testing.assert_allclose(np.stack(made), expected[30:], atol=1e-4)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without CUDA graphs: cudaStreamEndCapture failed: cudaErrorStreamCaptureInvalidated"
    ]
    assert not fake.gpu.recording


def test_a_capture_that_tensorrt_refuses(fake: FakeModel, steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    rows, expected = fake.engine.allocate(64, None), steps.expected()
    fake.engine.prefill(steps.embeds[:30], steps.modality[:30], 0, rows, np.array([0]))
    made = [fake.engine.decode(steps.embeds[30:31], 30, rows)]
    fake.decoding.failures = 1
    made += [fake.engine.decode(steps.embeds[i : i + 1], i, rows) for i in range(31, 40)]
    np.testing.assert_allclose(np.stack(made), expected[30:], atol=1e-4)
    assert "without CUDA graphs: capturing the decoder failed: Cuda Runtime" in caplog.text
    assert not fake.gpu.recording
    assert not fake.gpu.graphs


def test_a_full_gpu_leaves_other_conversations_and_their_graph(float32: Bundle, fake: FakeModel) -> None:
    steps = Steps(float32, 301)
    engine, embeds = fake.engine, steps.embeds
    short, long = engine.allocate(256, None), engine.allocate(640, None)
    for rows, count in ((short, 20), (long, 300)):
        engine.prefill(embeds[:count], steps.modality[:count], 0, rows, np.array([count - 1]))
    expected = [engine.decode(embeds[20:21], 20, short) for _ in range(2)][-1]
    assert fake.gpu.graphs
    fake.gpu.limit = fake.gpu.allocated
    # Its mask is longer than those before.
    np.testing.assert_allclose(engine.decode(embeds[300:], 300, long), steps.expected()[300], atol=1e-4)
    for _ in range(3):
        np.testing.assert_array_equal(engine.decode(embeds[20:21], 20, short), expected)


def test_old_messages_are_not_the_reason(fake: FakeModel) -> None:
    rows, logger = fake.engine.allocate(8, None), fake.decoding.engine.logger
    embeds = np.zeros((1, fake.owl.config.decoder.hidden_size), np.float32)
    logger.log(ILogger.ERROR, "something of long ago")
    fake.decoding.failures = 1
    with pytest.raises(BackendError, match=r"^the decoder failed: Cuda Runtime \(an illegal memory access"):
        fake.engine.decode(embeds, 0, rows)
    logger.log(ILogger.ERROR, "something of long ago")
    with pytest.raises(BackendError, match=r"refuses the shape \[1, 3, 1, 1\] of pixel_values: pixel_values: "):
        fake.engine.encode_images(np.zeros((1, 3, 1, 1), np.float32))
