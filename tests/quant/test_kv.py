"""Scales of an int8 K/V cache: they follow the channels, and hold at every position."""

import numpy as np
import pytest
import torch

from owl2.quant.kv import HEADROOM, KvRange, KvScales
from owl2.quant.models.mplug_owl2 import rotary_tables
from owl2.quant.models.mplug_owl2.decoder import rotate
from owl2.runtime.config import DecoderConfig


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
