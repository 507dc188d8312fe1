"""A conversation, with its KV cache kept across turns."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import Owl2Error, PromptError
from owl2.runtime.families.mplug_owl2.template import with_images
from owl2.runtime.generate import Answer, check_context
from owl2.runtime.images import UNREAD, Images, as_list
from owl2.runtime.load import Loaded
from owl2.runtime.messages import ChatMessage, Turn, image_part, read_turns, render_turns
from owl2.runtime.preprocess import ImageReading
from owl2.runtime.sampling import GenerationConfig, GenerationOptions, merge_options
from owl2.runtime.saved_chat import load_chat, save_chat
from owl2.runtime.stream import AnswerStream, stream_answer

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack


class Chat:
    """A conversation in the official template, with its KV cache kept across turns.

    A question runs only what is new; an earlier image does not go through the vision tower again. Different chats of
    one model may run in different threads; one chat may not, and says so with a :class:`BusyError`.
    """

    def __init__(self, model: Loaded, messages: Sequence[ChatMessage] = ()) -> None:
        """Begin a conversation; :meth:`Owl2.chat` is the usual way.

        Args:
            model: answers.
            messages: the conversation so far, user and assistant in turn.

        Raises:
            PromptError, ImageError: a message or an image in it cannot be used.
        """
        self._model = model
        self._cache = model.new_cache()
        self._lock = threading.Lock()
        self._stream: Callable[[], AnswerStream | None] = lambda: None  # a weak reference, once there is one
        self._turns = read_turns(model, messages)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The finished turns, as :meth:`Owl2.chat` takes them."""
        return [message for turn in self._turns for message in turn.messages()]

    def ask(
        self,
        question: str,
        images: Images = None,
        *,
        preprocess: str | None = None,
        reading: ImageReading | None = None,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Answer:
        """Ask, about the images given now or earlier in this chat, and wait for the whole answer.

        An error, or Ctrl-C before the answer is complete, undoes the turn.

        Args:
            question: text; where it holds no ``<|image|>``, the new images are put in front of it.
            images: one or several: paths, ``data:`` URIs, bytes of files, open binary files, PIL images or uint8
                arrays [H, W, 3].
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
            reading: what to make of EXIF orientation and transparency.
            config: how to generate.
            options: fields of :class:`GenerationConfig`, which take precedence over ``config``.

        Raises:
            PromptError: question and images do not agree.
            ImageError: an image cannot be read.
            ContextOverflowError: the conversation does not fit the context.
            ConfigError: an option that is not known or outside its range.
            BusyError: another thread is using this chat.
            BackendError: a step failed.
        """
        return self.stream(question, images, preprocess=preprocess, reading=reading, config=config, **options).read()

    def stream(
        self,
        question: str,
        images: Images = None,
        *,
        preprocess: str | None = None,
        reading: ImageReading | None = None,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AnswerStream:
        """Ask as :meth:`ask`, and get the answer as it is generated.

        The turn counts once the last chunk has been read; before that, another question undoes it.
        """
        settings = merge_options(config, options)
        self._check_own()
        with self._lock:
            self._check_own()  # another thread may have come first
            sources = as_list(images)
            if not isinstance(question, str):
                raise PromptError(f"a question must be a text, got {type(question).__name__}")
            if not question and not sources:
                raise PromptError("the question is empty; give at least one character or image")
            asked = with_images(question, len(sources))
            conversation = render_turns(self._turns, asked)
            earlier = [image for turn in self._turns for image in turn.images]
            # Before an image is decoded: it may take long.
            check_context(self._cache, self._model.encode(conversation, earlier + [UNREAD] * len(sources)))
            began = time.perf_counter()
            prepared = self._model.prepare(sources, preprocess, reading)
            seconds = time.perf_counter() - began
            prompt = self._model.encode(conversation, earlier + prepared)
            parts = tuple(image_part(source, preprocess, reading) for source in sources)

            def finish(answer: Answer) -> None:
                # A placeholder that the model wrote itself stands for no image.
                text = answer.text.replace(IMAGE_TOKEN, "<image>")
                self._turns.append(Turn(asked, parts, tuple(prepared), text))

            stream = stream_answer(
                self._model,
                self._cache,
                prompt,
                settings,
                preprocess_seconds=seconds,
                lock=self._lock,
                finish=finish,
            )
            self._stream = weakref.ref(stream)
            return stream

    def undo(self) -> None:
        """Take the last question and its answer back.

        Raises:
            Owl2Error: there is no turn.
            BusyError: another thread is using this chat.
        """
        self._check_own()
        with self._lock:
            self._check_own()
            if not self._turns:
                raise Owl2Error("the conversation has no turn to undo")
            self._cache.claim()
            self._turns.pop()

    def fork(self) -> Chat:
        """A second conversation that begins as this one; the KV cache is copied, so nothing runs again.

        Raises:
            BusyError: another thread is using this chat.
        """
        self._check_own()
        with self._lock:
            self._check_own()
            other = Chat(self._model)
            other._turns = list(self._turns)
            self._cache.copy_to(other._cache)
            return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the finished turns with their images and the KV cache; :meth:`Owl2.load_chat` goes on from there.

        The file is written as a whole or not at all, and readable for its owner alone. An older one is replaced.

        Raises:
            OSError: it cannot be written.
            BusyError: another thread is using this chat.
        """
        self._check_own()
        with self._lock:
            self._check_own()
            save_chat(Path(path), self._model, self._turns, self._cache)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Loaded) -> Chat:
        """Continue a saved conversation; :meth:`Owl2.load_chat` is the usual way, and tells more."""
        chat = cls(model)
        chat._turns = load_chat(Path(path), model, chat._cache)
        return chat

    def reset(self) -> None:
        """Forget the conversation and release its KV cache; an answer that is being read ends.

        Raises:
            BusyError: another thread is using this chat.
        """
        self._check_own()
        with self._lock:
            self._check_own()
            self._cache.claim()
            self._turns.clear()
            self._cache.clear()

    def _check_own(self) -> None:
        """Refuse to touch the chat while another thread reads an answer of it; raises BusyError."""
        stream = self._stream()
        if stream is not None:
            stream.require_own()

    def __repr__(self) -> str:
        turns = f"{len(self._turns)} turn{'s' * (len(self._turns) != 1)}"
        return f"<Chat of {self._model.name}: {turns}, {self._cache.length} of {self._cache.context} positions>"

    def __reduce__(self) -> NoReturn:
        raise Owl2Error(
            "a chat cannot be pickled; send its messages and begin one in the other process: "
            "Owl2.load(bundle).chat(messages=chat.messages)"
        )
