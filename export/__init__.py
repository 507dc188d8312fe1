"""Export: from an official PyTorch checkpoint to a bundle."""

from owl2.runtime.version import __version__

__all__ = ["__version__"]
