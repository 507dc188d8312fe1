"""What rounding keys and values to 8 bits costs, by how the scales are shared and how far they reach.

Torch on a checkpoint's own weights: the largest values are taken on calibration samples, the loss is measured on
others, at the positions they have and again at later ones (which changes nothing in float32). ONNX Runtime's attention
takes one scale per tensor or per channel; the other ways are here to compare with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.prompts import prepare
from owl2.quant.calibration.samples import load_calibration
from owl2.quant.models.mplug_owl2 import DecoderLayer, Owl2Model
from owl2.quant.models.mplug_owl2.decoder import KeyValue, rotary_slice
from owl2.quant.stream import HiddenStates
from owl2.runtime.evaluation.divergence import Divergence, divergence
from owl2.runtime.families.mplug_owl2.positions import embed
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer

FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0)
KEYS, VALUES, KEY_PAIRS = range(3)


@dataclass(frozen=True)
class Sharing:
    """Which values have a scale in common.

    Attributes:
        reach: from largest magnitudes [2 (text, image), H, D], values [1, H, T, D] and their modality [T], the
            magnitude of the last code, which broadcasts with the values.
        pairs: take the length of a key's rotary pair for the magnitude of its two channels.
        dynamic: scales are computed while running, so no factor helps.
    """

    reach: Callable[[Tensor, Tensor, Tensor], Tensor]
    pairs: bool = False
    dynamic: bool = False


SHARINGS = {
    "tensor": Sharing(lambda most, x, kinds: most.max()),
    "head": Sharing(lambda most, x, kinds: most.amax((0, 2))[:, None, None]),
    "head and modality": Sharing(lambda most, x, kinds: most.amax(2).T[:, kinds, None]),
    "channel": Sharing(lambda most, x, kinds: most.amax(0)[:, None]),
    "channel, keys by pair": Sharing(lambda most, x, kinds: most.amax(0)[:, None], pairs=True),
    "channel and modality": Sharing(lambda most, x, kinds: most.transpose(0, 1)[:, kinds]),
    "the same, keys by pair": Sharing(lambda most, x, kinds: most.transpose(0, 1)[:, kinds], pairs=True),
    "token and head": Sharing(lambda most, x, kinds: x.abs().amax(-1, keepdim=True), dynamic=True),
}


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
    """The checkpoint in torch."""

    def __init__(self, folder: Path) -> None:
        with Checkpoint(folder) as checkpoint:
            self.config = checkpoint.config
            self.model = Owl2Model(self.config).eval()
            checkpoint.load_into(self.model, "")
        self.tokenizer = Tokenizer.load(folder)
        self.layers: list[DecoderLayer] = list(self.model.model.layers)

    @torch.no_grad()
    def sequences(self, data: Path | None, samples: int) -> list[HiddenStates]:
        """Rows of the prompts before the first layer; None for the built-in samples."""
        prompts = prepare(load_calibration(data, samples), self.config, self.tokenizer, calibrate=True)
        chosen = prompts.calibration + prompts.held_out
        rows = {
            digest: self.model.encode_images(torch.from_numpy(image.pixels)[None])[0].numpy()
            for digest, image in prompts.images_of(chosen).items()
        }
        table = self.model.model.embed_tokens.weight.numpy()
        made = [embed(prompt.keys, table, rows) for prompt in chosen]
        return [HiddenStates.of(torch.from_numpy(embeds), torch.from_numpy(kinds)) for embeds, kinds in made]

    @torch.no_grad()
    def logits(self, sequence: HiddenStates, first: int = 0) -> np.ndarray:
        """[T, V] of a sequence whose first position is ``first``."""
        rows, tokens = sequence.rows, len(sequence.rows)
        rotary = rotary_slice(self.config.decoder, first, tokens)
        for layer in self.layers:
            rows, _ = layer(rows, sequence.routing, (1, tokens), rotary)
        return self.model.head(self.model.model.norm(rows)).numpy()


def modality(sequence: HiddenStates) -> Tensor:
    """int64 [T], 1 at image rows."""
    kinds = torch.zeros(len(sequence.rows), dtype=torch.int64)
    kinds[sequence.routing.image] = 1
    return kinds


def largest(model: Model, sequences: list[HiddenStates]) -> Tensor:
    """Magnitudes [layers, 3 (keys, values, keys by pair), 2 (text, image), H, D]."""
    decoder = model.config.decoder
    most = torch.zeros(len(model.layers), 3, 2, decoder.num_attention_heads, decoder.head_dim)
    for sequence in sequences:
        kinds = modality(sequence)

        def see(index: int, made: KeyValue, kinds: Tensor = kinds) -> KeyValue:
            lengths = torch.hypot(*made[0].chunk(2, dim=-1))
            for which, x in enumerate((*made, torch.cat([lengths, lengths], dim=-1))):
                for kind in range(2):
                    rows = x[0, :, kinds == kind]
                    if rows.shape[1]:
                        most[index, which, kind] = torch.maximum(most[index, which, kind], rows.abs().amax(1))
            return made

        with hooked(model.layers, see):
            model.logits(sequence)
    return most


def measure(
    model: Model,
    pairs: list[tuple[HiddenStates, np.ndarray]],
    most: Tensor,
    sharing: Sharing,
    factor: float,
    first: int,
) -> dict[str, float]:
    """KL and agreement of one way of sharing scales, and the share of values beyond the last code."""
    apart, cut, seen = Divergence(), 0, 0
    for sequence, exact in pairs:
        kinds = modality(sequence)

        def rounded(index: int, made: KeyValue, kinds: Tensor = kinds) -> KeyValue:
            nonlocal cut, seen
            results = []
            for which, x in zip((KEY_PAIRS if sharing.pairs else KEYS, VALUES), made):
                scale = (factor * sharing.reach(most[index, which], x, kinds) / 127).clamp(min=1e-12)
                codes = (x / scale).round()
                cut += int(((codes > 127) | (codes < -128)).sum())
                seen += codes.numel()
                results.append(codes.clamp(-128, 127) * scale)
            return results[0], results[1]

        with hooked(model.layers, rounded):
            apart += divergence(exact, model.logits(sequence, first), kinds.numpy())
    return {
        "kl_text": apart.mean_kl(0),
        "kl_image": apart.mean_kl(1),
        "agreement": apart.agreement(0),
        "cut": cut / seen,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("calibration", help="JSONL of conversations, a folder of images, or built-in")
    parser.add_argument("held_out", type=Path, help="JSONL of conversations or a folder of images, other samples")
    parser.add_argument("--samples", type=int, default=128, help="to calibrate with (default 128)")
    parser.add_argument("--measured", type=int, default=64, help="held-out samples (default 64)")
    parser.add_argument("--only", choices=SHARINGS, nargs="+", default=list(SHARINGS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = Model(options.checkpoint)
    data = None if options.calibration == "built-in" else Path(options.calibration)
    most = largest(model, model.sequences(data, options.samples))
    sequences = model.sequences(options.held_out, options.measured)
    later = model.config.decoder.max_position_embeddings - max(len(sequence.rows) for sequence in sequences)
    pairs = [(sequence, model.logits(sequence)) for sequence in sequences]
    rows = []
    for name in options.only:
        for factor in FACTORS[:1] if SHARINGS[name].dynamic else FACTORS:
            for first in (0, later):
                row = measure(model, pairs, most, SHARINGS[name], factor, first)
                rows.append({"scales": name, "factor": factor, "first_position": first, **row})
                if not options.json:
                    print(
                        "{scales:22} x {factor:4} from position {first_position:4}: KL {kl_text:.2e} text, "
                        "{kl_image:.2e} image; same best token {agreement:.2%}; cut {cut:.1e}".format(**rows[-1]),
                        flush=True,
                    )
    if options.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
