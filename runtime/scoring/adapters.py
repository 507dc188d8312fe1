"""Scores for code that was written for OneAlign's model class, or for pyiqa: one line of it changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from owl2.runtime.config import require
from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import shorten
from owl2.runtime.image_files import ImageInput
from owl2.runtime.images import Images
from owl2.runtime.owl import Owl2
from owl2.runtime.placement import CPU
from owl2.runtime.preprocess import ImageReading
from owl2.runtime.scoring.scale import USUAL

Values = NDArray[np.float32]
ORIGINAL = ImageReading(orientation="stored", background=None)
"""How both read images: they turn none, and drop transparency."""
METRICS = ("qalign", "qalign_8bit", "qalign_4bit")


class OneAlign:
    """A bundle with the method :meth:`score` of OneAlign's model class.

    Example::

        model = OneAlign.from_pretrained("one-align-int4/")
        model.score([Image.open("a.jpg")], task_="quality", input_="image")
    """

    def __init__(self, owl: Owl2) -> None:
        self.owl = owl

    @classmethod
    def from_pretrained(cls, bundle: str | os.PathLike[str], *, device: str = CPU) -> OneAlign:
        """Load a bundle; raises as :meth:`Owl2.load`."""
        return cls(Owl2.load(bundle, device=device))

    @overload
    def score(
        self, images: Sequence[Images], task_: str = ..., input_: str = ..., return_dict: Literal[False] = ...
    ) -> Values: ...

    @overload
    def score(
        self, images: Sequence[Images], task_: str = ..., input_: str = ..., *, return_dict: Literal[True]
    ) -> dict[str, Values]: ...

    def score(
        self,
        images: Sequence[Images],
        task_: str = "quality",
        input_: str = "image",
        return_dict: bool = False,
    ) -> Values | dict[str, Values]:
        """Scores from 1 to 5.

        Args:
            images: of Pillow; for videos a list of frames each.
            task_: ``quality`` or ``aesthetics``; another word takes their place in the prompt, as in the original.
            input_: ``image`` or ``video``.
            return_dict: whether to return the logits of the five words, too.

        Returns:
            float32 [N], or ``{"logits": [N, 5], "scores": [N]}``.

        Raises:
            ConfigError: a task or input that is not known.
            ImageError: an image cannot be used.
        """
        require(input_ in ("image", "video"), f"input_ {shorten(input_)} is not known; use image or video")
        listed = isinstance(images, Sequence) and not isinstance(images, str | bytes)
        require(listed, f"images must be a list, got {type(images).__name__}; give [image]")
        scorer = self.owl.scorer(task_, video=input_ == "video", preset=USUAL, prompt=_prompt(task_, input_))
        items = [scorer.prepare(item, ORIGINAL) for item in images]
        scores = [found[0] for found in scorer.score(items)]
        values = np.array([score.value for score in scores], np.float32)
        if not return_dict:
            return values
        return {"logits": np.array([list(score.logits.values()) for score in scores], np.float32), "scores": values}


class Metric:
    """A metric as pyiqa's :func:`create_metric` makes it: call it with images.

    What code for a module of torch calls before (``to``, ``cpu``, ``cuda``, ``eval``) changes nothing: the bundle runs
    where it was loaded.
    """

    metric_mode = "NR"
    lower_better = False
    score_range = "1, 5"

    def __init__(self, name: str, owl: Owl2) -> None:
        """A metric; :func:`create_metric` is the usual way."""
        self.metric_name, self._model = name, OneAlign(owl)

    def __call__(self, target: Any, ref: Any = None, *, task_: str = "quality", input_: str = "image") -> Any:  # noqa: ANN401
        """Scores of images.

        Args:
            target: a path, a Pillow image, or an array or tensor N x 3 x H x W (or 3 x H x W, or one channel) of floats
                from 0 to 1.
            ref: not used: the metric needs no reference.
            task_: ``quality``, ``aesthetics`` or ``aesthetic``: see :meth:`OneAlign.score`.
            input_: ``image``; videos are scored by :class:`OneAlign`.

        Returns:
            float32 [N]: a tensor like the one that was given, or an array.

        Raises:
            ConfigError: numbers outside 0 to 1, another shape, or a task that is not known.
            ImageError: an image cannot be used.
        """
        require(input_ == "image", f"input_ {shorten(input_)} is not supported here; OneAlign.score takes videos")
        values = self._model.score(_images(target), task_)
        if not hasattr(target, "new_tensor"):
            return values
        return target.detach().float().new_tensor(values)  # scores have more digits than half precision

    forward = __call__

    def to(self, *_: object, **__: object) -> Metric:
        """This metric: it stays where it was loaded."""
        return self

    cpu = cuda = eval = to


def create_metric(
    metric_name: str,
    as_loss: bool = False,
    device: object = None,
    *,
    bundle: str | os.PathLike[str] | Owl2,
) -> Metric:
    """A metric with pyiqa's interface.

    Args:
        metric_name: ``qalign``; the bundle decides about the weights; ``qalign_8bit`` and ``qalign_4bit`` are the same.
        as_loss: not supported: there are no gradients.
        device: that of :meth:`Owl2.load`; None for the CPU.
        bundle: folder, or a loaded bundle.

    Raises:
        ConfigError: another metric.
        BundleError, BackendError: as :meth:`Owl2.load`.
    """
    require(metric_name in METRICS, f"metric {shorten(metric_name)} is not offered here; use {', '.join(METRICS)}")
    require(not as_loss, "as_loss needs gradients, which this runtime does not have")
    owl = bundle if isinstance(bundle, Owl2) else Owl2.load(bundle, device=CPU if device is None else str(device))
    return Metric(metric_name, owl)


def _images(target: Any) -> list[ImageInput]:  # noqa: ANN401
    """Images of a batch, in 8 bits: what is left over is cut off, as ``to_pil_image`` of torchvision does for pyiqa."""
    if isinstance(target, str | os.PathLike | Image.Image):
        return [target]
    tensor = hasattr(target, "detach") and hasattr(target, "is_floating_point")
    try:
        batch: Any = target.detach() if tensor else np.asarray(target)
        floating = bool(batch.is_floating_point() if tensor else np.issubdtype(batch.dtype, np.floating))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{shorten(target)} is no image: give a path, a Pillow image or N x 3 x H x W floats"
        ) from error
    batch = batch[None] if batch.ndim == 3 else batch
    shaped = batch.ndim == 4 and batch.shape[1] in (1, 3) and 0 not in batch.shape and floating
    require(shaped, f"expected floats N x 3 x H x W, got {batch.dtype} {list(batch.shape)}")
    low, high = float(batch.min()), float(batch.max())
    require(low > -1e-6 and high < 1 + 1e-6, f"expected numbers from 0 to 1, got {low:.4g} to {high:.4g}")
    # In the arithmetic of the type that was given.
    scaled = batch.clip(0, 1) * batch.dtype.type(255) if not tensor else batch.clamp(0, 1).mul(255).byte().cpu().numpy()
    pixels = scaled.astype(np.uint8).transpose(0, 2, 3, 1)
    return [np.ascontiguousarray(one if one.shape[-1] == 3 else np.repeat(one, 3, -1)) for one in pixels]


def _prompt(task: str, input_: str) -> str | None:
    """The original puts any word into its prompt; None for the words of the preset."""
    if (task, input_) == ("aesthetics", "image") or task == "quality" or not isinstance(task, str):
        return None
    return f"USER: How would you rate the {task} of this {input_}?\n<|image|>\nASSISTANT: The {task} of the {input_} is"
