"""Everything this project raises on purpose.

::

    Owl2Error
    ├── ConfigError (ValueError)        a setting or a config.json that cannot work
    ├── BusyError                       a chat that another thread is using
    ├── CheckpointError                 the PyTorch checkpoint is incomplete, misshaped or unreadable
    ├── CalibrationError                the calibration data cannot serve its purpose
    ├── DataError (ValueError)          evaluation data that cannot be used
    ├── ReferenceModelError             the model to compare with is not available or does not match
    ├── QuantizationError               the numerics of quantizing failed
    ├── ExportError                     a bundle could not be written
    │   └── ParityError                 an exported graph does not compute what torch computes
    ├── BundleError                     the folder is not a usable bundle
    │   ├── BundleVersionError          written in a format this version does not read
    │   └── BundleCorruptError          a file is missing, truncated or changed
    ├── BackendError                    the backend failed
    │   ├── BackendUnavailableError     the device asked for is not available here
    │   └── InsufficientMemoryError     the model does not fit the free memory
    ├── ImageError (ValueError)         an image that cannot be read or is too large
    ├── PromptError (ValueError)        a prompt or message that cannot be used
    ├── SavedChatError                  a saved conversation that is damaged or of another bundle
    └── ContextOverflowError            the conversation does not fit the context

Owl2Warning (UserWarning) is not an error: everything works for now.

A message says what was given, what was expected and what to do. Every error can be pickled, so that a worker process
can raise it.
"""

from __future__ import annotations

from collections.abc import Sequence

from owl2.runtime.harmless import harmless_message


class Owl2Error(Exception):
    """Base of all errors that a user can act on; the commands print it as one line.

    Its text has no control characters, whatever the file or the argument that it quotes.
    """

    def __str__(self) -> str:
        return harmless_message(super().__str__())


class Owl2Warning(UserWarning):
    """Everything works for now, but not for sure; the commands print it as one line."""


class ConfigError(Owl2Error, ValueError):
    """A setting or a config.json that cannot work."""


class BusyError(Owl2Error):
    """Another thread is using this chat."""


class CheckpointError(Owl2Error):
    """The PyTorch checkpoint is incomplete, misshaped or unreadable."""


class CalibrationError(Owl2Error):
    """The calibration data cannot serve its purpose."""


class DataError(Owl2Error, ValueError):
    """Evaluation data that cannot be used; the message names every line at fault."""


class ReferenceModelError(Owl2Error):
    """The model to compare a bundle with is not available or does not match it."""


class QuantizationError(Owl2Error):
    """The numerics of quantizing failed."""


class ExportError(Owl2Error):
    """A bundle could not be written."""


class ParityError(ExportError):
    """An exported graph does not compute what the torch model computes."""


class BundleError(Owl2Error):
    """The folder is not a usable bundle."""


class BundleVersionError(BundleError):
    """The bundle is written in a format this version does not read."""


class BundleCorruptError(BundleError):
    """A file of the bundle is missing, truncated or changed."""


class BackendError(Owl2Error):
    """The backend failed while running a graph."""


class BackendUnavailableError(BackendError):
    """The device asked for is not available on this machine."""


class InsufficientMemoryError(BackendError):
    """The model does not fit the free memory; raised before anything is loaded.

    Attributes:
        needed: bytes it takes at least.
        available: bytes that are free.
    """

    def __init__(self, needed: int, available: int, details: Sequence[str], hints: Sequence[str], command: str) -> None:
        super().__init__(needed, available, details, hints, command)
        self.needed, self.available = needed, available
        self._details, self._hints, self._command = details, hints, command

    def __str__(self) -> str:
        return (
            f"not enough memory: the model needs at least {self.needed / 2**30:.2f} GiB ({', '.join(self._details)}), "
            f"{self.available / 2**30:.2f} GiB are available; to make it fit: {'; or '.join(self._hints)}; "
            f"see {self._command}, or load regardless with --no-memory-check (check_memory=False)"
        )


class ImageError(Owl2Error, ValueError):
    """An image that cannot be read or is too large."""


class PromptError(Owl2Error, ValueError):
    """A prompt or message that cannot be used."""


class SavedChatError(Owl2Error):
    """A saved conversation is damaged, or of another bundle."""


class ContextOverflowError(Owl2Error):
    """The conversation does not fit the context.

    Attributes:
        used: positions already in the KV cache.
        requested: positions this step would add.
        context: positions the context holds.
    """

    def __init__(self, used: int, requested: int, context: int, hint: str) -> None:
        super().__init__(used, requested, context, hint)
        self.used, self.requested, self.context, self._hint = used, requested, context, hint

    def __str__(self) -> str:
        return (
            f"the context holds {self.context} positions: {self.used} are in use and {self.requested} more are needed; "
            f"{self._hint}"
        )
