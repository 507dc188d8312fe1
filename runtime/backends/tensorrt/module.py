"""The Python module of TensorRT, ``tensorrt`` or ``tensorrt_rtx``: importing it, and the messages of its logger.

``tensorrt`` (on a Jetson or a server) and ``tensorrt_rtx`` (elsewhere) have the same interface. Neither has types.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.placement import EngineKind

MODULES: dict[EngineKind, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL_HINTS: dict[EngineKind, str] = {
    "tensorrt": "on a Jetson it comes with JetPack, for the system's Python: make the virtual environment with "
    "python3 -m venv --system-site-packages; on other machines install NVIDIA's TensorRT",
    "tensorrt-rtx": "install it: pip install tensorrt-rtx",
}
MAX_MESSAGES = 5
"""Messages of TensorRT in one error."""

log = logging.getLogger(__name__)


def import_tensorrt(kind: EngineKind) -> ModuleType:
    """The module that builds and runs engines of ``kind``.

    Raises:
        BackendUnavailableError: it is not installed, or one of its libraries does not load.
    """
    name = MODULES[kind]
    try:
        return importlib.import_module(name)
    except Exception as error:  # its libraries are loaded here, and fail in their own ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        problem = "is not installed" if missing else f"cannot be imported ({error})"
        raise BackendUnavailableError(f"the Python module {name} {problem}; {INSTALL_HINTS[kind]}") from error


class Messages:
    """The errors that TensorRT has logged: its calls return no reasons."""

    def __init__(self) -> None:
        self._errors: list[str] = []

    def logger(self, trt: ModuleType) -> Any:  # noqa: ANN401 - TensorRT has no types
        """An ``ILogger`` that adds to these messages; warnings go to :mod:`logging`."""
        serious, warning = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR), trt.ILogger.WARNING

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self, messages: Messages) -> None:
                trt.ILogger.__init__(self)
                self._messages = messages

            def log(self, severity: object, message: str) -> None:
                if severity in serious:
                    self._messages.add(message)
                elif severity == warning:
                    log.debug("TensorRT: %s", message)

        return Logger(self)

    def add(self, message: str) -> None:
        """Keep an error's message."""
        self._errors.append(message)

    def clear(self) -> None:
        """Forget all messages; called before a call of TensorRT, so that older ones are not its reasons."""
        self._errors.clear()

    def take(self) -> str:
        """All messages on one line; they are forgotten."""
        text = one_line(self._errors)
        self._errors.clear()
        return text


def one_line(messages: Sequence[str]) -> str:
    """Messages of TensorRT on one line, each once."""
    lines = list(dict.fromkeys(" ".join(message.split()) for message in messages)) or ["TensorRT gave no reason"]
    more = f" (and {len(lines) - MAX_MESSAGES} more)" if len(lines) > MAX_MESSAGES else ""
    return "; ".join(lines[:MAX_MESSAGES]) + more
