"""Scores for tables: a callable that loads a bundle once and adds columns to batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from owl2.runtime.config import require
from owl2.runtime.errors import Owl2Error
from owl2.runtime.foreign import listed, shorten
from owl2.runtime.owl import Owl2
from owl2.runtime.placement import CPU
from owl2.runtime.preprocess import ImageReading


class BatchScorer:
    """Adds scores to batches: one load per worker of Ray Data's ``map_batches``, or of ``datasets``' ``map``.

    Example::

        ray.data.from_items(rows).map_batches(
            BatchScorer, fn_constructor_kwargs={"bundle": "bundle/", "column": "path"}, concurrency=2, batch_size=32)
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        column: str = "image",
        task: str | Sequence[str] = "quality",
        preset: str | os.PathLike[str] | None = None,
        reading: ImageReading | None = None,
        device: str = CPU,
        threads: int | None = None,
    ) -> None:
        """Load a bundle.

        Args:
            bundle: folder.
            column: of the images: paths, contents of files, or uint8 arrays [H, W, 3].
            task: one or several.
            preset: as in :meth:`Owl2.scorer`.
            reading: what to make of EXIF orientation and transparency.
            device: as in :meth:`Owl2.load`.
            threads: as in :meth:`Owl2.load`; where several workers share a machine, its cores divided by them.

        Raises:
            ConfigError, BundleError, BackendError: as :meth:`Owl2.load` and :meth:`Owl2.scorer`.
        """
        self._owl = Owl2.load(bundle, device=device, threads=threads, warm=True)
        self._scorer = self._owl.scorer(task, preset=preset)
        self._column, self._reading = column, reading

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with columns more.

        Args:
            batch: columns by name.

        Returns:
            The columns, and for each task ``TASK`` (1 to 5), ``TASK_normalized`` and ``TASK_std``, NaN for an image
            that cannot be scored, and ``error``, empty for the others.

        Raises:
            ConfigError: there is no such column.
            BackendError: a step failed.
        """
        require(
            self._column in batch, f"there is no column {shorten(self._column)}; the batch has {listed(list(batch))}"
        )
        images = list(batch[self._column])
        prepare = partial(self._scorer.prepare, reading=self._reading)
        found = [scores for _, scores in self._scorer.stream(images, prepare)]
        columns: dict[str, Any] = dict(batch)
        for place, scale in enumerate(self._scorer.scales):
            for field, name in (("value", ""), ("normalized", "_normalized"), ("std", "_std")):
                values = [
                    np.nan if isinstance(scores, Owl2Error) else getattr(scores[place], field) for scores in found
                ]
                columns[f"{scale.task}{name}"] = np.array(values, np.float64)
        errors = [str(scores) if isinstance(scores, Owl2Error) else "" for scores in found]
        columns["error"] = np.array(errors, dtype=object)
        return columns
