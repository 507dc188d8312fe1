"""Worth of each choice of the quantizer on the sample model: KL and accuracy, one change at a time.

Only the decoder layers are quantized (head, vision side and token table stay float32), so that nothing else blurs the
comparison. Every recipe is run on two calibration sets; KL is the mean over both, in nats, against the float32 model on
conversations that are in neither. Accuracy is that of the first set's model, in torch.

Needs the sample's modules: run from the repository, ``python scripts/ablate.py SCRATCH [--answers]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "sample"))

from encoder import Encoder
from evaluate import evaluate, torch_answers
from make_calibration import write_calibration
from probes import MAIN_SKILLS

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.prompts import encode_samples
from owl2.quant.calibration.samples import load_calibration
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import gptq
from owl2.quant.grid import rtn
from owl2.quant.hessian import HessianAccumulator
from owl2.quant.layer import IMAGE_BRANCH, LINEARS, SITES, quantize_layer, site_inputs
from owl2.quant.models.mplug_owl2 import DecoderLayer, Owl2Model, rotary_tables
from owl2.quant.stream import Calibration, HiddenStates, Stream
from owl2.runtime.evaluation.divergence import IMAGE, TEXT, Divergence, divergence
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.token_table import ArrayTable

CHECKPOINT = Path(__file__).parents[1] / "sample" / "checkpoint"
CALIBRATION_SEEDS = (0, 1)
HELD_OUT_SEED, HELD_OUT_COUNT = 1000, 256

Quantize = Callable[[DecoderLayer, Calibration, QuantConfig], None]
"""Quantizes a layer in place and moves the calibration past it."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    name: str
    config: QuantConfig
    quantize: Quantize
    head_bits: int | None = None


@dataclass(frozen=True)
class Result:
    """Loss of a recipe; KL in nats, agreement of the best token and right answers as shares."""

    name: str
    kl_text: float
    kl_text_by_set: list[float]
    kl_image: float
    agreement_text: float
    answers: dict[str, float]
    seconds: float


def ours(layer: DecoderLayer, calibration: Calibration, config: QuantConfig) -> None:
    """The quantizer of owl2-export."""
    original = copy.deepcopy(layer)
    quantize_layer(layer, original, calibration, config, "layer")
    calibration.advance(layer, original)


def image_branch_in_8_bits(layer: DecoderLayer, calibration: Calibration, config: QuantConfig) -> None:
    """The image branch's keys and values in 8 bits, which decoding never reads."""
    original = copy.deepcopy(layer)
    others = [name for name in LINEARS if name not in IMAGE_BRANCH]
    quantize_layer(layer, original, calibration, replace(config, bits=8), "layer", others)
    quantize_layer(layer, original, calibration, config, "layer", IMAGE_BRANCH)
    calibration.advance(layer, original)


def rounding(layer: DecoderLayer, calibration: Calibration, config: QuantConfig) -> None:
    """Round to nearest."""
    quantize_layer(layer, None, None, replace(config, method="rtn"), "layer")
    calibration.advance(layer, layer)


def text_only(layer: DecoderLayer, calibration: Calibration, config: QuantConfig) -> None:
    """Calibrate on text as tools for language models do, so that the image branch is only rounded."""
    _one_hessian(layer, calibration, config, images=False)


def merged(layer: DecoderLayer, calibration: Calibration, config: QuantConfig) -> None:
    """Use one Hessian of all rows for every projection, as tools that know images but not branches do."""
    _one_hessian(layer, calibration, config, images=True)


@torch.no_grad()
def _one_hessian(layer: DecoderLayer, calibration: Calibration, config: QuantConfig, *, images: bool) -> None:
    for site in SITES:
        rows = HessianAccumulator(layer.get_parameter(f"{site[0]}.weight").shape[1], site[0])
        for sequence, inputs in site_inputs(layer, site[0], calibration.quantized):
            seen = inputs if images else inputs[sequence.routing.text]
            rows.add(seen, seen)
        for name in site:
            weight = layer.get_parameter(f"{name}.weight")
            if name in IMAGE_BRANCH and not images:
                weight.copy_(rtn(weight, config).dequantize())
            else:
                weight.copy_(gptq(weight.detach(), rows.hessian, config)[0].dequantize())
    calibration.advance(layer, layer)


