"""What an export cost, as ``report.json`` in the bundle and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from owl2.export.parity import Parity
from owl2.quant.gptq import GptqReport
from owl2.runtime.engine import Floats, Ints


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
        modules: what GPTQ cost, by linear layer.
        size: bytes of the bundle.
        seconds: wall time of the export.
        peak_memory: largest resident size of the process, bytes.
    """

    recipe: Mapping[str, Any]
    calibration: CalibrationRecord
    parity: tuple[Parity, ...]
    accuracy: Accuracy
    modules: Mapping[str, GptqReport]
    size: int
    seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return asdict(self)


def measure_accuracy(measured_on: str, pairs: Sequence[tuple[Floats, Floats]], modalities: Sequence[Ints]) -> Accuracy:
    """Compare logits.

    Args:
        measured_on: name of the prompts.
        pairs: per prompt, logits [T, V] of torch on the original weights and of the bundle.
        modalities: per prompt, int64 [T], 1 at image rows.
    """
    image = np.concatenate(modalities).astype(bool)
    kl = np.concatenate([_kl(reference, made) for reference, made in pairs])
    same = np.concatenate([reference.argmax(-1) == made.argmax(-1) for reference, made in pairs])
    difference = [float(np.abs(reference - made).mean(dtype=np.float64)) for reference, made in pairs]
    return Accuracy(
        measured_on=measured_on,
        positions=len(kl),
        mean_abs_logit_difference=float(np.average(difference, weights=[len(m) for m in modalities])),
        kl_text=float(kl[~image].mean()),
        kl_image=float(kl[image].mean()) if image.any() else 0.0,
        top1_agreement_text=float(same[~image].mean()),
    )


def _kl(reference: Floats, made: Floats) -> Floats:
    """Kullback-Leibler divergence of each row of logits, in nats: [T, V] twice -> [T]."""
    p, q = _log_softmax(reference), _log_softmax(made)
    divergence: Floats = (np.exp(p) * (p - q)).sum(-1)
    return divergence


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
