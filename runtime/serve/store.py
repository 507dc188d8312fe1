"""Conversations and pictures of the page, in a folder; every file is written as a whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl2.runtime.foreign import ForeignError, read_json
from owl2.runtime.serve.requests import RequestError
from owl2.runtime.stored import partial_of, write_whole

NAME = re.compile(r"[0-9a-f]{16,64}")
TITLE = 80
LARGEST = 64 << 20
"""Bytes of a conversation's file."""
KEPT_SECONDS = 24 * 3600
"""A picture may be of a question that is still being written."""
LEFT_SECONDS = 3600
NEW = "new"
"""Tag of a conversation that is not there yet."""
WRITING = threading.Lock()
PRIVATE_FOLDER = 0o700
CONVERSATIONS, PICTURES = "conversations", "pictures"


@dataclass(frozen=True)
class Store:
    """What the page keeps.

    Attributes:
        folder: that is this user's alone.
    """

    folder: Path

    def prepare(self) -> None:
        """Make the folders; raises OSError."""
        for name in (CONVERSATIONS, PICTURES):
            folder = self.folder / name
            folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
            for path in folder.glob(partial_of("*")):  # of a server that was killed, and not of one that is writing
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                        path.unlink()

    def listed(self) -> list[dict[str, Any]]:
        """Id, title and time of every conversation, the newest first; damaged ones are named as such."""
        found = []
        for path in (self.folder / CONVERSATIONS).glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if NAME.fullmatch(path.stem):
                    found.append({"id": path.stem, "title": self._title(path), "updated": path.stat().st_mtime})
        return sorted(found, key=lambda entry: -float(str(entry["updated"])))

    def read(self, name: str) -> tuple[dict[str, Any], str]:
        """A conversation as the page gave it, and the tag of this state; raises RequestError."""
        path = self._conversation(name)
        try:
            data, tag = read_json(path, LARGEST), _tag(path)
        except FileNotFoundError:
            raise RequestError("there is no such conversation", status=404) from None
        except (ForeignError, OSError) as error:
            raise RequestError(f"the conversation cannot be read: {error}", status=500) from error
        return (data if isinstance(data, dict) else {}), tag

    def write(self, name: str, data: object, expected: str | None = None) -> str:
        """Keep a conversation: ``{"messages": [...]}``; returns the tag of this state.

        Args:
            name: of it.
            data: what is kept.
            expected: tag of the state that this one continues, :data:`NEW` for none; None to replace whatever is there.

        Raises:
            RequestError: it makes no sense, or another tab was quicker.
            OSError: it cannot be written.
        """
        path = self._conversation(name)
        match data:
            case {"messages": list()}:
                content = json.dumps(data, ensure_ascii=False).encode()
            case _:
                raise RequestError("a conversation must be an object with messages")
        with WRITING:
            if expected is not None and expected != _tag(path):
                raise RequestError("the conversation was changed or deleted elsewhere", status=412)
            write_whole(path, [content])
        return hashlib.sha256(content).hexdigest()

    def delete(self, name: str) -> None:
        """Forget a conversation; its pictures stay for others that show them until :meth:`sweep`."""
        self._conversation(name).unlink(missing_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Delete pictures that no conversation shows any more, and that were not sent in the last day."""
        shown = set()
        for path in (self.folder / CONVERSATIONS).glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                shown.update(re.findall(r"[0-9a-f]{64}", path.read_text(encoding="utf-8", errors="replace")))
        for path in (self.folder / PICTURES).iterdir():
            with contextlib.suppress(FileNotFoundError):  # another request was quicker
                if path.name not in shown and time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()

    def add_picture(self, content: bytes) -> str:
        """Keep a picture's file; returns its id, the same for the same content."""
        name = hashlib.sha256(content).hexdigest()
        path = self.picture(name)
        try:
            os.utime(path)  # it is shown again
        except FileNotFoundError:
            write_whole(path, [content])
        return name

    def picture(self, name: str) -> Path:
        """Path of a picture; raises RequestError for what cannot be an id."""
        if not re.fullmatch(r"[0-9a-f]{64}", name):
            raise RequestError("that is not the id of a picture", status=404)
        return self.folder / PICTURES / name

    def _conversation(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise RequestError("that is not the id of a conversation", status=404)
        return self.folder / CONVERSATIONS / f"{name}.json"

    def _title(self, path: Path) -> str:
        try:
            data = read_json(path, LARGEST)
        except (ForeignError, OSError):
            return "(damaged)"
        match data:
            case {"messages": [{"text": str(text)}, *_]}:
                return text[:TITLE] or "(an image)"
        return "(empty)"


def _tag(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return NEW
