"""Record what a bundle computes on this machine, to be compared with another machine's record.

Needs the plain install alone. CASES is a JSON list of objects: ``name``, ``prompt`` (raw text), ``images`` (paths),
``max_new_tokens``, and optionally ``preprocess``. The bundle's own golden prompts come first. OUT becomes a folder:

* ``logits.npz``: per scenario ``N.prefill`` float32 [T, V], every position of the prompt in one pass; ``N.modality``
  int64 [T]; ``N.steps`` float32 [R, V], its last text positions, most of them decoded one by one.
* ``record.json``: versions, and the greedy answer of every scenario that asks for one.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from owl2 import Owl2
from owl2.runtime.backends.ort.engine import OrtEngine, OrtOptions
from owl2.runtime.bundle import Bundle
from owl2.runtime.evaluation.verify import golden_positions, read_goldens, run_golden
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed, encode_prompt
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.images import ImageEncoder, prepare_images
from owl2.runtime.preprocess import ImageInput


@dataclass(frozen=True)
class Scenario:
    """A prompt; nothing is generated for ``max_new_tokens`` of 0."""

    name: str
    prompt: str
    images: Sequence[ImageInput]
    max_new_tokens: int = 0
    preprocess: str | None = None


def read_cases(bundle: Bundle, path: Path) -> list[Scenario]:
    """The bundle's golden prompts and those of a file."""
    goldens = [Scenario(f"certificate: {golden.name}", golden.prompt, golden.images) for golden in read_goldens(bundle)]
    return goldens + [Scenario(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def logits(bundle: Bundle, engine: OrtEngine, scenario: Scenario) -> Mapping[str, NDArray[Any]]:
    """The arrays of a case; prompts are cut where the context ends."""
    model = bundle.manifest.model
    images = prepare_images(scenario.images, model.preprocess, scenario.preprocess)
    whole = encode_prompt(scenario.prompt, images, Tokenizer.load(bundle.folder), model.rows_per_image)
    prompt = Prompt(whole.keys[: model.decoder.max_position_embeddings], whole.images)
    rows, _ = ImageEncoder(engine).rows(list(prompt.images.values()))
    table = bundle.embeddings()
    embeds, modality = embed(prompt.keys, table, rows)
    every = np.arange(len(embeds), dtype=np.int64)
    return {
        "prefill": engine.prefill(embeds, modality, 0, engine.allocate(len(embeds), None), every),
        "modality": modality,
        "steps": run_golden(engine, table, prompt, rows, golden_positions(prompt)),
    }


def answer(owl: Owl2, scenario: Scenario) -> dict[str, Any]:
    """The greedy answer of a scenario."""
    if not scenario.max_new_tokens:
        return {"name": scenario.name, "text": None, "ids": []}
    made = owl.generate(
        scenario.prompt,
        images=scenario.images,
        preprocess=scenario.preprocess,
        max_new_tokens=scenario.max_new_tokens,
        temperature=0,
    )
    return {"name": scenario.name, "text": made.text, "ids": list(made.ids)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    engine = OrtEngine(bundle, OrtOptions(threads=arguments.threads))
    owl = Owl2(bundle, engine)
    cases = read_cases(bundle, arguments.cases)
    arrays = {
        f"{index}.{name}": array
        for index, scenario in enumerate(cases)
        for name, array in logits(bundle, engine, scenario).items()
    }
    record = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "answers": [answer(owl, scenario) for scenario in cases],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out / "logits.npz", **arrays)
    (arguments.out / "record.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