@torch.no_grad()
def rotated(layer: DecoderLayer, calibration: Calibration, config: QuantConfig) -> None:
    """Rotate values and the inputs of the output projection by a Hadamard matrix within each head."""
    heads = layer.self_attn.heads
    rotation = torch.kron(torch.eye(heads), _hadamard(layer.self_attn.q_proj.out_features // heads))
    for branch in (0, 1):
        value = layer.get_parameter(f"self_attn.v_proj.multiway.{branch}.weight")
        value.copy_(rotation @ value)
    output = layer.get_parameter("self_attn.o_proj.weight")
    output.copy_(output @ rotation.T)
    ours(layer, calibration, config)


def _hadamard(width: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)


def channel_scales(power: float) -> Quantize:
    """AWQ (Lin et al. 2023): strong channels scaled up in the weights and down in both norms' gains."""

    @torch.no_grad()
    def quantize(layer: DecoderLayer, calibration: Calibration, config: QuantConfig) -> None:
        for site, norm in ((SITES[0], "input_layernorm"), (SITES[2], "post_attention_layernorm")):
            rows = torch.cat([inputs for _, inputs in site_inputs(layer, site[0], calibration.quantized)])
            scale = rows.abs().mean(0).clamp(min=1e-6) ** power
            scale /= scale.log().mean().exp()
            for branch in (0, 1):
                layer.get_parameter(f"{norm}.multiway.{branch}.weight").div_(scale)
            for name in site:
                layer.get_parameter(f"{name}.weight").mul_(scale)
        ours(layer, calibration, config)

    return quantize


def recipes(group_size: int) -> Iterator[Recipe]:
    """Baselines, ours, ours without each of its parts, and ideas that were tried and not kept."""
    plain = QuantConfig(group_size=group_size, sweeps=0, image_weight=1.0, asymmetry=0.0)
    full = QuantConfig(group_size=group_size, signed_scales=True)
    yield Recipe("rounding", full, rounding)
    yield Recipe("GPTQ, calibrated on text", plain, text_only)
    yield Recipe("GPTQ, one Hessian for all rows", plain, merged)
    yield Recipe("GPTQ, a Hessian per branch", plain, ours)
    yield Recipe("ours", full, ours)
    yield Recipe("without signed scales", replace(full, signed_scales=False), ours)
    yield Recipe("without activation order", replace(full, act_order=False), ours)
    yield Recipe("without clip search", replace(full, clip_search=False), ours)
    yield Recipe("without descent", replace(full, sweeps=0), ours)
    yield Recipe("without asymmetric target", replace(full, asymmetry=0.0), ours)
    yield Recipe("asymmetric target all the way", replace(full, asymmetry=1.0), ours)
    for weight in (0.05, 1.0, 5.0):
        yield Recipe(f"an image row counts {weight:g}", replace(full, image_weight=weight), ours)
    yield Recipe("head-wise rotation of v and o", full, rotated)
    yield Recipe("channel scales, power 0.25", full, channel_scales(0.25))
    yield Recipe("channel scales, power 0.5", full, channel_scales(0.5))
    yield Recipe("image branch in 8 bits", full, image_branch_in_8_bits)
    yield Recipe("head in 8 bits, rounded", full, ours, head_bits=8)
    yield Recipe("head in 4 bits, rounded", full, ours, head_bits=4)


class Bench:
    """The sample model, its calibration sets and the held-out conversations with their reference logits."""

    def __init__(self, scratch: Path) -> None:
        with Checkpoint(CHECKPOINT) as checkpoint:
            self.config = checkpoint.config
            self.model = Owl2Model(checkpoint.config)
            checkpoint.load_into(self.model, "")
            self.table = ArrayTable(checkpoint.tensor("model.embed_tokens.weight").numpy())
        self.layers = [layer for layer in self.model.model.layers if isinstance(layer, DecoderLayer)]
        self.head = self.model.lm_head.weight.data.clone()
        self.original = {name: value.clone() for name, value in self.model.model.layers.state_dict().items()}
        self.tokenizer = Tokenizer.load(CHECKPOINT)
        self.sets = [self._embedded(scratch / f"calibration-{seed}", 128, seed) for seed in CALIBRATION_SEEDS]
        self.held_out = self._embedded(scratch / "held-out", HELD_OUT_COUNT, HELD_OUT_SEED)
        self.reference = self._logits()

    @torch.no_grad()
    def _embedded(self, folder: Path, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        path = write_calibration(folder, count=count, seed=seed)
        prompts = encode_samples(load_calibration(path, count).samples, self.config, self.tokenizer)
        embedded = []
        for prompt in prompts:
            images = {
                digest: self.model.encode_images(torch.from_numpy(image.pixels)[None])[0].numpy()
                for digest, image in prompt.images.items()
            }
            rows, modality = embed(prompt.keys, self.table, images)
            embedded.append((torch.from_numpy(rows), torch.from_numpy(modality)))
        return embedded

    def _stream(self, embedded: list[tuple[Tensor, Tensor]]) -> Stream:
        return Stream(self.config.decoder, [HiddenStates.of(rows, modality) for rows, modality in embedded])

    @torch.no_grad()
    def _logits(self) -> list[Tensor]:
        stream = self._stream(self.held_out)
        for layer in self.layers:
            stream.advance(layer)
        return [self.model.head(self.model.model.norm(sequence.rows)) for sequence in stream.sequences]

    def quantize(self, recipe: Recipe, calibration_set: int) -> None:
        """Quantize the model's layers from the original weights."""
        self.model.model.layers.load_state_dict(self.original)
        calibration = Calibration(self._stream(self.sets[calibration_set]))
        for layer in self.layers:
            recipe.quantize(layer, calibration, recipe.config)
        self.model.lm_head.weight.data = self.head
        if recipe.head_bits is not None:
            rounded = QuantConfig(bits=recipe.head_bits, group_size=recipe.config.group_size, method="rtn")
            self.model.lm_head.weight.data = rtn(self.head, rounded).dequantize()

    def gradient_ratio(self) -> list[float]:
        """Ratio of the mean squared gradients of image rows and text rows, after each layer.

        Gradients are those of the log-likelihood of tokens that the model itself draws at text positions (the Fisher
        information), which says how much the same squared error matters in each.
        """
        sums = torch.zeros(len(self.layers), 2)
        counts = torch.zeros(2)
        generator = torch.Generator().manual_seed(0)
        for embedded, modality in self.sets[0]:
            sequence = HiddenStates.of(embedded.clone().requires_grad_(), modality)
            outputs: list[Tensor] = []
            rotary = rotary_tables(self.config.decoder, len(modality), len(modality))
            hidden = sequence.rows
            for layer in self.layers:
                hidden, _ = layer(hidden, sequence.routing, (1, len(modality)), rotary)
                hidden.retain_grad()
                outputs.append(hidden)
            logits = self.model.head(self.model.model.norm(hidden))[modality == 0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.autograd.backward(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"))
            for index, output in enumerate(outputs):
                assert output.grad is not None
                squares = output.grad.square().sum(-1)
                sums[index] += torch.stack([squares[modality == branch].sum() for branch in (TEXT, IMAGE)])
            counts += torch.bincount(modality, minlength=2)
            self.model.zero_grad()
        means = sums / counts
        ratios: list[float] = (means[:, IMAGE] / means[:, TEXT]).tolist()
        return ratios

    def compare(self) -> Divergence:
        """The model as it is now against the original one."""
        total = Divergence()
        for reference, actual, (_, modality) in zip(self.reference, self._logits(), self.held_out):
            total += divergence(reference.numpy(), actual.numpy(), modality.numpy())
        return total

    def answers(self) -> dict[str, float]:
        """Share of right answers: 1,000 questions of the main skills, and captions."""
        encoder = Encoder(CHECKPOINT / "tokenizer.model")
        skills = (*MAIN_SKILLS, "caption")
        result = evaluate(lambda asked: torch_answers(self.model, encoder, asked), count=1000, skills=skills)
        return {name: skill.share for name, skill in result.skills.items()} | {"main": result.main_right / 1000}


def run(bench: Bench, recipe: Recipe, *, answers: bool) -> Result:
    """Quantize on each calibration set and compare."""
    began = time.perf_counter()
    by_set, answered = [], {}
    for index in range(len(bench.sets)):
        bench.quantize(recipe, index)
        by_set.append(bench.compare())
        if answers and index == 0:
            answered = bench.answers()
    total = sum(by_set[1:], by_set[0])
    return Result(
        recipe.name,
        total.mean_kl(TEXT),
        [single.mean_kl(TEXT) for single in by_set],
        total.mean_kl(IMAGE),
        total.agreement(TEXT),
        answered,
        time.perf_counter() - began,
    )


def line(result: Result) -> str:
    """One row of the table."""
    sets = " ".join(f"{value:.5f}" for value in result.kl_text_by_set)
    right = " ".join(f"{skill} {share:.1%}" for skill, share in result.answers.items())
    return (
        f"{result.name:34} {result.kl_text:.5f} ({sets})  image {result.kl_image:.5f}  "
        f"agreement {result.agreement_text:.2%}  {right}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scratch", type=Path, help="folder for calibration data")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="recipes whose name contains one of these")
    parser.add_argument("--answers", action="store_true", help="also ask the held-out questions")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    bench, results = Bench(options.scratch), []
    ratios = " ".join(f"{ratio:.3f}" for ratio in bench.gradient_ratio())
    print(f"squared gradients of image rows over text rows, after each layer: {ratios}")
    print(f"{'recipe':34} KL at text positions (by calibration set)", flush=True)
    if options.answers:
        print("float32", bench.answers(), flush=True)
    for recipe in recipes(options.group_size):
        if options.only is None or any(text in recipe.name for text in options.only):
            results.append(run(bench, recipe, answers=options.answers))
            print(line(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
