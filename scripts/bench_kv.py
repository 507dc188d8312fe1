"""Time of decoding one text token after contexts of several lengths, with a float32 and an int8 K/V cache.

Embeddings and cache contents are random, and small so that no probability is so close to zero that arithmetic becomes
slower. Rounds are interleaved, so that both decoders meet the same state of the machine; medians are printed. With
--one-at-a-time only one decoder is in memory, for models that fit once: the bundle is then loaded anew for every length
and type, and its rounds are further apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from owl2.runtime.backends.ort.engine import OrtBuffers, OrtDecoder
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.spec import KvType

WARM_UP_ROUNDS = 3

KV_TYPES: tuple[KvType, ...] = ("fp32", "int8")


@dataclass
class Contender:
    """A decoder with a full cache."""

    decoder: OrtDecoder
    buffers: OrtBuffers
    row: np.ndarray

    def step(self, past: int) -> float:
        """Seconds of one decoded token."""
        began = time.perf_counter()
        self.decoder.decode(self.row, past, self.buffers)
        return time.perf_counter() - began


def contender(bundle: Bundle, kv_type: KvType, length: int, threads: int | None) -> Contender:
    """Load the decoder and fill a cache of ``length`` positions and one more."""
    config = bundle.manifest.model.decoder
    decoder = OrtDecoder(bundle.decoder_graph(kv_type), config, OrtOptions(threads=threads, kv_cache=kv_type))
    buffers = decoder.allocate(length + 1, None)
    rng = np.random.default_rng(0)
    for array in buffers.arrays:
        shape = array.shape[-2:]
        array[:] = rng.integers(-1, 2, shape) if kv_type == "int8" else rng.normal(0, 0.01, shape)
    return Contender(decoder, buffers, rng.normal(size=(1, config.hidden_size)).astype(np.float32))


def rounds(bundle: Bundle, length: int, options: argparse.Namespace) -> Iterator[tuple[KvType, float]]:
    """Types with the seconds of one step each, in turn."""
    if options.one_at_a_time:
        for kv_type in (*KV_TYPES, *reversed(KV_TYPES)):
            single = contender(bundle, kv_type, length, options.threads)
            for number in range(WARM_UP_ROUNDS + options.rounds // 2):
                seconds = single.step(length)
                if number >= WARM_UP_ROUNDS:
                    yield kv_type, seconds
            del single
        return
    both = {kv_type: contender(bundle, kv_type, length, options.threads) for kv_type in KV_TYPES}
    for number in range(WARM_UP_ROUNDS + options.rounds):
        for kv_type, decoder in both.items():
            seconds = decoder.step(length)
            if number >= WARM_UP_ROUNDS:
                yield kv_type, seconds


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", help="positions before the token (default: a few up to all)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    longest = bundle.manifest.model.decoder.max_position_embeddings - 1
    records = []
    for length in options.lengths or sorted({longest // part for part in (64, 16, 8, 4, 2, 1)}):
        seconds: dict[KvType, list[float]] = {kv_type: [] for kv_type in KV_TYPES}
        for kv_type, taken in rounds(bundle, length, options):
            seconds[kv_type].append(taken)
        medians = {kv_type: statistics.median(times) for kv_type, times in seconds.items()}
        records.append(
            {
                "positions": length,
                **{f"{kv_type}_ms": round(1000 * median, 3) for kv_type, median in medians.items()},
                "int8_over_fp32": round(medians["int8"] / medians["fp32"], 3),
            }
        )
        if not options.json:
            print(
                "{positions:6} positions: fp32 {fp32_ms} ms, int8 {int8_ms} ms, int8 / fp32 {int8_over_fp32}".format(
                    **records[-1]
                ),
                flush=True,
            )
    if options.json:
        print(json.dumps(records, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
