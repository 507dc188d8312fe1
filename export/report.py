"""What an export cost, as ``report.json`` in the bundle and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from owl2.export.checks.parity import Parity
from owl2.export.vision import PartReport
from owl2.quant.layer import ModuleReport
from owl2.runtime.evaluation.certificate import Baseline
from owl2.runtime.evaluation.divergence import Divergence


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The bundle as it runs against torch on the original weights, on prompts the quantizer has not seen.

    Attributes:
        measured_on: which prompts.
        positions: how many positions were compared.
        mean_abs_logit_difference: over all positions and the whole vocabulary.
        kl_text, kl_image: mean Kullback-Leibler divergence of the next-token distributions, in nats, at text
            and at image positions.
        top1_agreement_text, top1_agreement_image: share of these positions with the same most likely token.
    """

    measured_on: str
    positions: int
    mean_abs_logit_difference: float
    kl_text: float
    kl_image: float
    top1_agreement_text: float
    top1_agreement_image: float

    @classmethod
    def of(cls, measured_on: str, apart: Divergence) -> Accuracy:
        """The means of what was summed up."""
        return cls(
            measured_on=measured_on,
            positions=int(sum(apart.positions)),
            mean_abs_logit_difference=apart.mean_difference,
            kl_text=apart.mean_kl(0),
            kl_image=apart.mean_kl(1),
            top1_agreement_text=apart.agreement(0),
            top1_agreement_image=apart.agreement(1),
        )


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
        samples, images, text_rows, image_rows: how much of it.
        fingerprint: sha256 of token ids and pixels.
        notes: remarks on the data.
    """

    source: str
    samples: int
    images: int
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
        goldens: what this machine reached on the certificate's prompts, and what a device must.
        kv_int8: what an int8 K/V cache costs; None where the bundle offers none.
        modules: what GPTQ cost, by linear layer.
        vision: what int8 costs each part of the vision side; empty for floating point.
        size: bytes of the bundle.
        seconds: wall time of the export.
        layer_seconds: of each decoder layer.
        peak_memory: largest resident size of the process, bytes; mapped files count.
        peak_own_memory: the largest part of it that is not mapped files, which the system may drop at any time;
            None where the system does not tell.
    """

    recipe: Mapping[str, Any]
    calibration: CalibrationRecord
    parity: tuple[Parity, ...]
    accuracy: Accuracy
    goldens: tuple[Baseline, ...]
    kv_int8: KvInt8 | None
    modules: Mapping[str, ModuleReport]
    vision: tuple[PartReport, ...]
    size: int
    seconds: float
    layer_seconds: tuple[float, ...]
    peak_memory: int
    peak_own_memory: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return asdict(self)
