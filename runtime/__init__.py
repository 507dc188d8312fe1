"""Runtime of owl2: runs a bundle without torch.

Example::

    from owl2.runtime import Owl2

    owl = Owl2.load("bundle/")
    for chunk in owl.chat().ask("What is in the picture?", images=["a.jpg"]):
        print(chunk.text, end="", flush=True)
"""

from owl2.runtime.answer import Answer
from owl2.runtime.bundle import Bundle, Manifest
from owl2.runtime.errors import (
    BackendError,
    BundleError,
    ConfigError,
    ContextOverflowError,
    ImageError,
    InsufficientMemoryError,
    Owl2Error,
    PromptError,
)
from owl2.runtime.generate import Chunk, Stats
from owl2.runtime.owl import Chat, Owl2
from owl2.runtime.sampling import GenerationConfig
from owl2.runtime.version import __version__

__all__ = [
    "Answer",
    "BackendError",
    "Bundle",
    "BundleError",
    "Chat",
    "Chunk",
    "ConfigError",
    "ContextOverflowError",
    "GenerationConfig",
    "ImageError",
    "InsufficientMemoryError",
    "Manifest",
    "Owl2",
    "Owl2Error",
    "PromptError",
    "Stats",
    "__version__",
]
