"""Opening the model that a bundle is compared with: another bundle, or an official checkpoint in torch."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

from owl2.runtime import spec
from owl2.runtime.engine import BackendName, EngineOptions
from owl2.runtime.errors import BundleError, ReferenceModelError
from owl2.runtime.foreign import reading
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.placement import HOST, Placement
from owl2.runtime.verification import OnProgress

REFERENCES = "owl2.references"
"""Group of entry points that open other models than bundles: functions (folder) -> :class:`Loaded`."""


def open_reference(
    folder: Path,
    model: Loaded,
    *,
    device: Placement = HOST,
    threads: int | None = None,
    backend: BackendName | None = None,
    check_memory: bool = True,
    on_progress: OnProgress | None = None,
) -> Loaded:
    """Open a bundle or an official checkpoint that ``model`` is compared with, with the same context.

    A checkpoint runs in torch, which ``pip install 'owl2[export]'`` brings and which is imported only then; the
    options are for a bundle.

    Raises:
        ReferenceModelError: torch is not installed, or the two models have different shapes.
        BundleError, BackendError, CheckpointError, ConfigError: the folder is neither, or cannot be loaded.
    """
    if is_bundle(folder):
        options = EngineOptions(device, threads, context=model.context, backend=backend)
        _, reference = open_bundle(folder, options, check_memory=check_memory, on_progress=on_progress)
    else:
        reference = _open_checkpoint(folder)
    for quantity, ours, theirs in (
        ("tokens", model.config.decoder.vocab_size, reference.config.decoder.vocab_size),
        ("positions per image", model.config.rows_per_image, reference.config.rows_per_image),
    ):
        if ours != theirs:
            raise ReferenceModelError(
                f"{folder} has {theirs} {quantity}, {model.name} has {ours}: these are different models, and their "
                "distributions cannot be compared; give the checkpoint it was exported from, or another bundle of it"
            )
    return replace(reference, context=model.context)


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, or else an official checkpoint; raises BundleError if it is neither."""
    with reading(folder, BundleError, "give a bundle, or an official checkpoint"):
        if (folder / spec.MANIFEST).is_file():
            return True
        if (folder / "config.json").is_file():
            return False
    raise BundleError(f"{folder} is neither a bundle ({spec.MANIFEST}) nor an official checkpoint (config.json)")


def _open_checkpoint(folder: Path) -> Loaded:
    installed = entry_points(group=REFERENCES, name="checkpoint")
    hint = "to compare with a checkpoint, pip install 'owl2[export]'; another bundle can be compared without it"
    if not installed:
        raise ReferenceModelError(f"{folder} is a checkpoint, and this installation cannot run one: {hint}")
    try:
        opener = next(iter(installed)).load()
    except ImportError as error:
        raise ReferenceModelError(f"{folder} is a checkpoint, which needs torch: {error}; {hint}") from error
    reference: Loaded = opener(folder)
    return reference
