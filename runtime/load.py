"""Opening a bundle: the one way for every caller."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from owl2.runtime import spec
from owl2.runtime.backends.choose import OpenEngine, find_backend, resolve_options
from owl2.runtime.bundle import Bundle, Manifest, check_files, fingerprint, read_manifest, require_whole
from owl2.runtime.config import ModelConfig, require, resolve_context
from owl2.runtime.encoded import EncodedImage
from owl2.runtime.engine import Engine, EngineOptions
from owl2.runtime.errors import BundleCorruptError, ConfigError, ContextOverflowError, ImageError, PromptError
from owl2.runtime.families.mplug_owl2 import positions
from owl2.runtime.families.mplug_owl2.positions import Prompt
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.foreign import listed
from owl2.runtime.grammar import GrammarCompiler
from owl2.runtime.image_files import ImageInput
from owl2.runtime.images import ImageEncoder, Images, PreparedImage, prepare_images
from owl2.runtime.kv_cache import GROWTH, KvCache
from owl2.runtime.lookup import LookupAccount
from owl2.runtime.preprocess import ImageReading, check_mode
from owl2.runtime.token_table import TokenTable
from owl2.runtime.verification import LoadProgress, OnProgress, Signature, signatures_of

VISION_FILES = (spec.VISION_GRAPH, f"{spec.VISION_GRAPH}.data")


@dataclass(frozen=True)
class Loaded:
    """A loaded model: everything that a generation works with.

    Attributes:
        name: for people: the folder it was loaded from.
        config: architecture and image preprocessing.
        engine: runs the graphs.
        tokenizer: text to ids and back.
        table: token embeddings [V, C].
        encoder: images to decoder rows.
        context: positions that a conversation may take.
        fingerprint: tells bundles with other weights apart.
        vision: the same of the tower and abstractor alone.
        lookup: what prompt lookup has saved and cost so far.
    """

    name: str
    config: ModelConfig
    engine: Engine
    tokenizer: Tokenizer
    table: TokenTable
    encoder: ImageEncoder
    context: int
    fingerprint: str
    vision: str
    lookup: LookupAccount = field(default_factory=LookupAccount)
    _caches: weakref.WeakSet[KvCache] = field(default_factory=weakref.WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those that the checkpoint lists, and the separator of the conversation."""
        return frozenset((*self.config.decoder.eos_token_ids, self.tokenizer.eos_id))

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        """Makes grammars for the tokenizer; raises ConfigError if llguidance is not installed."""
        tokenizer = self.tokenizer
        return GrammarCompiler(
            tuple(map(tokenizer.surface_bytes, range(self.config.decoder.vocab_size))),
            tuple(sorted({*tokenizer.special_ids, *self.end_ids})),
            tokenizer.eos_id,
        )

    def prepare(
        self, images: Images, mode: str | None = None, reading: ImageReading | None = None
    ) -> list[PreparedImage]:
        """Load and preprocess images; raises as :func:`prepare_images`, and ImageError for rows of another tower."""
        prepared = prepare_images(images, self.config.preprocess, mode, reading)
        for image in prepared:
            if image.encoded is not None:
                self._check_encoded(image.encoded)
        return prepared

    def _check_encoded(self, image: EncodedImage) -> None:
        if image.vision != self.vision:
            raise ImageError(
                "the image was encoded with another vision tower; encode it with this bundle, or give the file"
            )
        expected = (self.config.rows_per_image, self.config.decoder.hidden_size)
        if image.rows.shape != expected:
            raise ImageError(f"the encoded image has rows of shape {list(image.rows.shape)}, expected {list(expected)}")

    def encode_image(
        self, image: ImageInput, mode: str | None = None, reading: ImageReading | None = None
    ) -> EncodedImage:
        """Decoder rows of one image; raises as :meth:`prepare`."""
        [prepared] = self.prepare([image], mode, reading)
        rows = self.encoder.rows([prepared])[0][prepared.digest]
        rounded = rows.astype(np.float16).astype(np.float32)
        return EncodedImage(rounded, prepared.digest, self.vision, prepared.record)

    def encode(self, text: str, images: Sequence[PreparedImage]) -> Prompt:
        """Tokenize a prompt and put its images' rows in place.

        Raises:
            PromptError: it is not a text or empty, or placeholders and images do not agree.
            ContextOverflowError: so long a text cannot fit, whatever it says; it is not tokenized.
        """
        if not isinstance(text, str):
            raise PromptError(f"a prompt must be a text, got {type(text).__name__}")
        if len(text) > self.context and (least := len(text) // self.tokenizer.longest) > self.context:
            raise ContextOverflowError(0, least, self.context, f"shorten the prompt, which has {len(text)} characters")
        return positions.encode_prompt(text, images, self.tokenizer, self.config.rows_per_image)

    def new_cache(self, growth: int = GROWTH) -> KvCache:
        """An empty KV cache for one conversation, which grows in steps of so many positions."""
        cache = KvCache(self.engine, self.context, growth)
        with self._lock:
            self._caches.add(cache)
        return cache

    def close(self) -> None:
        """Give all memory back, that of every KV cache included; later steps raise BackendError."""
        self.engine.close()
        self.table.close()
        self.encoder.clear()
        with self._lock:
            for cache in self._caches:
                cache.clear()


@dataclass(frozen=True)
class Preparation:
    """A bundle that the device can run; none of its large files has been read yet.

    Attributes:
        folder, manifest: what was asked for.
        options: the same, with backend and type of the K/V cache decided.
        open_engine: loads the graphs.
        signatures: of the files, before they are verified.
    """

    folder: Path
    manifest: Manifest
    options: EngineOptions
    open_engine: OpenEngine
    signatures: Mapping[str, Signature]

    @classmethod
    def of(cls, folder: Path, options: EngineOptions, *, check_memory: bool = True) -> Preparation:
        """Check everything that takes no time.

        Raises:
            BundleError: the folder is not a bundle, or has no engines for the device.
            BackendError: the device is not available or cannot run the bundle.
            InsufficientMemoryError: the model cannot fit.
            ConfigError: a setting that cannot work.
        """
        from owl2.runtime.fit.plan import check_memory as check

        manifest = read_manifest(folder)
        options = resolve_options(manifest, options)
        resolve_context(manifest.model.decoder, options.context)
        try:
            check_mode(manifest.model.preprocess.mode)
        except ConfigError as error:
            raise BundleCorruptError(f"{folder / spec.MANIFEST}: {error}") from error
        open_engine = find_backend(options.device, manifest.dialect, options.backend)(folder, manifest, options)
        if check_memory:
            kv_type = options.kv_cache or manifest.activations
            check(manifest, options.context, kv_type, options.device, backend=options.backend)
        return cls(folder, manifest, options, open_engine, signatures_of(folder, manifest.files))

    def problems(self, *, force: bool = False, on_progress: OnProgress | None = None) -> list[str]:
        """Verify every file; one sentence per problem."""
        return check_files(self.folder, self.manifest, force=force, on_progress=on_progress)

    def open(self, *, on_progress: OnProgress | None = None) -> tuple[Bundle, Loaded]:
        """Load a bundle without problems.

        Raises:
            BackendError: a graph cannot be loaded onto the device.
            BundleError: the tokenizer's files cannot be used, or are another model's.
            BundleCorruptError: a file was changed since :meth:`of`.
        """
        bundle, model = Bundle(self.folder, self.manifest), self.manifest.model
        if on_progress is not None:
            on_progress(LoadProgress("loading", 0, 1))
        tokenizer = Tokenizer.load(self.folder)
        tokenizer.require_fit(model.decoder, self.folder)
        with contextlib.ExitStack() as on_error:
            engine = self.open_engine(bundle)
            on_error.callback(engine.close)
            table = bundle.token_table()
            on_error.callback(table.close)
            self._require_unchanged()
            context = self._context(engine)
            on_error.pop_all()
        if on_progress is not None:
            on_progress(LoadProgress("loading", 1, 1))
        vision = fingerprint(self.manifest, VISION_FILES)
        return bundle, Loaded(
            str(self.folder),
            model,
            engine,
            tokenizer,
            table,
            ImageEncoder(engine),
            context,
            fingerprint(self.manifest),
            vision,
        )

    def _require_unchanged(self) -> None:
        """Refuse files that another program changed between their verification and their opening."""
        now = signatures_of(self.folder, self.manifest.files)
        changed = [name for name, signature in self.signatures.items() if now[name] != signature]
        if changed:
            raise BundleCorruptError(
                f"{self.folder}: {listed(changed)} changed while the bundle was loaded; load it again"
            )

    def _context(self, engine: Engine) -> int:
        context = resolve_context(self.manifest.model.decoder, self.options.context)
        if engine.context is None:
            return context
        require(
            self.options.context is None or context <= engine.context,
            f"context {context} exceeds the {engine.context} positions that the engine holds; choose a smaller one",
        )
        return min(context, engine.context)


def open_bundle(
    folder: Path,
    options: EngineOptions,
    *,
    check_memory: bool = True,
    verify: bool = False,
    on_progress: OnProgress | None = None,
) -> tuple[Bundle, Loaded]:
    """Check, verify and load a bundle, in this order: what fails at once is told before gigabytes are hashed.

    Args:
        folder: written by ``owl2-export``.
        options: device, threads, K/V cache, context.
        check_memory: refuse a model that cannot fit the device's free memory.
        verify: hash files again that have not changed since they were last verified.
        on_progress: told how far hashing and loading have come.

    Raises:
        BundleError, BackendError, InsufficientMemoryError, ConfigError: as :meth:`Preparation.of` and
            :meth:`Preparation.open`; BundleCorruptError names every file that is missing, truncated or changed.
    """
    prepared = Preparation.of(folder, options, check_memory=check_memory)
    require_whole(folder, prepared.problems(force=verify, on_progress=on_progress))
    return prepared.open(on_progress=on_progress)
