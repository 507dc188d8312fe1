"""A conversation: answers, whole or as they are generated, with the KV cache kept across turns."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import BusyError, Owl2Error, PromptError
from owl2.runtime.families.mplug_owl2.template import Message, render, with_images
from owl2.runtime.generate import Answer, Chunk, check_context, generate
from owl2.runtime.images import Images, PreparedImage, as_list
from owl2.runtime.load import Loaded
from owl2.runtime.preprocess import ImageInput
from owl2.runtime.sampling import GenerationConfig, GenerationOptions

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

ChatMessage = Mapping[str, Any]
"""A message as transformers has it: ``role`` is ``user`` or ``assistant``; ``content`` is a text, or a list of parts.

A part is ``{"type": "text", "text": …}`` or ``{"type": "image", "image": …}``, with the image as in :data:`Images`; an
image part may say ``"preprocess": "pad"`` (or another mode).
"""


def run(stream: AnswerStream) -> Answer:
    """Read a stream to its end."""
    for _ in stream:
        pass
    return stream.answer


class AnswerStream:
    """An answer as it is generated: iterate over its chunks, then take :attr:`answer`.

    Leaving it unfinished, :meth:`cancel` or an error undo the turn: the conversation is as it was before the question.
    """

    def __init__(
        self,
        chunks: Generator[Chunk, None, Answer],
        cancelled: threading.Event,
        lock: threading.Lock,
        finish: Callable[[Answer], None] | None = None,
    ) -> None:
        """Wrap a generation; :meth:`Chat.stream` and :meth:`Owl2.stream` are the usual ways.

        Args:
            chunks: the generation.
            cancelled: ends it before its next step.
            lock: held during each step.
            finish: told the answer, if it was not cancelled.
        """
        self._chunks, self._cancelled, self._lock, self._finish = chunks, cancelled, lock, finish
        self._answer: Answer | None = None
        self._replaced = False
        self._thread = threading.get_ident()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._answer is not None:
            raise StopIteration
        with exclusive(self._lock, self._cancelled):
            if self._replaced:
                raise Owl2Error("a newer question was asked in this chat; this answer can no longer be generated")
            try:
                chunk = next(self._chunks)
                if chunk.finish_reason is not None:
                    next(self._chunks)  # now: the caller may not come back for more
            except StopIteration as end:
                answer: Answer = end.value
                self._answer = answer
                if answer.finish_reason == "cancelled":
                    raise
                if self._finish is not None:
                    self._finish(answer)
            return chunk

    @property
    def answer(self) -> Answer:
        """The finished answer; of a cancelled one, what there was until then.

        Raises:
            Owl2Error: the stream has not been read to its end.
        """
        if self._answer is None:
            raise Owl2Error("the answer is not finished; read the stream to its end first")
        return self._answer

    @property
    def finished(self) -> bool:
        """Whether :attr:`answer` can be taken."""
        return self._answer is not None

    def cancel(self) -> None:
        """Stop before the next step; may be called from another thread. A finished answer stays as it is."""
        self._cancelled.set()

    def __repr__(self) -> str:
        return f"<AnswerStream {'not finished' if self._answer is None else repr(self._answer.text)}>"


@dataclass(frozen=True)
class Turn:
    """A question with its images, and the answer.

    Attributes:
        question: text with one ``<|image|>`` per image.
        parts: the question's images as ``messages`` shows them.
        images: the same, preprocessed.
        answer: text.
    """

    question: str
    parts: tuple[ChatMessage, ...]
    images: tuple[PreparedImage, ...]
    answer: str


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
        self._stream: weakref.ref[AnswerStream] | None = None
        self._turns = read_messages(model, messages)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The finished turns, as :meth:`Owl2.chat` takes them."""
        messages: list[dict[str, Any]] = []
        for turn in self._turns:
            content: str | list[ChatMessage] = turn.question
            if turn.parts:
                texts, images = turn.question.split(IMAGE_TOKEN), [None, *turn.parts]
                pairs = [(image, {"type": "text", "text": text}) for image, text in zip(images, texts)]
                content = [part for image, text in pairs for part in (image, text) if part and part.get("text") != ""]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
        return messages

    def ask(
        self,
        question: str,
        images: Images = None,
        *,
        preprocess: str | None = None,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Answer:
        """Ask, about the images given now or earlier in this chat, and wait for the whole answer.

        An error, or Ctrl-C, undoes the turn.

        Args:
            question: text; where it holds no ``<|image|>``, the new images are put in front of it.
            images: one or several paths, PIL images or uint8 arrays [H, W, 3].
            preprocess: ``resize``, ``pad`` or ``crop`` instead of the bundle's own mode.
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
        return run(self.stream(question, images, preprocess=preprocess, config=config, **options))

    def stream(
        self,
        question: str,
        images: Images = None,
        *,
        preprocess: str | None = None,
        config: GenerationConfig | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AnswerStream:
        """Ask as :meth:`ask`, and get the answer as it is generated.

        The turn counts once the last chunk has been read; before that, another question undoes it.
        """
        settings = (config or GenerationConfig()).with_options(options)
        with self._exclusive():
            began = time.perf_counter()
            sources = as_list(images)
            prepared = self._model.prepare(sources, preprocess)
            seconds = time.perf_counter() - began
            if not isinstance(question, str):
                raise PromptError(f"a question must be a text, got {type(question).__name__}")
            if not question and not prepared:
                raise PromptError("the question is empty; give at least one character or image")
            asked = with_images(question, len(prepared))
            everything = [image for turn in self._turns for image in turn.images] + prepared
            prompt = self._model.encode(
                render([*self._history(), Message("USER", asked), Message("ASSISTANT")]), everything
            )
            check_context(self._cache, prompt)
            parts = tuple(_image_part(source, preprocess) for source in sources)

            def finish(answer: Answer) -> None:
                # A placeholder that the model wrote itself stands for no image.
                text = answer.text.replace(IMAGE_TOKEN, "<image>")
                self._turns.append(Turn(asked, parts, tuple(prepared), text))

            cancelled = threading.Event()
            chunks = generate(self._model, self._cache, prompt, settings, cancelled, seconds)
            stream = AnswerStream(chunks, cancelled, self._lock, finish)
            self._stream = weakref.ref(stream)
            return stream

    def undo(self) -> None:
        """Take the last question and its answer back.

        Raises:
            Owl2Error: there is no turn.
            BusyError: another thread is using this chat.
        """
        with self._exclusive():
            if not self._turns:
                raise Owl2Error("the conversation has no turn to undo")
            self._turns.pop()

    def fork(self) -> Chat:
        """A second conversation that begins as this one; the KV cache is copied, so nothing runs again.

        Raises:
            BusyError: another thread is using this chat.
        """
        with self._exclusive():
            other = Chat(self._model)
            other._turns = list(self._turns)
            self._cache.fork(other._cache)
            return other

    def reset(self) -> None:
        """Forget the conversation and release its KV cache; an answer that is being read ends.

        Raises:
            BusyError: another thread is using this chat.
        """
        with self._exclusive():
            self._turns.clear()
            self._cache.clear()

    def _history(self) -> list[Message]:
        return [
            message
            for turn in self._turns
            for message in (Message("USER", turn.question), Message("ASSISTANT", turn.answer))
        ]

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Own the chat; an unfinished stream is replaced, one of another thread only after it was cancelled."""
        stream = self._stream() if self._stream is not None else None
        unfinished = stream is not None and not stream.finished
        with exclusive(self._lock, stream._cancelled if stream is not None else None):
            if stream is not None and unfinished and not stream.finished:
                if stream._thread != threading.get_ident() and not stream._cancelled.is_set():
                    raise BusyError(BUSY)
                stream._replaced = True
            self._stream = None
            yield

    def __repr__(self) -> str:
        turns = f"{len(self._turns)} turn{'s' * (len(self._turns) != 1)}"
        return f"<Chat of {self._model.name}: {turns}, {self._cache.length} of {self._cache.context} positions>"

    def __reduce__(self) -> NoReturn:
        raise Owl2Error(
            "a chat cannot be pickled; send its messages and begin one in the other process: "
            "Owl2.load(bundle).chat(messages=chat.messages)"
        )


BUSY = (
    "another thread is using this chat; wait for its answer, cancel its stream, or give each thread a chat of its own "
    "(owl.chat() or chat.fork())"
)


@contextmanager
def exclusive(lock: threading.Lock, cancelled: threading.Event | None) -> Iterator[None]:
    """Hold the lock of a chat; wait for it only while a cancelled step ends.

    Raises:
        BusyError: another thread holds it.
    """
    if not lock.acquire(blocking=cancelled is not None and cancelled.is_set()):
        raise BusyError(BUSY)
    try:
        yield
    finally:
        lock.release()


def read_messages(model: Loaded, messages: Sequence[ChatMessage]) -> list[Turn]:
    """The turns of a conversation that a caller gives.

    Raises:
        PromptError: the messages are not user and assistant in turn, or one has content that cannot be used.
        ImageError: an image cannot be read.
    """
    turns = []
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        where = f"message {index}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise PromptError(f"{where} is {message!r:.80}, expected {{'role': …, 'content': …}}")
        if message["role"] != expected:
            raise PromptError(
                f"{where} has the role {message['role']!r}, expected {expected!r}: user and assistant take turns, and "
                "this model has no system message"
            )
    if len(messages) % 2:
        raise PromptError("the last message is the user's; leave it out and ask it: chat.ask(question, images)")
    for index in range(0, len(messages), 2):
        question, parts = _read_content(messages[index]["content"], f"message {index}")
        answer, more = _read_content(messages[index + 1]["content"], f"message {index + 1}")
        if more or IMAGE_TOKEN in answer:
            raise PromptError(f"message {index + 1} has an image; only the user's messages may")
        question = with_images(question, len(parts))
        images = [image for part in parts for image in model.prepare([part["image"]], part.get("preprocess"))]
        turns.append(Turn(question, tuple(parts), tuple(images), answer))
    return turns


def _read_content(content: object, where: str) -> tuple[str, list[ChatMessage]]:
    """Text with a placeholder for each image, and the image parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"the content of {where} must be a text or a list of parts, got {type(content).__name__}")
    text, images = "", []
    for part in content:
        match part:
            case {"type": "text", "text": str(words)}:
                text += words
            case {"type": "image", "image": _}:
                text += IMAGE_TOKEN
                images.append(part)
            case _:
                raise PromptError(
                    f"{where} has the part {part!r:.80}, expected {{'type': 'text', 'text': …}} or "
                    "{'type': 'image', 'image': …}"
                )
    return text, images


def _image_part(source: ImageInput, preprocess: str | None) -> ChatMessage:
    part: dict[str, Any] = {"type": "image", "image": source}
    return part if preprocess is None else part | {"preprocess": preprocess}
