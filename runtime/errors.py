"""Everything this project raises on purpose.

::

    Owl2Error
    ├── ConfigError (ValueError)        a setting or a config.json that cannot work
    ├── CheckpointError                 the PyTorch checkpoint is incomplete, misshaped or unreadable
    ├── CalibrationError                the calibration data cannot serve its purpose
    ├── DataError (ValueError)          data to measure a bundle on that cannot be used
    ├── ReferenceModelError             what a bundle is to be compared with cannot be had, or is no match
    ├── QuantizationError               the numerics of quantizing failed
    ├── ExportError                     a bundle could not be written
    │   └── ParityError                 an exported graph does not compute what torch computes
    ├── BundleError                     the bundle folder is unusable
    │   ├── BundleVersionError          written in a format this version does not know
    │   └── BundleCorruptError          a file is missing, truncated or changed
    ├── BackendError                    the execution provider failed
    │   ├── BackendUnavailableError     the provider asked for cannot be had here
    │   └── InsufficientMemoryError     the model does not fit the memory that is free
    ├── ImageError (ValueError)         an image that cannot be read or is too large
    ├── PromptError (ValueError)        prompt and images do not fit together
    └── ContextOverflowError            the conversation does not fit the context

One thing is no error: Owl2Warning (UserWarning), on a state in which everything works for now.

A message says what was given, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class Owl2Error(Exception):
    """Base of all errors that a user can act on; the commands print it as one line."""


class Owl2Warning(UserWarning):
    """A state in which everything works for now; the commands print it as one line."""


class ConfigError(Owl2Error, ValueError):
    """A setting or a config.json that cannot work."""


class CheckpointError(Owl2Error):
    """The PyTorch checkpoint is incomplete, misshaped or unreadable."""


class CalibrationError(Owl2Error):
    """The calibration data cannot serve its purpose."""


class DataError(Owl2Error, ValueError):
    """Data to measure a bundle on that cannot be used; every line at fault is named."""


class ReferenceModelError(Owl2Error):
    """What a bundle is to be compared with cannot be had, or is no match for it."""


class QuantizationError(Owl2Error):
    """The numerics of quantizing failed."""


class ExportError(Owl2Error):
    """A bundle could not be written."""


class ParityError(ExportError):
    """An exported graph does not compute what the torch model computes."""


class BundleError(Owl2Error):
    """The bundle folder is unusable."""


class BundleVersionError(BundleError):
    """The bundle is written in a format this version does not know."""


class BundleCorruptError(BundleError):
    """A file of the bundle is missing, truncated or changed."""


class BackendError(Owl2Error):
    """The execution provider failed while running a graph."""


class BackendUnavailableError(BackendError):
    """The execution provider asked for cannot be had on this machine."""


class InsufficientMemoryError(BackendError):
    """The model does not fit the memory that is free; raised before anything of it is loaded.

    Attributes:
        needed: bytes it takes at least.
        available: bytes that are free.
    """

    def __init__(self, needed: int, available: int, details: Sequence[str], hints: Sequence[str], command: str) -> None:
        super().__init__(
            f"not enough memory: at least {needed / 2**30:.2f} GiB are needed ({', '.join(details)}), "
            f"{available / 2**30:.2f} GiB are available; what would fit: {'; or '.join(hints)}; {command} tells "
            "more, and --no-memory-check (check_memory=False) loads regardless"
        )
        self.needed = needed
        self.available = available


class ImageError(Owl2Error, ValueError):
    """An image that cannot be read or is too large."""


class PromptError(Owl2Error, ValueError):
    """Prompt and images do not fit together."""


class ContextOverflowError(Owl2Error):
    """The conversation does not fit the context.

    Attributes:
        used: positions already in the KV cache.
        requested: positions this step would add.
        context: positions the context holds.
    """

    def __init__(self, used: int, requested: int, context: int, hint: str) -> None:
        super().__init__(
            f"the context holds {context} positions: {used} are used and {requested} more were asked for; {hint}"
        )
        self.used = used
        self.requested = requested
        self.context = context
