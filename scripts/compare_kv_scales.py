"""Cost of rounding keys and values to 8 bits, by how scales are shared and how much room they leave.

Runs in torch on a checkpoint's own weights: the largest values are taken on calibration samples, the loss is measured
on others, at their own positions and again at later ones (which changes nothing in float32). ONNX Runtime's attention
takes one scale per tensor or per channel; the other ways are here for comparison.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.prompts import prepare
from owl2.quant.calibration.samples import load_calibration
from owl2.quant.models.mplug_owl2 import DecoderLayer, Owl2Model
from owl2.quant.models.mplug_owl2.decoder import KeyValue, rotary_slice
from owl2.quant.stream import HiddenStates
from owl2.runtime.engine import Floats
from owl2.runtime.evaluation.divergence import IMAGE, TEXT, Divergence, divergence
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.token_table import ArrayTable

FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0)
KEYS, VALUES, KEY_PAIRS = range(3)


@dataclass(frozen=True)
class Sharing:
    """Values that have a scale in common.

    Attributes:
        reach: magnitude of the last code, which broadcasts with the values, from the largest magnitudes
            [2 (text, image), H, D], the values [1, H, T, D] and their modality [T].
        pairs: take the length of a key's rotary pair for the magnitude of its two channels.
        dynamic: scales are computed while running, so no factor helps.
    """

    reach: Callable[[Tensor, Tensor, Tensor], Tensor]
    pairs: bool = False
    dynamic: bool = False


SHARINGS = {
    "tensor": Sharing(lambda largest, x, modality: largest.max()),
    "head": Sharing(lambda largest, x, modality: largest.amax((0, 2))[:, None, None]),
    "head and modality": Sharing(lambda largest, x, modality: largest.amax(2).T[:, modality, None]),
    "channel": Sharing(lambda largest, x, modality: largest.amax(0)[:, None]),
    "channel, keys by pair": Sharing(lambda largest, x, modality: largest.amax(0)[:, None], pairs=True),
    "channel and modality": Sharing(lambda largest, x, modality: largest.transpose(0, 1)[:, modality]),
    "the same, keys by pair": Sharing(lambda largest, x, modality: largest.transpose(0, 1)[:, modality], pairs=True),
    "token and head": Sharing(lambda largest, x, modality: x.abs().amax(-1, keepdim=True), dynamic=True),
}


@contextmanager
def hooked(layers: list[DecoderLayer], hook: Callable[[int, KeyValue], KeyValue]) -> Iterator[None]:
    """Pass all new keys and values through ``hook``, which gets the number of the layer, too."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def call(_module: object, _inputs: object, new: KeyValue, index: int = index) -> KeyValue:
                return hook(index, new)

            stack.callback(layer.self_attn.new_kv.register_forward_hook(call).remove)
        yield


class Model:
    """The checkpoint in torch."""

    def __init__(self, folder: Path) -> None:
        with Checkpoint(folder) as checkpoint:
            self.config = checkpoint.config
            self.model = Owl2Model(self.config).eval()
            checkpoint.load_into(self.model, "")
        self.tokenizer = Tokenizer.load(folder)
        self.layers = [layer for layer in self.model.model.layers if isinstance(layer, DecoderLayer)]

    @torch.no_grad()
    def sequences(self, data: Path | None, samples: int) -> list[HiddenStates]:
        """Rows of the prompts before the first layer; None for the built-in samples."""
        prompts = prepare(load_calibration(data, samples), self.config, self.tokenizer, calibrate=True)
        chosen = prompts.calibration + prompts.held_out
        rows = {
            digest: self.model.encode_images(torch.from_numpy(image.pixels)[None])[0].numpy()
            for digest, image in prompts.images_of(chosen).items()
        }
        table = ArrayTable(self.model.model.embed_tokens.weight.numpy())
        embedded = [embed(prompt.keys, table, rows) for prompt in chosen]
        return [HiddenStates.of(torch.from_numpy(embeds), torch.from_numpy(modality)) for embeds, modality in embedded]

    @torch.no_grad()
    def logits(self, sequence: HiddenStates, first: int = 0) -> Floats:
        """[T, V] of a sequence whose first position is ``first``."""
        rows, tokens = sequence.rows, len(sequence.rows)
        rotary = rotary_slice(self.config.decoder, first, tokens)
        for layer in self.layers:
            rows, _ = layer(rows, sequence.routing, (1, tokens), rotary)
        logits: Floats = self.model.head(self.model.model.norm(rows)).numpy()
        return logits


