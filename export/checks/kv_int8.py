"""Checks of the int8 K/V cache: its graph against torch, and the loss against a float32 cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from owl2.export.checks.parity import rms
from owl2.export.graph.kv_int8 import MINIMUM_ONNXRUNTIME
from owl2.export.report import KvInt8
from owl2.runtime import spec
from owl2.runtime.backends.ort.installation import is_older
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import Floats, Ints
from owl2.runtime.errors import ParityError
from owl2.runtime.evaluation.divergence import Divergence

Codes = Sequence[NDArray[Any]]

# Of the RMS that rounding keys and values changes. Where noise puts a value of torch and of the graph on either side of
# the border between two codes, they differ by a whole step, and later layers see that: measured 0.00004 with 3 layers,
# 0.04 with 32 of width 64. Two unrelated roundings would differ by the root of 2; scales of the wrong heads, layers or
# width cost far more than rounding does.
DIFFERENCE_LIMIT = 2.0
# Noise puts few values on the other side of a border: none of 57,000 with the sample model.
FLIPPED_LIMIT = 0.01
# Differences below the resolution of float32 always pass; relative to the RMS of the logits.
EXACT_LIMIT = 1e-3
MAX_KEPT_BYTES = 256 << 20  # of logits: 2097 positions of a vocabulary of 32000


@dataclass
class FloatLogits:
    """Prompts with their logits under a float32 K/V cache, up to :data:`MAX_KEPT_BYTES`."""

    prompts: list[tuple[Floats, Ints, Floats]] = field(default_factory=list)  # embeds [T, C], modality [T], logits

    def offer(self, embeds: Floats, modality: Ints, logits: Floats) -> None:
        if logits.nbytes + sum(kept.nbytes for _, _, kept in self.prompts) <= MAX_KEPT_BYTES:
            self.prompts.append((embeds, modality, logits))


def can_be_checked() -> bool:
    """Whether the installed ONNX Runtime runs the graph; a graph that cannot be checked is not written."""
    return not is_older(onnxruntime.__version__, MINIMUM_ONNXRUNTIME)


def compare(*, graph: Floats, rounded: Floats, unrounded: Floats) -> float:
    """Measure the graph against torch and judge.

    Args:
        graph: logits of the graph, activations in float32.
        rounded: torch's logits on the stored weights with keys and values rounded as the cache rounds them.
        unrounded: the same with keys and values in float32. All three have one shape.

    Returns:
        RMS of the difference, as a fraction of what the rounding changes in torch.

    Raises:
        ParityError: the graph does something other than rounding keys and values.
    """
    effect, difference = rms(rounded - unrounded), rms(graph - rounded)
    allowed = max(DIFFERENCE_LIMIT * effect, EXACT_LIMIT * rms(unrounded))
    # Written so that NaN fails.
    if not difference <= allowed:
        raise ParityError(
            f"{spec.DECODER_GRAPHS['int8']} does not compute what torch computes with keys and values rounded to int8: "
            f"the difference is {difference:.3g} (RMS of the logits), at most {allowed:.3g} is allowed. Nothing was "
            "written; please report this with your config.json"
        )
    return difference / effect if effect > 0 else 0.0


def check_codes(stored: Codes, expected: Codes, decoder: DecoderConfig) -> None:
    """Compare the codes of the first layer, which no earlier rounding can disturb.

    Args:
        stored: key and value codes of the graph, int8 [1, H, at least T, padded D].
        expected: torch's, int8 [1, H, T, D].

    Raises:
        ParityError: more codes differ than float32 noise explains.
    """
    for name, one, other in zip(("keys", "values"), stored, expected):
        tokens, half = other.shape[2], decoder.head_dim // 2
        halves = one[:, :, :tokens].reshape(*other.shape[:-1], 2, -1)[..., :half]
        differences = np.abs(halves.reshape(other.shape).astype(np.int16) - other)
        share = np.count_nonzero(differences) / differences.size
        if differences.max() > 1 or share > FLIPPED_LIMIT:
            raise ParityError(
                f"{spec.DECODER_GRAPHS['int8']} does not round {name} as torch does: {share:.1%} of the codes in the "
                f"first layer differ, by up to {differences.max()}. Nothing was written; please report this with your "
                "config.json"
            )


def summary(loss: Divergence, torch_difference: float, decoder: DecoderConfig, *, calibrated: bool) -> KvInt8:
    return KvInt8(
        scales_from="calibration" if calibrated else "the measured prompts",
        positions=int(sum(loss.positions)),
        kl_text=loss.mean_kl(0),
        kl_image=loss.mean_kl(1),
        agreement=loss.agreement(0),
        torch_difference=torch_difference,
        bytes_per_position=spec.kv_bytes(decoder, "int8"),
        bytes_per_position_fp16=spec.kv_bytes(decoder, "fp16"),
        bytes_per_position_fp32=spec.kv_bytes(decoder, "fp32"),
    )
