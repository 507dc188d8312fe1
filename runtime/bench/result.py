"""What a benchmark found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing, in seconds.

    Attributes:
        median: of all.
        low, high: the quartiles.
        count: of measurements.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of at least one measurement."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True, slots=True)
class Roof:
    """What the machine can do at most, with the same threads.

    Attributes:
        bandwidth: bytes read of memory, per second.
        int8: multiply-adds of int8, per second.
        fp32: multiply-adds of float32, per second.
    """

    bandwidth: float
    int8: float
    fp32: float

    @classmethod
    def best(cls, roofs: Sequence[Roof]) -> Roof | None:
        """The highest of each, None of none."""
        if not roofs:
            return None
        return cls(*(max(getattr(roof, field.name) for roof in roofs) for field in fields(cls)))


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process, bytes.

    Attributes:
        private: its own.
        mapped: pages of files that it uses, weights above all; other processes that use them share them.
        kv_cache: of the private, keys and values.
    """

    private: int
    mapped: int
    kv_cache: int


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Decoding with so many positions before.

    Attributes:
        context: those positions.
        step: a token.
        bytes_read: weights, keys and values that a token reads.
        memory: with so many positions cached.
    """

    context: int
    step: Spread
    bytes_read: int
    memory: Memory | None


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """Running a prompt of text.

    Attributes:
        tokens: of the prompt.
        whole: all of them.
        multiply_adds: of the decoder's matrices.
    """

    tokens: int
    whole: Spread
    multiply_adds: int


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Speed and memory of a bundle; every time has its warm-up excluded, but for loads.

    Attributes:
        bundle: folder.
        backend, kernels: what ran it, and with which instructions; kernels only of the native core.
        threads: as asked for; None for the backend's own number.
        kv_cache: type of keys and values.
        weights: type of the decoder's.
        load: to a loaded model, in a new process each, with the files in the page cache and verified before.
        load_to_first_token: the same, and to the first token of a prompt of 20.
        vision: an image.
        first_question: to the first token of an image and a question of 20 tokens.
        second_question: to the first token of 20 more, in the same conversation.
        prefill, decode: by length.
        roof: of the machine; None without the native core.
    """

    bundle: str
    backend: str
    kernels: str | None
    threads: int | None
    kv_cache: str
    weights: str
    load: Spread
    load_to_first_token: Spread
    vision: Spread
    first_question: Spread
    second_question: Spread
    prefill: tuple[PrefillSpeed, ...]
    decode: tuple[DecodeSpeed, ...]
    roof: Roof | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with rates and shares of the roof beside the times."""
        record = asdict(self)
        for entry, one in zip(record["prefill"], self.prefill):
            entry["tokens_per_second"] = one.tokens / one.whole.median
            entry["share_of_peak"] = self.peak_share(one)
        for entry, step in zip(record["decode"], self.decode):
            entry["tokens_per_second"] = 1 / step.step.median
            entry["share_of_bandwidth"] = self.bandwidth_share(step)
        return record

    @property
    def arithmetic(self) -> Literal["int8", "fp32"]:
        """What the products of the weights are computed in."""
        return "int8" if self.weights.startswith("int") else "fp32"

    def peak_share(self, speed: PrefillSpeed) -> float | None:
        """Multiply-adds per second over the peak of :attr:`arithmetic`."""
        if self.roof is None:
            return None
        peak = self.roof.int8 if self.arithmetic == "int8" else self.roof.fp32
        return speed.multiply_adds / speed.whole.median / peak

    def bandwidth_share(self, speed: DecodeSpeed) -> float | None:
        """Bytes read per second over the bandwidth."""
        return None if self.roof is None else speed.bytes_read / speed.step.median / self.roof.bandwidth