def modality_of(sequence: HiddenStates) -> Tensor:
    """int64 [T], 1 at image rows."""
    modality = torch.zeros(len(sequence.rows), dtype=torch.int64)
    modality[sequence.routing.image] = 1
    return modality


def largest_values(model: Model, sequences: list[HiddenStates]) -> Tensor:
    """Magnitudes [layers, 3 (keys, values, keys by pair), 2 (text, image), H, D]."""
    decoder = model.config.decoder
    largest = torch.zeros(len(model.layers), 3, 2, decoder.num_attention_heads, decoder.head_dim)
    for sequence in sequences:
        modality = modality_of(sequence)

        def see(index: int, new: KeyValue, modality: Tensor = modality) -> KeyValue:
            lengths = torch.hypot(*new[0].chunk(2, dim=-1))
            for which, x in enumerate((*new, torch.cat([lengths, lengths], dim=-1))):
                for branch in (TEXT, IMAGE):
                    rows = x[0, :, modality == branch]
                    if rows.shape[1]:
                        largest[index, which, branch] = torch.maximum(largest[index, which, branch], rows.abs().amax(1))
            return new

        with hooked(model.layers, see):
            model.logits(sequence)
    return largest


def measure(
    model: Model, pairs: list[tuple[HiddenStates, Floats]], largest: Tensor, sharing: Sharing, factor: float, first: int
) -> dict[str, float]:
    """KL and agreement of one way of sharing scales, and the share of values beyond the last code."""
    total, clipped, seen = Divergence(), 0, 0
    for sequence, exact in pairs:
        modality = modality_of(sequence)

        def rounded(index: int, new: KeyValue, modality: Tensor = modality) -> KeyValue:
            nonlocal clipped, seen
            results = []
            for which, x in zip((KEY_PAIRS if sharing.pairs else KEYS, VALUES), new):
                scale = (factor * sharing.reach(largest[index, which], x, modality) / 127).clamp(min=1e-12)
                codes = (x / scale).round()
                clipped += int(((codes > 127) | (codes < -128)).sum())
                seen += codes.numel()
                results.append(codes.clamp(-128, 127) * scale)
            return results[0], results[1]

        with hooked(model.layers, rounded):
            total += divergence(exact, model.logits(sequence, first), modality.numpy())
    return {
        "kl_text": total.mean_kl(TEXT),
        "kl_image": total.mean_kl(IMAGE),
        "agreement": total.agreement(TEXT),
        "clipped": clipped / seen,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("calibration", help="JSON lines of conversations, a folder of images, or built-in")
    parser.add_argument(
        "held_out", type=Path, help="JSON lines of conversations or a folder of images, with other samples"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration samples (default 128)")
    parser.add_argument("--measured", type=int, default=64, help="held-out samples (default 64)")
    parser.add_argument("--only", choices=SHARINGS, nargs="+", default=list(SHARINGS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = Model(options.checkpoint)
    data = None if options.calibration == "built-in" else Path(options.calibration)
    largest = largest_values(model, model.sequences(data, options.samples))
    sequences = model.sequences(options.held_out, options.measured)
    later = model.config.decoder.max_position_embeddings - max(len(sequence.rows) for sequence in sequences)
    pairs = [(sequence, model.logits(sequence)) for sequence in sequences]
    rows = []
    for name in options.only:
        for factor in FACTORS[:1] if SHARINGS[name].dynamic else FACTORS:
            for first in (0, later):
                row = measure(model, pairs, largest, SHARINGS[name], factor, first)
                rows.append({"scales": name, "factor": factor, "first_position": first, **row})
                if not options.json:
                    print(
                        "{scales:22} x {factor:4} from position {first_position:4}: KL {kl_text:.2e} text, "
                        "{kl_image:.2e} image; same best token {agreement:.2%}; clipped {clipped:.1e}".format(
                            **rows[-1]
                        ),
                        flush=True,
                    )
    if options.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
