"""What clients of OpenAI's interface send, in this project's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import shorten
from owl2.runtime.image_files import ImageInput
from owl2.runtime.messages import ChatMessage
from owl2.runtime.preprocess import check_mode
from owl2.runtime.sampling import TOP_LOGPROBS, GenerationConfig
from owl2.runtime.scoring.scale import PRESETS, Scale, load_preset, make_scale

DEFAULT_TOKENS = 1024
"""Tokens of an answer whose length a client does not limit."""
IGNORED = frozenset(
    [
        *("model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
        *("prompt_cache_key", "stream", "stream_options", "n", "messages", "prompt", "logprobs", "top_logprobs"),
        "response_format",
    ]
)
"""Fields that change nothing here, or are read apart."""
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "modalities": (["text"], None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
}
"""Fields that this server cannot follow, with the values that ask for nothing."""
GENERATION = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "regex": "regex",
    "choices": "choices",
    "stop": "stop",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
"""Fields that are options of generation."""


SCORED_IMAGES, SCORED_TASKS = 256, 4
NAMES = {str: "text", list: "list"}
PICTURE = "owl2-picture:"
"""Begins the address of a picture that was sent to ``/owl2/pictures`` before."""


class RequestError(ConfigError):
    """A request that cannot be followed.

    Attributes:
        param: the field that is to blame.
        status: of the response.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class AnswerRequest:
    """A question, and how to answer it.

    Attributes:
        messages: of a conversation; where the last one is the assistant's, the answer continues it. None for a raw
            prompt.
        prompt: raw, or none.
        config: how to generate.
        logprobs: whether to tell them.
        stream: whether to send the answer as it is generated.
        usage: whether a stream ends with token counts.
    """

    messages: Sequence[ChatMessage] | None
    prompt: str | None
    config: GenerationConfig
    logprobs: bool
    stream: bool
    usage: bool


@dataclass(frozen=True)
class ScoreRequest:
    """Images, and what they are asked.

    Attributes:
        images: as :data:`ImageInput`.
        scales: of each.
    """

    images: Sequence[ImageInput | WebImage]
    scales: Sequence[Scale]


@dataclass(frozen=True)
class WebImage:
    """An image that is fetched when the request has its place."""

    url: str


class Pictures(Protocol):
    """Pictures that were sent before."""

    def picture(self, name: str) -> Path:
        """The file of one; raises RequestError."""


@dataclass(frozen=True)
class ImageSources:
    """Where images may come from, besides the request itself.

    Attributes:
        folder: whose files a request may name; None for no files.
        pictures: of the page.
        web: whether URLs of the web may be named.
    """

    folder: Path | None
    pictures: Pictures
    web: bool = False

    def resolve(self, url: str) -> str | Path | WebImage:
        """A ``data:`` URI, the path of a file that may be read, or what is to be fetched.

        Raises:
            RequestError: it is something else.
        """
        if url[:5].lower() == "data:":
            return url
        url = url.strip()
        if self.web and url[:8].lower().startswith(("http://", "https://")):
            return WebImage(url)
        if url.startswith(PICTURE):
            return self.pictures.picture(url.removeprefix(PICTURE))
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise RequestError(f"the address of an image cannot be read: {error}", "messages") from error
        if parts.scheme not in ("", "file"):
            web = ", or start it with --allow-fetch" if parts.scheme in ("http", "https") else ""
            raise RequestError(
                f"this server fetches nothing from {parts.scheme}: addresses; send the image itself as a data: URI "
                f"(data:image/jpeg;base64,…){web}",
                "messages",
            )
        if self.folder is None:
            raise RequestError(
                "this server reads no files; send the image as a data: URI, or start it with --allow-dir FOLDER",
                "messages",
            )
        path = Path(unquote(parts.path) if parts.scheme else url)
        if "\0" in str(path):
            raise RequestError("the name of the image has a byte 0", "messages")
        found = (self.folder / path).resolve()
        if not found.is_relative_to(self.folder.resolve()):
            raise RequestError("the file is outside of the folder that this server may read", "messages", 403)
        return found


