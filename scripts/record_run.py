"""Record what a bundle computes on this machine, to be compared with the record of another machine.

Needs the plain install only. CASES is a JSON list of objects: ``name``, ``prompt`` (raw text), ``images`` (paths),
``max_new_tokens``, and optionally ``preprocess``. The bundle's own golden prompts come first. OUT becomes a folder:

* ``logits.npz``: per case ``N.prefill`` float32 [T, V], every position of the prompt in one pass; ``N.modality``
  int64 [T]; ``N.steps`` float32 [R, V], its last text positions, most of them decoded one by one.
* ``record.json``: versions, and the greedy answer of every case that asks for one.
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
from owl2.runtime.bundle import Bundle
from owl2.runtime.evaluation.goldens import golden_positions, read_goldens
from owl2.runtime.evaluation.verify import run_golden
from owl2.runtime.families.mplug_owl2.positions import Prompt, embed
from owl2.runtime.image_files import ImageInput
from owl2.runtime.load import Loaded
from owl2.runtime.preprocess import AS_ORIGINAL


@dataclass(frozen=True)
class Case:
    """A prompt; nothing is generated for ``max_new_tokens`` of 0."""

    name: str
    prompt: str
    images: Sequence[ImageInput]
    max_new_tokens: int = 0
    preprocess: str | None = None


def read_cases(bundle: Path, path: Path) -> list[Case]:
    """The bundle's golden prompts and those of a file."""
    goldens, _ = read_goldens(Bundle.open(bundle))
    cases = [Case(f"golden: {golden.name}", golden.prompt, golden.images) for golden in goldens]
    return cases + [Case(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def logits(model: Loaded, case: Case) -> Mapping[str, NDArray[Any]]:
    """The arrays of a case; a prompt is cut where the context ends."""
    whole = model.encode(case.prompt, model.prepare(case.images, case.preprocess, AS_ORIGINAL))
    prompt = Prompt(whole.keys[: model.context], whole.images)
    rows, _ = model.encoder.rows(list(prompt.images.values()))
    embeds, modality = embed(prompt.keys, model.table, rows)
    buffers = model.engine.allocate(len(embeds), None)
    return {
        "prefill": model.engine.prefill(embeds, modality, 0, buffers, np.arange(len(embeds), dtype=np.int64)),
        "modality": modality,
        "steps": run_golden(model.engine, model.table, prompt, rows, golden_positions(prompt)),
    }


def answer(owl: Owl2, case: Case) -> dict[str, Any]:
    """The greedy answer of a case."""
    if not case.max_new_tokens:
        return {"name": case.name, "text": None, "ids": []}
    found = owl.generate(
        case.prompt,
        images=case.images,
        preprocess=case.preprocess,
        reading=AS_ORIGINAL,
        max_new_tokens=case.max_new_tokens,
    )
    return {"name": case.name, "text": found.text, "ids": list(found.ids)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    owl = Owl2.load(arguments.bundle, threads=arguments.threads)
    cases = read_cases(arguments.bundle, arguments.cases)
    arrays = {
        f"{index}.{name}": array for index, case in enumerate(cases) for name, array in logits(owl.model, case).items()
    }
    record = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "answers": [answer(owl, case) for case in cases],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out / "logits.npz", **arrays)  # type: ignore[arg-type]
    (arguments.out / "record.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
