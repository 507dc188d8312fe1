"""A model that is measured: a bundle, or something that answers as an engine does, such as a checkpoint in torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
from PIL import Image

from owl2.runtime import spec
from owl2.runtime.config import ModelConfig
from owl2.runtime.engine import PREFILL_BLOCK, Floats, Ints
from owl2.runtime.errors import BackendError, BundleError, ReferenceModelError
from owl2.runtime.families.mplug_owl2 import positions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.template import Message, render
from owl2.runtime.generate import generate, prompt_logits
from owl2.runtime.images import PreparedImage, prepare_images
from owl2.runtime.kv_cache import KvCache
from owl2.runtime.load import Loaded
from owl2.runtime.owl import Owl2
from owl2.runtime.placement import CPU
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.stream import AnswerStream

REFERENCES = "owl2.references"
"""Entry points that open other things than bundles: functions (folder) -> (:class:`Model`, :class:`ModelConfig`)."""

CHECKPOINT = "checkpoint"


@dataclass(eq=False)
class Subject:
    """A loaded model with one KV cache that its prompts share.

    Attributes:
        name: for people.
        model, config: what runs.
        context: positions a prompt may take.
        preprocess: how images are squared; None for the model's own mode.
        cache: of the prompt at hand.
    """

    name: str
    model: Loaded
    config: ModelConfig
    context: int
    preprocess: str | None = None
    cache: KvCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = KvCache(self.model.engine, self.context)

    @classmethod
    def of(cls, owl: Owl2, name: str, preprocess: str | None = None) -> Subject:
        """A loaded bundle."""
        return cls(name, owl.model, owl.config, owl.context, preprocess)

    def open(self, images: Sequence[Image.Image]) -> list[PreparedImage]:
        """Preprocess images as this model wants them."""
        return prepare_images(images, self.config.preprocess, self.preprocess)

    def encode(self, messages: Sequence[Message], images: Sequence[PreparedImage]) -> Prompt:
        """Merged positions of a conversation, or of its beginning.

        Args:
            messages: with at most one ``<|image|>`` per image.
            images: of the whole conversation, in order.
        """
        ids = self.model.tokenizer.encode_prompt(render(messages))
        digests = [image.digest for image in images]
        return Prompt(positions.merge(ids, digests, self.config.rows_per_image), dict(zip(digests, images)))

    def windows(self, text: str) -> list[Prompt]:
        """Plain text in windows that fill the context, each behind a start-of-sequence token."""
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode(text, parse_special=False)
        step = max(self.context - 1, 1)
        return [Prompt([tokenizer.bos_id, *ids[i : i + step]], {}) for i in range(0, len(ids), step)]

    def logit_blocks(self, prompt: Prompt, first: int = 0) -> Iterator[tuple[int, Floats]]:
        """Logits of the positions from ``first`` on, in blocks of bounded size.

        What the cache holds of the positions before ``first`` is reused; it ends up holding the prompt.

        Yields:
            The position of a block's first row, and its logits [R, V].

        Raises:
            BackendError: a logit is NaN or infinite.
        """
        for position, logits in prompt_logits(self.model, self.cache, prompt, first):
            if not np.isfinite(logits).all():
                raise BackendError(
                    f"{self.name}: logits are NaN or infinite: the model's arithmetic overflowed; "
                    "use another device or a bundle of higher precision"
                )
            for i in range(0, len(logits), PREFILL_BLOCK):
                yield position + i, logits[i : i + PREFILL_BLOCK]

    def answer(self, prompt: Prompt, max_new_tokens: int) -> tuple[str, str]:
        """The greedy answer to a prompt, and why it ended; the cache's share of the prompt is reused."""
        config = GenerationConfig(max_new_tokens=max_new_tokens)
        cancelled = threading.Event()
        chunks = generate(self.model, self.cache, prompt, config, cancelled)
        answer = AnswerStream(chunks, cancelled, threading.Lock(), lambda _: None).read()
        return answer.text, answer.finish_reason


def modality_of(prompt: Prompt) -> Ints:
    """int64 [T], 1 at image rows."""
    return np.array([isinstance(key, tuple) for key in prompt.keys], dtype=np.int64)


def open_reference(
    path: Path, subject: Subject, *, threads: int | None = None, device: str = CPU, check_memory: bool = True
) -> Subject:
    """Open what ``subject`` is to be compared with: another bundle, or an official checkpoint.

    A checkpoint runs in torch, which ``pip install 'owl2[export]'`` brings; nothing of it is imported before.

    Args:
        path: folder of the one or the other.
        subject: gives the context and how images are squared.
        threads, device, check_memory: of another bundle, as in :meth:`Owl2.load`; it gets the subject's context too.

    Raises:
        ReferenceModelError: torch is not installed, or it is a model of other shape.
        BundleError, BackendError, CheckpointError, ConfigError: it is neither, or cannot be loaded.
    """
    if is_bundle(path):
        owl = Owl2.load(path, threads=threads, device=device, context=subject.context, check_memory=check_memory)
        model, config = owl.model, owl.config
    else:
        model, config = _open_checkpoint(path)
    ours, theirs = subject.config, config
    for what, one, other in (
        ("tokens", ours.decoder.vocab_size, theirs.decoder.vocab_size),
        ("positions per image", ours.rows_per_image, theirs.rows_per_image),
    ):
        if one != other:
            raise ReferenceModelError(
                f"{path} has {other} {what}, {subject.name} has {one}: these are different models, and their "
                "distributions cannot be compared"
            )
    return Subject(str(path), model, config, subject.context, subject.preprocess)


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, or else an official checkpoint.

    Raises:
        BundleError: it is neither.
    """
    if (path / spec.MANIFEST).is_file():
        return True
    if (path / "config.json").is_file():
        return False
    raise BundleError(f"{path} is neither a bundle ({spec.MANIFEST}) nor an official checkpoint (config.json)")


def _open_checkpoint(path: Path) -> tuple[Loaded, ModelConfig]:
    found = entry_points(group=REFERENCES, name=CHECKPOINT)
    hint = "to compare with a checkpoint, pip install 'owl2[export]'; another bundle can be compared without it"
    if not found:
        raise ReferenceModelError(f"{path} is a checkpoint, and this installation cannot run one: {hint}")
    try:
        opener = next(iter(found)).load()
    except ImportError as error:
        raise ReferenceModelError(f"{path} is a checkpoint, which needs torch: {error}; {hint}") from error
    model, config = opener(path)
    return model, config
