"""Score a folder of images into Parquet on a local Ray, and go on where an earlier run was stopped.

    pip install 'owl2[cpu]' 'ray[data]'
    python examples/ray_scores.py bundles/sample photos/ scores/

Ray writes a file for each part of the work as it is done; what is in these files is not scored again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pyarrow
import ray
from pyarrow import parquet

from owl2 import BatchScorer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path, help="folder of Parquet files")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    done = {path for file in options.out.glob("*.parquet") for path in paths_in(file)}
    paths = sorted(str(path) for path in options.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    rows = [{"path": path} for path in paths if path not in done]
    print(f"{len(done)} of {len(paths)} images are scored already")
    if not rows:
        return
    ray.init(num_cpus=options.workers, include_dashboard=False, log_to_driver=False)
    scored = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 50)).map_batches(
        BatchScorer,
        fn_constructor_kwargs={
            "bundle": str(options.bundle.resolve()),
            "column": "path",
            "task": ["quality"],
            "threads": max(1, (os.cpu_count() or 1) // options.workers),
        },
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        batch_size=50,
    )
    scored.write_parquet(str(options.out.resolve()), mode="append")


def paths_in(file: Path) -> list[str]:
    """What a file of an earlier run has; one that was cut off is removed."""
    try:
        return list(parquet.read_table(file)["path"].to_pylist())
    except pyarrow.ArrowInvalid:
        file.unlink()
        return []


if __name__ == "__main__":
    main()
