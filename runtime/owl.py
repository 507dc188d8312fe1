"""The public face: load a bundle, chat about images, read logits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from owl2.runtime.answer import Answer
from owl2.runtime.backends.choose import choose_backend, fitting_context
from owl2.runtime.bundle import Bundle, Manifest, read_manifest
from owl2.runtime.config import IMAGE_TOKEN, ModelConfig, PreprocessMode, resolve_context
from owl2.runtime.engine import Engine, Floats
from owl2.runtime.errors import ContextOverflowError, Owl2Error, PromptError
from owl2.runtime.families.mplug_owl2 import positions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.template import Message, render, with_images
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.fit import plan
from owl2.runtime.generate import Chunk, Model, Run, check_context, generate
from owl2.runtime.images import ImageEncoder, Images, PreparedImage, prepare_images
from owl2.runtime.kv_cache import KvCache
from owl2.runtime.placement import CPU, Placement
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.spec import KvType

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GenerationOptions(TypedDict, total=False):
    """The fields of :class:`GenerationConfig`, as keywords."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]


class Owl2:
    """A loaded bundle.

    Example::

        owl = Owl2.load("bundle/")
        chat = owl.chat()
        for chunk in chat.ask("What is in the picture?", images=["a.jpg"]):
            print(chunk.text, end="", flush=True)
        print(chat.ask("And its colour?").text)
    """

    def __init__(self, bundle: Bundle, engine: Engine, context: int | None = None) -> None:
        """Wrap an engine that runs ``bundle``; :meth:`load` is the usual way.

        Raises:
            ConfigError: the context is not positive or longer than the model's.
        """
        config = bundle.manifest.model
        self.manifest: Manifest = bundle.manifest
        self.config: ModelConfig = config
        self.context = fitting_context(engine, config.decoder, context)
        self._engine = engine
        self._model = Model(
            engine,
            Tokenizer.load(bundle.folder),
            bundle.embeddings(),
            config.decoder.eos_token_id,
            ImageEncoder(engine),
            config.decoder.steady_limit,
        )

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: str = CPU,
        context: int | None = None,
        kv_cache: KvType | None = None,
        check_memory: bool = True,
    ) -> Owl2:
        """Verify and load a bundle.

        Args:
            bundle: folder written by ``owl2-export``.
            threads: of one operator; None lets ONNX Runtime choose.
            device: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``, with ``:N`` for another GPU than the first. The
                CPU never stands in for a GPU: what a GPU cannot run is an error. ``tensorrt`` runs the engines in a
                bundle, and so does ``tensorrt-rtx`` if that is of the dialect onnx.
            context: positions a conversation may take; None for the model's own limit.
            kv_cache: None for the type of the bundle's activations (``fp32`` or ``fp16``), or ``int8`` for less memory
                at a small loss of accuracy, which the bundle's report states.
            check_memory: refuse before anything is loaded if the memory that is free on the device cannot hold the
                weights and the K/V cache: of ``context`` if it is given, or else of the first positions.

        Raises:
            BundleError: the folder is no bundle, or a file is missing, truncated or changed.
            BackendError: the device is not available or a graph cannot be loaded onto it.
            InsufficientMemoryError: it cannot fit; with the figures and what would.
            ConfigError: a setting that cannot work.
        """
        manifest = read_manifest(Path(bundle))
        kind = manifest.kv_type(kv_cache)
        resolve_context(manifest.model.decoder, context)
        # Before gigabytes are hashed.
        place, folder = Placement.parse(device), Path(bundle)
        backend = choose_backend(place, folder, manifest, threads=threads, kv_cache=kv_cache, context=context)
        if check_memory:
            plan.check_memory(manifest, context, kind, place)
        opened = Bundle.open(folder, onnxruntime=backend.onnxruntime)
        return cls(opened, backend.open(opened), context)

    def chat(self) -> Chat:
        """Begin a conversation with its own KV cache."""
        return Chat(self)

    def generate(
        self,
        prompt: str,
        *,
        images: Images = (),
        preprocess: PreprocessMode | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Answer:
        """Continue a raw prompt, no conversation template added.

        Args:
            prompt: text with one ``<|image|>`` per image.
            images: paths, PIL images or uint8 arrays [H, W, 3].
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
            options: fields of :class:`GenerationConfig`.

        Raises:
            PromptError: placeholders and images do not agree.
            ImageError: an image cannot be read.
            ContextOverflowError: the prompt does not fit.
            ConfigError: an option out of its range.
        """
        config = GenerationConfig(**options)
        began = time.perf_counter()
        prepared = self._prepare(images, preprocess)
        seconds = time.perf_counter() - began
        merged = self._prompt(prompt, prepared)
        cache = KvCache(self._engine, self.context)
        check_context(cache, merged)
        return Answer(lambda run: generate(self._model, cache, merged, config, run), preprocess_seconds=seconds)

    def logits(self, prompt: str, *, images: Images = (), preprocess: PreprocessMode | None = None) -> Floats:
        """Logits of every merged position of a raw prompt: float32 [T, V].

        Raises:
            PromptError, ImageError, ContextOverflowError: as :meth:`generate`.
        """
        merged = self._prompt(prompt, self._prepare(images, preprocess))
        count = len(merged.keys)
        if count > self.context:
            raise ContextOverflowError(0, count, self.context, "shorten the prompt or use fewer images")
        rows, _ = self._model.encoder.rows(list(merged.images.values()))
        embeds, modality = positions.embed(merged.keys, self._model.table, rows)
        buffers = self._engine.allocate(count, None)
        return self._engine.prefill(embeds, modality, 0, buffers, np.arange(count, dtype=np.int64))

    def _prepare(self, images: Images, mode: PreprocessMode | None) -> list[PreparedImage]:
        return prepare_images(images, self.config.preprocess, mode)

    def _prompt(self, text: str, images: Sequence[PreparedImage]) -> Prompt:
        return positions.encode_prompt(text, images, self._model.tokenizer, self.config.rows_per_image)


class Chat:
    """A conversation in the official template, with its KV cache kept across turns.

    A question runs only what is new; an earlier image does not go through the vision tower again. One chat is
    not meant for several threads at once.
    """

    def __init__(self, owl: Owl2) -> None:
        """Begin an empty conversation; :meth:`Owl2.chat` is the usual way."""
        self._owl = owl
        self._cache = KvCache(owl._engine, owl.context)
        self._messages: list[Message] = []
        self._images: list[PreparedImage] = []
        self._pending: Answer | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far; an answer that nobody has read yet is generated first, one being read is left alone."""
        if self._pending is not None and self._pending.state == "waiting":
            _ = self._pending.text
        return tuple(self._messages)

    def ask(
        self,
        question: str,
        images: Images = (),
        *,
        preprocess: PreprocessMode | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Answer:
        """Ask, about the images given now or earlier in this chat.

        The answer runs while it is read: iterate over it, or take ``.text``. An answer that was never read is
        generated before the next question. Leaving it half read, or an error, undoes the turn.

        Args:
            question: text; where it holds no ``<|image|>``, the new images are put in front of it.
            images: paths, PIL images or uint8 arrays [H, W, 3].
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
            options: fields of :class:`GenerationConfig`.

        Raises:
            PromptError, ImageError, ContextOverflowError, ConfigError: as :meth:`Owl2.generate`.
        """
        self._settle()
        owl, config = self._owl, GenerationConfig(**options)
        began = time.perf_counter()
        new = owl._prepare(images, preprocess)
        seconds = time.perf_counter() - began
        if not question and not new:
            raise PromptError("the question is empty; give at least one character or image")
        asked = Message("USER", with_images(question, len(new)))
        prepared = [*self._images, *new]
        merged = owl._prompt(render([*self._messages, asked, Message("ASSISTANT")]), prepared)
        check_context(self._cache, merged)

        def finish(text: str) -> None:
            if self._pending is answer:
                # A placeholder that the model wrote itself stands for no image.
                self._messages += [asked, Message("ASSISTANT", text.replace(IMAGE_TOKEN, "<image>"))]
                self._images = prepared

        def start(run: Run) -> Iterator[Chunk]:
            if self._pending is not answer:
                raise Owl2Error("a newer question was asked in this chat; this answer can no longer be generated")
            return generate(owl._model, self._cache, merged, config, run)

        answer = self._pending = Answer(start, finish, preprocess_seconds=seconds)
        return answer

    def reset(self) -> None:
        """Forget the conversation and release its KV cache; an answer that is being read ends."""
        if self._pending is not None:
            self._pending.cancel()
        self._pending = None
        self._messages.clear()
        self._images = []
        self._cache.clear()

    def _settle(self) -> None:
        """Generate an answer nobody has read; drop one that was left half read."""
        if self._pending is not None and self._pending.state == "waiting":
            _ = self._pending.text
        elif self._pending is not None:
            self._pending.cancel()
        self._pending = None
