"""What an export cost, as ``report.json`` in the bundle and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl2.export.parity import Parity
from owl2.quant.gptq import GptqReport
from owl2.runtime.engine import Floats, Ints

# Rows of logits compared at a time, which bounds the memory at full-size vocabularies.
ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The bundle as it runs against torch on the original weights, on prompts the quantizer has not seen.

    Attributes:
        measured_on: which prompts.
        positions: how many positions were compared.
        mean_abs_logit_difference: over all positions and the whole vocabulary.
        kl_text, kl_image: mean Kullback-Leibler divergence of the next-token distributions, in nats, at text
            and at image positions.
        top1_agreement_text: share of text positions with the same most likely token.
    """

    measured_on: str
    positions: int
    mean_abs_logit_difference: float
    kl_text: float
    kl_image: float
    top1_agreement_text: float


@dataclass(frozen=True, slots=True)
class KvInt8:
    """What an int8 K/V cache costs and saves beside the same bundle's float32 one, on the prompts of the accuracy.

    Attributes:
        scales_from: ``calibration``, or ``the measured prompts`` where there was none: their loss is then that of
            prompts the scales have seen.
        positions: how many positions were compared; the first ones where there are many.
        kl_text, kl_image: mean Kullback-Leibler divergence of the next-token distributions, in nats, at text and
            at image positions.
        agreement: share of text positions with the same most likely token.
        torch_difference: RMS of the difference between the graph and torch with keys and values rounded alike, as
            a fraction of what the rounding changes.
        bytes_per_position: keys and values of one position in all layers; the scales are part of the graph.
        bytes_per_position_fp16, bytes_per_position_fp32: the same in wider caches.
    """

    scales_from: str
    positions: int
    kl_text: float
    kl_image: float
    agreement: float
    torch_difference: float
    bytes_per_position: int
    bytes_per_position_fp16: int
    bytes_per_position_fp32: int


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """What the quantizer looked at.

    Attributes:
        source: ``built-in``, a name, or ``none``.
        samples, pictures, text_rows, image_rows: how much of it.
        fingerprint: sha256 of token ids and pixels.
        notes: remarks on the data.
    """

    source: str
    samples: int
    pictures: int
    text_rows: int
    image_rows: int
    fingerprint: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything known about one export.

    Attributes:
        recipe: the settings, defaults resolved.
        calibration: what the quantizer looked at.
        parity: each graph against torch.
        accuracy: the bundle against the checkpoint.
        kv_int8: what an int8 K/V cache costs; None where the bundle offers none.
        modules: what GPTQ cost, by linear layer.
        size: bytes of the bundle.
        seconds: wall time of the export.
        peak_memory: largest resident size of the process, bytes; mapped files count.
    """

    recipe: Mapping[str, Any]
    calibration: CalibrationRecord
    parity: tuple[Parity, ...]
    accuracy: Accuracy
    kv_int8: KvInt8 | None
    modules: Mapping[str, GptqReport]
    size: int
    seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return asdict(self)


class AccuracyMeter:
    """Compares logits prompt by prompt; nothing but sums is kept."""

    def __init__(self) -> None:
        self._positions = np.zeros(2)  # text, image
        self._kl = np.zeros(2)
        self._same = np.zeros(2)
        self._difference = 0.0

    def add(self, reference: Floats, made: Floats, modality: Ints) -> None:
        """Compare one prompt.

        Args:
            reference: logits [T, V] of torch on the original weights.
            made: logits [T, V] of the bundle.
            modality: int64 [T], 1 at image rows.
        """
        for start in range(0, len(modality), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            one, other, kinds = reference[rows], made[rows], modality[rows]
            self._positions += np.bincount(kinds, minlength=2)
            self._kl += np.bincount(kinds, _kl(one, other), 2)
            self._same += np.bincount(kinds, one.argmax(-1) == other.argmax(-1), 2)
            self._difference += float(np.abs(one - other).mean(-1, dtype=np.float64).sum())

    def result(self, measured_on: str) -> Accuracy:
        """Means over everything added."""
        counted = np.maximum(self._positions, 1)
        kl, same = self._kl / counted, self._same / counted
        return Accuracy(
            measured_on=measured_on,
            positions=int(self._positions.sum()),
            mean_abs_logit_difference=self._difference / float(counted.sum()),
            kl_text=float(kl[0]),
            kl_image=float(kl[1]),
            top1_agreement_text=float(same[0]),
        )


def _kl(reference: Floats, made: Floats) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of each row of logits, in nats: [T, V] twice -> [T]."""
    p, q = _log_softmax(reference), _log_softmax(made)
    divergence: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return divergence


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
