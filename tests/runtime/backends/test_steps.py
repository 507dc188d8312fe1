"""Inputs of a decoder step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import open_decoder
from owl2.runtime.backends.ort.onnx_decoder import RowBuffers
from owl2.runtime.backends.ort.session import OrtOptions, open_session
from owl2.runtime.backends.steps import TEXT_STEP, attention_mask, cache_names, position_inputs, row_inputs
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import own
from owl2.runtime.rope import rotary_tables


def test_a_position_sees_what_is_cached_itself_and_what_is_before_it() -> None:
    mask = attention_mask(tokens=3, past=2, cached=4)
    expected = [[1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(mask == 0, np.array(expected, dtype=bool))
    assert set(np.unique(mask)) == {0.0, spec.MASKED}


def test_tables_are_those_of_the_new_positions(bundle_a1_onnx: Path) -> None:
    config = Bundle.open(bundle_a1_onnx).manifest.model.decoder
    made = position_inputs(config, 5, 3, 8, np.float16)
    cos, _ = rotary_tables(config, 8, config.head_dim, np.float16)
    assert made[spec.ROTARY_COS].dtype == np.float16
    np.testing.assert_array_equal(made[spec.ROTARY_COS], cos[5:8])


def test_the_inputs_of_a_text_step_are_constants() -> None:
    zero = np.zeros(1, np.int64)
    assert list(TEXT_STEP) == list(row_inputs(zero, zero))
    for name, array in row_inputs(zero, zero).items():
        np.testing.assert_array_equal(TEXT_STEP[name], array)
        assert not TEXT_STEP[name].flags.writeable


def test_more_cached_rows_than_positions_change_nothing(bundle_a2_onnx: Path) -> None:
    """A backend with fixed sizes relies on it."""
    bundle = Bundle.open(bundle_a2_onnx)
    graph, config = bundle.decoder_graph(), bundle.manifest.model.decoder
    decoder = open_decoder(graph, bundle.manifest, OrtOptions())
    embeds = np.random.default_rng(0).standard_normal((6, config.hidden_size), np.float32)
    buffers = own(decoder.allocate(16, None), RowBuffers)
    decoder.prefill(embeds[:5], np.zeros(5, np.int64), 0, buffers, np.array([4]))
    expected = decoder.decode(embeds[5:], 5, buffers)
    for rows in buffers.rows:
        rows[5:] = np.random.default_rng(1).standard_normal(rows[5:].shape)
    inputs = {spec.EMBEDS: embeds[None, 5:], **TEXT_STEP, **position_inputs(config, 5, 1, 16, np.float32)}
    cached = {read: rows for (read, _), rows in zip(cache_names(config), buffers.rows)}
    made = open_session(graph, OrtOptions()).run([spec.LOGITS], {**inputs, **cached})[0][0]
    np.testing.assert_allclose(made, expected, atol=1e-5)
