"""Answers and errors in the form of OpenAI's interface."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.families.mplug_owl2.tokenizer_files import SPACE
from owl2.runtime.generate import Chunk, FinishReason, Stats
from owl2.runtime.scoring.score import Score
from owl2.runtime.serve.requests import RequestError

FINISH: Mapping[FinishReason | None, str | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "stop",
}
"""OpenAI's word for the end of an answer; None for a token that is not the last."""
Json = dict[str, Any]


def error_body(error: Exception) -> tuple[int, Json]:
    """HTTP status and body for what went wrong; nothing of an unexpected error is told."""
    status, kind, code, param = 500, "server_error", None, None
    match error:
        case RequestError():
            status, param = error.status, error.param
            kind = {429: "rate_limit_error", 503: "server_error"}.get(status, "invalid_request_error")
        case ContextOverflowError():
            status, kind, code, param = 400, "invalid_request_error", "context_length_exceeded", "messages"
        case PromptError() | ImageError():
            status, kind, param = 400, "invalid_request_error", "messages"
        case InsufficientMemoryError() | BackendError() | BundleError():
            status = 503
        case ConfigError():
            status, kind = 400, "invalid_request_error"
    message = (
        str(error) if isinstance(error, Owl2Error) else "something unexpected went wrong; the server's log tells more"
    )
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def figures(stats: Stats) -> Json:
    """Token counts as OpenAI gives them, image rows as tokens of the prompt; and this project's own, in seconds."""
    usage = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
    }
    timings = {
        "time_to_first_token": round(stats.time_to_first_token, 4),
        "tokens_per_second": round(stats.tokens_per_second, 2),
        "images_encoded": stats.images_encoded,
        "reused_tokens": stats.reused_tokens,
    }
    return {"usage": usage, "timings": timings}


@dataclass(frozen=True)
class ChatFormat:
    """Bodies of ``/v1/chat/completions``.

    Attributes:
        id: of the answer.
        model: name of the bundle.
        tokenizer: names tokens.
        logprobs: whether they are told.
        created: seconds since 1970.
    """

    id: str
    model: str
    tokenizer: Tokenizer
    logprobs: bool
    created: int

    @classmethod
    def of(cls, number: str, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> ChatFormat:
        return cls(f"chatcmpl-{number}", model, tokenizer, logprobs, int(time.time()))

    def first(self) -> Json:
        """What a stream begins with."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def piece(self, chunk: Chunk) -> Json:
        """A token of a stream."""
        return self._chunk({"content": chunk.text}, self._logprobs([chunk]), FINISH[chunk.finish_reason])

    def last(self, stats: Stats) -> Json:
        """Token counts at the end of a stream."""
        return {**self._head("chat.completion.chunk"), "choices": [], **figures(stats)}

    def whole(self, text: str, chunks: Sequence[Chunk], reason: FinishReason, stats: Stats) -> Json:
        """An answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(chunks),
            "finish_reason": FINISH[reason],
        }
        return {**self._head("chat.completion"), "choices": [choice], **figures(stats)}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, chunks: Sequence[Chunk]) -> Json | None:
        if not self.logprobs:
            return None
        content = [
            {
                **token_entry(self.tokenizer, chunk.token_id, chunk.logprob),
                "top_logprobs": [token_entry(self.tokenizer, *pair) for pair in chunk.top_logprobs],
            }
            for chunk in chunks
        ]
        return {"content": content, "refusal": None}


@dataclass(frozen=True)
class CompletionFormat:
    """Bodies of ``/v1/completions``; attributes as :class:`ChatFormat`."""

    id: str
    model: str
    tokenizer: Tokenizer
    logprobs: bool
    created: int

    @classmethod
    def of(cls, number: str, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> CompletionFormat:
        return cls(f"cmpl-{number}", model, tokenizer, logprobs, int(time.time()))

    def first(self) -> Json | None:
        return None

    def piece(self, chunk: Chunk) -> Json:
        return self._body(chunk.text, [chunk], FINISH[chunk.finish_reason])

    def last(self, stats: Stats) -> Json:
        return {**self._body("", [], None), "choices": [], **figures(stats)}

    def whole(self, text: str, chunks: Sequence[Chunk], reason: FinishReason, stats: Stats) -> Json:
        return {**self._body(text, chunks, FINISH[reason]), **figures(stats)}

    def _body(self, text: str, chunks: Sequence[Chunk], finish: str | None) -> Json:
        choice = {"index": 0, "text": text, "logprobs": self._logprobs(chunks), "finish_reason": finish}
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**head, "choices": [choice]}

    def _logprobs(self, chunks: Sequence[Chunk]) -> Json | None:
        if not self.logprobs:
            return None
        names = [token_entry(self.tokenizer, chunk.token_id, chunk.logprob)["token"] for chunk in chunks]
        tops = [
            {token_entry(self.tokenizer, *pair)["token"]: pair[1] for pair in chunk.top_logprobs} for chunk in chunks
        ]
        offsets, end = [], 0
        for chunk in chunks:
            offsets.append(end)
            end += len(chunk.text)
        return {
            "tokens": names,
            "token_logprobs": [chunk.logprob for chunk in chunks],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def scores_body(model: str, scored: Sequence[tuple[Score, ...] | Owl2Error]) -> Json:
    """Body of ``/v1/score``: for each image its scores, or its error."""
    data: list[Json] = []
    for index, scores in enumerate(scored):
        if isinstance(scores, Owl2Error):
            data.append({"index": index, **error_body(scores)[1]})
        else:
            data.append({"index": index, "scores": [score.to_json() | {"image": None} for score in scores]})
    return {"object": "list", "model": model, "data": data}


def token_entry(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    """A token as OpenAI describes it: text, log-probability, bytes."""
    surface = tokenizer.apart.get(token, tokenizer.surfaces[token])
    content = surface if isinstance(surface, bytes) else surface.replace(SPACE, " ").encode()
    if token == tokenizer.eos_id:
        content = b"</s>"
    return {"token": content.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(content)}


def sse(body: Json) -> bytes:
    """An event of a stream."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
