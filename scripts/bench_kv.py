"""How fast one text token is decoded after contexts of several lengths, with a float32 and an int8 K/V cache.

Random embeddings and cache contents, small ones, so that no probability is so near to zero that it slows arithmetic
down. Rounds are interleaved, so that both see the
same state of the machine; medians are printed. With --one-at-a-time only one decoder is in memory, for models that fit
once: the bundle is then loaded anew for every length and type, and the rounds lie further apart.
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

WARM_UP = 3

KINDS: tuple[KvType, ...] = ("fp32", "int8")


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


def contender(bundle: Bundle, kind: KvType, length: int, threads: int | None) -> Contender:
    """Load the decoder and fill a cache of ``length`` positions and one more."""
    config = bundle.manifest.model.decoder
    decoder = OrtDecoder(bundle.decoder_graph(kind), config, OrtOptions(threads=threads, kv_cache=kind))
    buffers = decoder.allocate(length + 1, None)
    rng = np.random.default_rng(0)
    for array in buffers.arrays:
        array[:] = rng.integers(-1, 2, array.shape[-2:]) if kind == "int8" else rng.normal(0, 0.01, array.shape[-2:])
    return Contender(decoder, buffers, rng.normal(size=(1, config.hidden_size)).astype(np.float32))


def rounds(bundle: Bundle, length: int, options: argparse.Namespace) -> Iterator[tuple[KvType, float]]:
    """Types with the seconds of one step each, in turn."""
    if options.one_at_a_time:
        for kind in (*KINDS, *reversed(KINDS)):
            one = contender(bundle, kind, length, options.threads)
            for number in range(WARM_UP + options.rounds // 2):
                seconds = one.step(length)
                if number >= WARM_UP:
                    yield kind, seconds
            del one
        return
    both = {kind: contender(bundle, kind, length, options.threads) for kind in KINDS}
    for number in range(WARM_UP + options.rounds):
        for kind, each in both.items():
            seconds = each.step(length)
            if number >= WARM_UP:
                yield kind, seconds


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
    most = bundle.manifest.model.decoder.max_position_embeddings - 1
    records = []
    for length in options.lengths or sorted({most // part for part in (64, 16, 8, 4, 2, 1)}):
        seconds: dict[KvType, list[float]] = {kind: [] for kind in KINDS}
        for kind, taken in rounds(bundle, length, options):
            seconds[kind].append(taken)
        medians = {kind: statistics.median(times) for kind, times in seconds.items()}
        records.append(
            {
                "positions": length,
                **{f"{kind}_ms": round(1000 * median, 3) for kind, median in medians.items()},
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