def web_images(request: AnswerRequest | ScoreRequest) -> list[str]:
    """The URLs that a request names, each once."""
    images: list[object] = []
    if isinstance(request, ScoreRequest):
        images.extend(request.images)
    else:
        images.extend(part.get("image") for message in request.messages or () for part in _image_parts(message))
    return list(dict.fromkeys(image.url for image in images if isinstance(image, WebImage)))


def with_contents(messages: Sequence[ChatMessage], contents: Mapping[str, bytes]) -> list[ChatMessage]:
    """Messages with what was fetched in the place of its URLs."""

    def filled(part: Mapping[str, Any]) -> Mapping[str, Any]:
        image = part.get("image")
        return {**part, "image": contents[image.url]} if isinstance(image, WebImage) else part

    return [
        {**message, "content": [filled(part) for part in _image_parts(message)]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _image_parts(message: ChatMessage) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else ()


def read_chat_request(data: object, sources: ImageSources) -> AnswerRequest:
    """Read the body of ``/v1/chat/completions``; raises RequestError."""
    fields = _fields(data, "messages")
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list with at least one message, got {shorten(messages)}", "messages")
    top = fields.get("top_logprobs") or 0
    logprobs = _flag(fields, "logprobs")
    if top and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    return _request(fields, _messages(messages, sources), None, logprobs=logprobs, top=top)


def read_score_request(data: object, sources: ImageSources, usual: str) -> ScoreRequest:
    """Read the body of ``/v1/score``, whose preset is ``usual`` if it names none; raises RequestError."""
    fields = _fields(data, "images")
    unknown = sorted(fields.keys() - {"images", "model", "task", "preset", "prompt", "levels", "weights", "preprocess"})
    if unknown:
        raise RequestError(f"{shorten(unknown[0])} is not a field of this request", unknown[0])
    images = fields["images"]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise RequestError(f"images must be a list of data: URIs or names, got {shorten(images)}", "images")
    if not 0 < len(images) <= SCORED_IMAGES:
        raise RequestError(f"a request may have 1 to {SCORED_IMAGES} images, got {len(images)}", "images")
    tasks = fields.get("task") or "quality"
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise RequestError(f"task must be a name or a list of names, got {shorten(tasks)}", "task")
    preset = fields.get("preset") or usual
    if not 0 < len(tasks) <= SCORED_TASKS:
        raise RequestError(f"a request may have 1 to {SCORED_TASKS} tasks, got {len(tasks)}", "task")
    if preset not in PRESETS:  # no files
        raise RequestError(f"preset {shorten(preset)} is not known; use {', '.join(PRESETS)}", "preset")
    settings: dict[str, Any] = {name: fields.get(name) for name in ("prompt", "levels", "weights", "preprocess")}
    for name, kind in (("prompt", str), ("levels", list), ("weights", list), ("preprocess", str)):
        if not isinstance(settings[name], kind | None):
            raise RequestError(f"{name} must be a {NAMES[kind]}, got {shorten(settings[name])}", name)
    try:
        scales = [make_scale(load_preset(preset), task, **settings) for task in tasks]
    except ConfigError as error:
        raise RequestError(str(error)) from error
    return ScoreRequest([sources.resolve(image) for image in images], scales)


def read_completion_request(data: object) -> AnswerRequest:
    """Read the body of ``/v1/completions``; raises RequestError."""
    fields = _fields(data, "prompt")
    prompt = fields["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1:
        [prompt] = prompt
    if not isinstance(prompt, str):
        raise RequestError(f"prompt must be one text, got {shorten(prompt)}", "prompt")
    top = fields.get("logprobs")
    return _request(fields, None, prompt, logprobs=top is not None, top=top or 0)


def _request(
    fields: Mapping[str, Any], messages: list[ChatMessage] | None, prompt: str | None, *, logprobs: bool, top: object
) -> AnswerRequest:
    if fields.get("n") not in (None, 1):
        raise RequestError(
            f"n {shorten(fields['n'])}: this server gives one answer to a request; ask again for more", "n"
        )
    for name, values in NEUTRAL.items():
        if name in fields and fields[name] not in values:
            raise RequestError(f"{name} {shorten(fields[name])} is not supported; leave it out", name)
    known = IGNORED | NEUTRAL.keys() | GENERATION.keys()
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise RequestError(f"{shorten(unknown[0])} is not a field of this request", unknown[0])
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= TOP_LOGPROBS:
        raise RequestError(
            f"at most {TOP_LOGPROBS} alternatives are told of a token, got {shorten(top)}", "top_logprobs"
        )
    options: dict[str, Any] = {"max_new_tokens": DEFAULT_TOKENS, "top_logprobs": top}
    for name, option in GENERATION.items():
        if fields.get(name) is not None:
            options[option] = fields[name]
    if (schema := _schema(fields.get("response_format"))) is not None:
        options["schema"] = schema
    try:
        config = GenerationConfig(**options)
    except ConfigError as error:
        raise RequestError(str(error)) from error
    settings = fields.get("stream_options") or {}
    usage = isinstance(settings, dict) and settings.get("include_usage") is True
    return AnswerRequest(messages, prompt, config, logprobs, _flag(fields, "stream"), usage)


def _schema(wanted: object) -> Mapping[str, Any] | None:
    """The JSON schema of a ``response_format``; None where any text will do."""
    match wanted:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
    raise RequestError(
        f"response_format is {shorten(wanted)}, expected the type text, json_object, or json_schema with a schema",
        "response_format",
    )


def _fields(data: object, needed: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RequestError(f"the request must be a JSON object, got {shorten(data)}")
    if needed not in data:
        raise RequestError(f"the request has no {needed}", needed)
    return data


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {shorten(value)}", name)
    return bool(value)


def _messages(messages: Sequence[object], sources: ImageSources) -> list[ChatMessage]:
    """Messages as :meth:`Owl2.chat` takes them.

    The model knows no system message: its text goes in front of the first question.
    """
    preface: list[str] = []
    read: list[ChatMessage] = []
    for index, message in enumerate(messages):
        match message:
            case {"role": "system" | "developer", "content": content}:
                preface.append(_text(content, index))
            case {"role": "user", "content": content}:
                parts = _parts(content, index, sources)
                if preface:
                    parts.insert(0, {"type": "text", "text": "\n".join((*preface, ""))})
                    preface = []
                read.append({"role": "user", "content": parts})
            case {"role": "assistant", "content": content}:
                # A placeholder that the model wrote itself stands for no image.
                read.append({"role": "assistant", "content": _text(content, index).replace(IMAGE_TOKEN, "<image>")})
            case _:
                raise RequestError(
                    f"message {index} is {shorten(message)}, expected a role (system, user, assistant) and a content",
                    "messages",
                )
    if not read or preface:
        raise RequestError("there is no message of the user", "messages")
    return read


def _text(content: object, index: int) -> str:
    match content:
        case str():
            return content
        case list() if all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            return "".join(str(part.get("text", "")) for part in content)
    raise RequestError(f"the content of message {index} must be a text, got {shorten(content)}", "messages")


def _preprocess(image: object) -> dict[str, str]:
    """How an image is fitted to the model's square, where a request says it."""
    mode = image.get("preprocess") if isinstance(image, dict) else None
    if mode is None:
        return {}
    check_mode(mode)
    return {"preprocess": mode}


def _parts(content: object, index: int, sources: ImageSources) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise RequestError(
            f"the content of message {index} must be a text or a list of parts, got {shorten(content)}", "messages"
        )
    parts: list[dict[str, Any]] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(words)}:
                parts.append({"type": "text", "text": words.replace(IMAGE_TOKEN, "<image>")})
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
                parts.append({"type": "image", "image": sources.resolve(url), **_preprocess(part["image_url"])})
            case _:
                raise RequestError(
                    f"message {index} has the part {shorten(part)}, expected {{'type': 'text', 'text': …}} or "
                    "{'type': 'image_url', 'image_url': {'url': …}}",
                    "messages",
                )
    return parts
