"""The graphs of a bundle in ONNX Runtime, opened as the runtime opens them or with float32 activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from owl2.export.checks.parity import with_float_activations
from owl2.export.job.progress import Reporter
from owl2.export.job.usage import return_memory
from owl2.export.written_bundle import WrittenBundle
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtVision, open_decoder
from owl2.runtime.backends.ort.session import OrtOptions
from owl2.runtime.config import ModelConfig
from owl2.runtime.engine import DecoderEngine, Floats
from owl2.runtime.images import PreparedImage
from owl2.runtime.spec import KvType


def open_bundle_decoder(bundle: WrittenBundle, kv_cache: KvType) -> DecoderEngine:
    """The decoder as the runtime opens it, but without a second copy of weights that are wider than 4 bits."""
    return _open(bundle, bundle.path(spec.DECODER_GRAPHS[kv_cache]), kv_cache, exact=False)


@contextlib.contextmanager
def float_decoder(bundle: WrittenBundle, kv_cache: KvType) -> Iterator[DecoderEngine]:
    """The decoder with float32 activations."""
    with with_float_activations(bundle.path(spec.DECODER_GRAPHS[kv_cache])) as variant:
        yield _open(bundle, variant, None, exact=True)


def _open(bundle: WrittenBundle, path: Path, kv_cache: KvType | None, *, exact: bool) -> DecoderEngine:
    return_memory()
    options = OrtOptions(kv_cache=kv_cache, frugal=bundle.weights.decoder != "int4", exact=exact)
    return open_decoder(path, bundle, options)


def encode_images(
    path: Path, images: Mapping[str, PreparedImage], model: ModelConfig, reporter: Reporter | None = None
) -> dict[str, Floats]:
    """Decoder rows of images by digest, each [queries + 1, C], from the vision graph at ``path``."""
    return _rows(OrtVision(path, model, OrtOptions()), images, reporter)


def encode_images_in_float(path: Path, images: Mapping[str, PreparedImage], model: ModelConfig) -> dict[str, Floats]:
    """The same with float32 activations."""
    with with_float_activations(path) as variant:
        return _rows(OrtVision(variant, model, OrtOptions(frugal=True)), images, None)


def _rows(vision: OrtVision, images: Mapping[str, PreparedImage], reporter: Reporter | None) -> dict[str, Floats]:
    rows = {}
    for digest, image in images.items():
        rows[digest] = vision.encode_images(image.pixels[None])[0]
        if reporter is not None:
            reporter.advance()
    return rows
