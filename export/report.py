"""Results of an export, as ``report.json`` in the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from owl2.export.prompts import Prompts, digests, fingerprint
from owl2.quant.layer import ModuleReport
from owl2.runtime.evaluation.divergence import Divergence
from owl2.runtime.evaluation.goldens import Baseline


@dataclass(frozen=True, slots=True)
class Parity:
    """Comparison of a graph with torch; differences are relative to the RMS of torch's values.

    Attributes:
        graph: file name.
        values: how many were compared.
        exact: largest difference to torch on the stored weights, activations in float32.
        limit: the bound on it.
        activations: RMS difference that the graph's own activation types add.
        weights: RMS difference between stored and original weights, both in torch.
        total: RMS difference between the graph as it runs and torch on the original weights.
    """

    graph: str
    values: int
    exact: float
    limit: float
    activations: float
    weights: float
    total: float


@dataclass(frozen=True, slots=True)
class PartReport:
    """Cost of int8 in a part of the vision side.

    Attributes:
        part: name of a layer of the tower or of a linear layer of the abstractor, as in the checkpoint.
        effect: RMS change of the image rows when only this part is int8, over the rows' RMS.
        kept: whether it is stored in fp16 for that reason.
    """

    part: str
    effect: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The bundle as it runs against torch on the original weights.

    Attributes:
        measured_on: which prompts: held-out calibration samples, none of which shares an image with a sample that the
            quantizer has seen, or the built-in probes where there are none.
        samples: how many.
        positions: how many positions were compared.
        mean_abs_logit_difference: over all positions and the whole vocabulary.
        kl_text, kl_image: mean Kullback-Leibler divergence of the next-token distributions, in nats, at text
            and at image positions.
        top1_agreement_text, top1_agreement_image: share of these positions with the same most likely token.
    """

    measured_on: str
    samples: int
    positions: int
    mean_abs_logit_difference: float
    kl_text: float
    kl_image: float
    top1_agreement_text: float
    top1_agreement_image: float

    @classmethod
    def of(cls, prompts: Prompts, difference: Divergence) -> Accuracy:
        first, name = prompts.judged
        return cls(
            measured_on=name,
            samples=len(prompts.measured) - first,
            positions=int(sum(difference.positions)),
            mean_abs_logit_difference=difference.mean_difference,
            kl_text=difference.mean_kl(0),
            kl_image=difference.mean_kl(1),
            top1_agreement_text=difference.agreement(0),
            top1_agreement_image=difference.agreement(1),
        )


@dataclass(frozen=True, slots=True)
class KvInt8:
    """Costs and savings of an int8 K/V cache against the same bundle's float32 one, on the prompts of the accuracy.

    Attributes:
        scales_from: ``calibration``, or ``the measured prompts`` where there was none: their loss is then that of
            prompts the scales have seen.
        positions: how many positions were compared; the first ones where there are many.
        kl_text, kl_image: as in :class:`Accuracy`.
        agreement: its ``top1_agreement_text``.
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


@dataclass(frozen=True)
class Checks:
    """Results of comparing what was written with torch, as in :class:`Report`."""

    accuracy: Accuracy
    parity: tuple[Parity, ...] = ()
    goldens: tuple[Baseline, ...] = ()
    kv_int8: KvInt8 | None = None


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """The data that the quantizer looked at.

    Attributes:
        source: ``built-in``, a name, or ``none``.
        fingerprint: sha256 of token ids and pixels.
        notes: remarks on the data, and on what the accuracy was measured on.
    """

    source: str
    samples: int
    images: int
    text_rows: int
    image_rows: int
    fingerprint: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, prompts: Prompts) -> CalibrationRecord:
        calibration = prompts.calibration
        if not calibration:
            return cls("none", 0, 0, 0, 0, "", prompts.notes)
        image_rows = sum(isinstance(key, tuple) for prompt in calibration for key in prompt.keys)
        return cls(
            source=prompts.source,
            samples=len(calibration),
            images=len(digests(calibration)),
            text_rows=sum(len(prompt.keys) for prompt in calibration) - image_rows,
            image_rows=image_rows,
            fingerprint=fingerprint(calibration),
            notes=prompts.notes,
        )


@dataclass(frozen=True)
class Report:
    """Everything known about one export; sizes in bytes, times in seconds.

    Attributes:
        recipe: the settings, defaults resolved.
        parity: each graph against torch.
        goldens: this machine's results on the golden prompts, and the limits for a device.
        kv_int8: cost of an int8 K/V cache; None if the bundle offers none.
        modules: cost of GPTQ, by linear layer.
        vision: cost of int8 in each part of the vision side; empty for floating point.
        peak_memory: largest resident size of the process; mapped files count.
        peak_own_memory: the largest part of it that is not mapped files, which the system may drop at any time;
            None if the system does not tell.
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
        return asdict(self)
