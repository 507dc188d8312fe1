"""What rounding keys and values to 8 bits costs, by how the scales are shared.

Torch on a checkpoint's own weights: the largest values are taken on calibration samples, the loss is measured on
others. ONNX Runtime's attention takes one scale per tensor or per channel; the rest is here to compare with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from owl2.export.checkpoint import Checkpoint
from owl2.export.model import DecoderLayer, Owl2Model
from owl2.export.prompts import pictures_of, prepare
from owl2.export.report import AccuracyMeter
from owl2.quant.calibration import load_calibration
from owl2.quant.stream import Sequence, Stream
from owl2.runtime.multimodal import Prompt, embed
from owl2.runtime.tokenizer import Tokenizer

KeyValue = tuple[Tensor, Tensor]
Scaling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Largest magnitudes [2, H, D] by modality, values [1, H, T, D], modality [T] -> magnitude of the last code."""

FACTORS = (1.0, 1.1, 1.25, 1.5)

SHARED: dict[str, Scaling] = {
    "tensor": lambda most, x, kinds: most.max(),
    "head": lambda most, x, kinds: most.amax((0, 2))[:, None, None],
    "head and modality": lambda most, x, kinds: most.amax(2).T[:, kinds, None],
    "channel": lambda most, x, kinds: most.amax(0)[:, None],
    "channel and modality": lambda most, x, kinds: most.transpose(0, 1)[:, kinds],
    "token and head": lambda most, x, kinds: x.abs().amax(-1, keepdim=True),
}
"""Per token means computed while running; the others come from the calibration samples."""


@contextmanager
def hooked(layers: list[DecoderLayer], hook: Callable[[int, KeyValue], KeyValue]) -> Iterator[None]:
    """Pass all new keys and values through ``hook``, which is given the number of the layer."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def call(_module: object, _inputs: object, made: KeyValue, index: int = index) -> KeyValue:
                return hook(index, made)

            stack.callback(layer.self_attn.new_kv.register_forward_hook(call).remove)
        yield


class Model:
    """The decoder on streams of prompts."""

    def __init__(self, folder: Path) -> None:
        with Checkpoint(folder) as checkpoint:
            self.config = checkpoint.config
            self.model = Owl2Model(self.config).eval()
            checkpoint.load_into(self.model, "")
        self.tokenizer = Tokenizer.load(folder)
        self.layers: list[DecoderLayer] = list(self.model.model.layers)

    @torch.no_grad()
    def sequences(self, data: Path, samples: int) -> list[Sequence]:
        """Rows of the prompts before the first layer."""
        prompts = prepare(load_calibration(data, samples), self.config, self.tokenizer, calibrate=True)
        chosen: list[Prompt] = prompts.calibration + prompts.held_out
        rows = {
            digest: self.model.encode_images(torch.from_numpy(picture.pixels)[None])[0].numpy()
            for digest, picture in pictures_of(chosen).items()
        }
        table = self.model.model.embed_tokens.weight.numpy()
        made = [embed(prompt.keys, table, rows) for prompt in chosen]
        return [Sequence.of(torch.from_numpy(embeds), torch.from_numpy(kinds)) for embeds, kinds in made]

    @torch.no_grad()
    def logits(self, sequence: Sequence) -> np.ndarray:
        """[T, V]."""
        stream = Stream(self.config.decoder, [Sequence(sequence.rows, sequence.routing)])
        for layer in self.layers:
            stream.advance(layer)
        return self.model.head(self.model.model.norm(stream.sequences[0].rows)).numpy()


def modality(sequence: Sequence) -> Tensor:
    """int64 [T], 1 at image rows."""
    kinds = torch.zeros(len(sequence.rows), dtype=torch.int64)
    kinds[sequence.routing.image] = 1
    return kinds


def largest(model: Model, sequences: list[Sequence]) -> Tensor:
    """Magnitudes [layers, 2 (K, V), 2 (text, image), H, D]."""
    decoder = model.config.decoder
    most = torch.zeros(len(model.layers), 2, 2, decoder.num_attention_heads, decoder.head_dim)
    for sequence in sequences:
        kinds = modality(sequence)

        def see(index: int, made: KeyValue, kinds: Tensor = kinds) -> KeyValue:
            for which, x in enumerate(made):
                for kind in range(2):
                    rows = x[0, :, kinds == kind]
                    if rows.shape[1]:
                        most[index, which, kind] = torch.maximum(most[index, which, kind], rows.abs().amax(1))
            return made

        with hooked(model.layers, see):
            model.logits(sequence)
    return most


def measure(
    model: Model, sequences: list[Sequence], exact: list[np.ndarray], most: Tensor, shared: Scaling, factor: float
) -> dict[str, float]:
    """KL and agreement of one way of sharing scales; the share of values beyond the last code."""
    meter, clipped, seen = AccuracyMeter(), 0, 0
    for sequence, reference in zip(sequences, exact):
        kinds = modality(sequence)

        def rounded(index: int, made: KeyValue, kinds: Tensor = kinds) -> KeyValue:
            nonlocal clipped, seen
            results = []
            for which, x in enumerate(made):
                scale = (factor * shared(most[index, which], x, kinds) / 127).clamp(min=1e-12)
                codes = (x / scale).round()
                clipped += int(((codes > 127) | (codes < -128)).sum())
                seen += codes.numel()
                results.append(codes.clamp(-128, 127) * scale)
            return results[0], results[1]

        with hooked(model.layers, rounded):
            meter.add(reference, model.logits(sequence), kinds.numpy())
    accuracy = meter.result("held out")
    return {
        "kl_text": accuracy.kl_text,
        "kl_image": accuracy.kl_image,
        "agreement": accuracy.top1_agreement_text,
        "clipped": clipped / seen,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("calibration", type=Path, help="JSONL of conversations, or a folder of pictures")
    parser.add_argument("held_out", type=Path, help="the same, other samples")
    parser.add_argument("--samples", type=int, default=128, help="of each (default 128)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = Model(options.checkpoint)
    most = largest(model, model.sequences(options.calibration, options.samples))
    sequences = model.sequences(options.held_out, options.samples)
    exact = [model.logits(sequence) for sequence in sequences]
    rows = []
    for name, shared in SHARED.items():
        for factor in FACTORS if "token" not in name else FACTORS[:1]:
            rows.append({"scales": name, "factor": factor, **measure(model, sequences, exact, most, shared, factor)})
            if not options.json:
                print(
                    "{scales:22} {factor:4}  KL text {kl_text:.2e}  image {kl_image:.2e}  same best "
                    "{agreement:.2%}  clipped {clipped:.1e}".format(**rows[-1]),
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
