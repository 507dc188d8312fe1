"""The server's addresses."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from owl2.runtime.config import PreprocessConfig
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.foreign import ForeignError, parse_json
from owl2.runtime.generate import Answer, Chunk
from owl2.runtime.image_cost import MAX_PIXELS
from owl2.runtime.image_files import opened
from owl2.runtime.images import DECODING
from owl2.runtime.preprocess import MODES, as_seen, check_mode, read_image
from owl2.runtime.scoring.scale import USUAL
from owl2.runtime.serve.answering import Answering, Scored, WebImages, answer_job, score_job
from owl2.runtime.serve.guard import Guard
from owl2.runtime.serve.metrics import Metrics
from owl2.runtime.serve.requests import (
    AnswerRequest,
    ImageSources,
    RequestError,
    ScoreRequest,
    read_chat_request,
    read_completion_request,
    read_score_request,
)
from owl2.runtime.serve.residence import Residence
from owl2.runtime.serve.responses import DONE, ChatFormat, CompletionFormat, error_body, scores_body, sse
from owl2.runtime.serve.store import Store

LOG = logging.getLogger("owl2.serve")
Result = TypeVar("Result")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class ServeOptions:
    """Settings of a server.

    Attributes:
        api_key: that clients must send; None for none.
        store: folder of the page's conversations.
        allow_dir: folder whose images a request may name; None for no files.
        allow_fetch: whether a request may name images on the web.
        active: answers at a time.
        waiting: requests that may wait for their turn.
        body_bytes: of a request, at most.
        body_seconds: in which a request must have arrived.
        answer_seconds: after which an answer ends.
        stop_seconds: that answers have to end by themselves when the server stops.
        cache_bytes: for the K/V caches of past conversations.
        disk: folder for those that have no room, and the bytes that they may take there; None for no such folder.
        idle_seconds: without a request, after which the model's memory is given back; None for never.
    """

    store: Path
    api_key: str | None = None
    allow_dir: Path | None = None
    allow_fetch: bool = False
    active: int = 16
    waiting: int = 64
    body_bytes: int = 64 << 20
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    stop_seconds: float = 10.0
    cache_bytes: int = 2 << 30
    disk: tuple[Path, int] | None = None
    idle_seconds: float | None = None


@dataclass(frozen=True)
class ServedModel:
    """What is known of a model whether it is in memory or not.

    Attributes:
        name: for clients.
        tokenizer: names tokens.
        preprocess: of images.
        facts: for people, by name: weights, K/V cache and the like.
        preset: with which it scores images, if a request names none.
    """

    name: str
    tokenizer: Tokenizer
    preprocess: PreprocessConfig
    facts: Mapping[str, str]
    preset: str = USUAL


class Server:
    """Handlers of the server's addresses."""

    def __init__(self, model: ServedModel, residence: Residence, options: ServeOptions) -> None:
        """Serve a model.

        Args:
            model: that is served.
            residence: of the model.
            options: limits.
        """
        self._served, self._options = model, options
        self._residence = residence
        self._store = Store(options.store)
        self._store.prepare()
        self._sources = ImageSources(options.allow_dir, self._store, options.allow_fetch)
        self._decoders = anyio.CapacityLimiter(DECODERS)
        self._web = WebImages(max(1, options.active // 2))
        self._answering = Answering(residence, options.active, options.waiting, options.answer_seconds)
        self._metrics = Metrics(residence, self._answering)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            *(Route(path, _page_file(name, kind)) for path, name, kind in PAGE),
            Route("/owl2/conversations", self._caught(self.conversations)),
            Route("/owl2/conversations/{name}", self._caught(self.conversation), methods=["GET", "PUT", "DELETE"]),
            Route("/owl2/model", self._caught(self.about)),
            Route("/owl2/pictures", self._caught(self.add_picture), methods=["POST"]),
            Route("/owl2/pictures/{name}", self._caught(self.picture)),
            Route("/v1/chat/completions", self._caught(self.chat), methods=["POST"]),
            Route("/v1/completions", self._caught(self.completion), methods=["POST"]),
            Route("/v1/score", self._caught(self.score), methods=["POST"]),
            Route("/v1/models", self._caught(self.models)),
            Route("/v1/models/{name:path}", self._caught(self.model)),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={404: _not_found, 405: _not_allowed})
        app.add_middleware(Guard, api_key=self._options.api_key, body_bytes=self._options.body_bytes)
        return app

    async def stop(self) -> None:
        """Take no further requests; answers may go on for a while, then they end."""
        await self._answering.stop(self._options.stop_seconds)

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        data = await self._json(request)
        asked = await asyncio.to_thread(read_chat_request, data, self._sources)
        form = ChatFormat.of(secrets.token_hex(12), self._served.name, self._served.tokenizer, logprobs=asked.logprobs)
        return await self._respond(asked, form, request)

    async def score(self, request: Request) -> Response:
        """``/v1/score``: scores of images; those of several requests share steps of the model."""
        data = await self._json(request)
        asked = await asyncio.to_thread(read_score_request, data, self._sources, self._served.preset)
        return await _unless_gone(request, self._scores(asked))

    async def _scores(self, asked: ScoreRequest) -> Response:
        async with self._answering.run(score_job(asked, self._web)) as events:
            async for scored in events:
                self._metrics.scored(scored)
                return await asyncio.to_thread(_score_response, self._served.name, scored)
        raise RequestError("the scores were cancelled", status=503)

    async def completion(self, request: Request) -> Response:
        """``/v1/completions``."""
        asked = read_completion_request(await self._json(request))
        form = CompletionFormat.of(
            secrets.token_hex(12), self._served.name, self._served.tokenizer, logprobs=asked.logprobs
        )
        return await self._respond(asked, form, request)

    async def models(self, _request: Request) -> Response:
        """``/v1/models``."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``/v1/models/NAME``."""
        if request.path_params["name"] != self._served.name:
            raise RequestError(f"there is no such model here, only {self._served.name}", "model", 404)
        return JSONResponse(self._model())

    async def health(self, _request: Request) -> Response:
        """``/health``: whether requests can be sent, and whether the first has to wait for the model."""
        return JSONResponse({"status": "ok", "loaded": self._residence.loaded, "model": self._served.name})

    async def about(self, _request: Request) -> Response:
        """``/owl2/model``: what the page tells of the model, and how it fits images."""
        served = self._served
        fits = {"usual": served.preprocess.mode, "known": list(MODES)}
        return JSONResponse({"model": served.name, "facts": dict(served.facts), "preprocess": fits})

    async def conversations(self, _request: Request) -> Response:
        """``/owl2/conversations``: those of the page."""
        return JSONResponse(await asyncio.to_thread(self._store.listed), headers=NO_CACHE)

    async def conversation(self, request: Request) -> Response:
        """``/owl2/conversations/ID``: one of them."""
        name = request.path_params["name"]
        match request.method:
            case "PUT":
                data, expected = await self._json(request), request.headers.get("if-match")
                tag = await asyncio.to_thread(self._store.write, name, data, expected)
                return Response(status_code=204, headers={"ETag": tag})
            case "DELETE":
                await asyncio.to_thread(self._store.delete, name)
            case _:
                data, tag = await asyncio.to_thread(self._store.read, name)
                return JSONResponse(data, headers={**NO_CACHE, "ETag": tag})
        return Response(status_code=204)

    async def add_picture(self, request: Request) -> Response:
        """``/owl2/pictures``: keep an image that can be read."""
        content = await self._body(request)
        kind = await self._with_images(partial(_image_kind, content))
        name = await asyncio.to_thread(self._store.add_picture, content)
        return JSONResponse({"id": name, "type": kind})

    async def picture(self, request: Request) -> Response:
        """``/owl2/pictures/ID``: in a format that browsers show, or with ``?seen=MODE`` as the model sees it."""
        path = self._store.picture(request.path_params["name"])
        seen = request.query_params.get("seen")
        try:
            if seen is None:
                content, kind = await self._with_images(partial(_shown, path))
            else:
                content = await self._with_images(partial(_seen, path, self._served.preprocess, seen))
                kind = "image/png"
        except FileNotFoundError:
            raise RequestError("there is no such picture", status=404) from None
        return Response(
            content,
            media_type=kind,
            headers={"Cache-Control": FOR_EVER if seen is None else "no-cache"},
        )

    async def _with_images(self, function: Callable[[], Result]) -> Result:
        """Run what decodes images in a thread of few, so that the others stay for what takes no time."""

        def work() -> Result:
            with DECODING:
                return function()

        return await anyio.to_thread.run_sync(work, limiter=self._decoders)

    async def metrics(self, _request: Request) -> Response:
        """``/metrics``, for Prometheus."""
        content, media_type = self._metrics.exposition()
        return Response(content, media_type=media_type)

    def _model(self) -> dict[str, Any]:
        return {"id": self._served.name, "object": "model", "created": 0, "owned_by": "owl2"}

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        idling = asyncio.create_task(self._unload_when_idle())
        try:
            yield
        finally:
            idling.cancel()

    async def _unload_when_idle(self) -> None:
        if self._options.idle_seconds is None:
            return
        while True:
            await asyncio.sleep(min(5.0, self._options.idle_seconds / 4))
            try:
                if await asyncio.to_thread(self._residence.unload_if_idle):
                    LOG.info("nobody asked for %g s: the model's memory is given back", self._options.idle_seconds)
            except Exception:
                LOG.exception("the model could not be unloaded")

    def _caught(self, handler: Handler) -> Handler:
        """The handler, with errors as responses."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                return self._failed(error)

        return answer

    def _failed(self, error: Exception) -> JSONResponse:
        status, body = self._error(error)
        headers = {"Retry-After": "5"} if status in (429, 503) else None
        return JSONResponse(body, status, headers=headers)

    def _error(self, error: Exception) -> tuple[int, dict[str, Any]]:
        status, body = error_body(error)
        self._metrics.failed(status)
        if status == 500:
            LOG.error("a request failed unexpectedly", exc_info=error)
        return status, body

    async def _body(self, request: Request) -> bytes:
        try:
            return await asyncio.wait_for(request.body(), self._options.body_seconds)
        except asyncio.TimeoutError:
            raise RequestError(
                f"the request did not arrive within {self._options.body_seconds:g} s", status=408
            ) from None

    async def _json(self, request: Request) -> object:
        body = await self._body(request)
        try:
            return await asyncio.to_thread(lambda: parse_json(body.decode()))
        except (ForeignError, UnicodeDecodeError) as error:
            raise RequestError(f"the request cannot be read: {error}") from error

    async def _respond(self, asked: AnswerRequest, form: ChatFormat | CompletionFormat, request: Request) -> Response:
        if not asked.stream:
            return await _unless_gone(request, self._whole(asked, form))
        events = self._events(asked, form)
        # What is refused at once gets a status of its own.
        first = await _unless_gone(request, anext(events))
        return EventResponse(first, events)

    async def _whole(self, asked: AnswerRequest, form: ChatFormat | CompletionFormat) -> Response:
        chunks: list[Chunk] = []
        async with self._answering.run(answer_job(asked, self._web)) as events:
            async for event in events:
                match event:
                    case Chunk():
                        chunks.append(event)
                    case Answer():
                        self._metrics.answered(event)
                        whole = form.whole(event.text, chunks, event.finish_reason, event.stats)
                        return JSONResponse(whole, headers=NO_CACHE)
        raise RequestError("the answer was cancelled", status=503)

    async def _events(self, asked: AnswerRequest, form: ChatFormat | CompletionFormat) -> AsyncGenerator[bytes]:
        """A stream of an answer, errors in its course included."""
        begun = False
        try:
            async with self._answering.run(answer_job(asked, self._web)) as events:
                async for event in events:
                    if not begun and (head := form.first()) is not None:
                        yield sse(head)
                    begun = True
                    match event:
                        case Chunk():
                            yield sse(form.piece(event))
                        case Answer():
                            self._metrics.answered(event)
                            if asked.usage:
                                yield sse(form.last(event.stats))
        except Exception as error:
            if not begun:
                raise
            yield sse(self._error(error)[1])
        yield DONE


def _score_response(name: str, scored: Sequence[Scored]) -> Response:
    return JSONResponse(scores_body(name, scored), headers=NO_CACHE)


DECODERS = 2
SEND_SECONDS = 30.0
"""A client that takes nothing of a stream for so long has gone."""
NO_CACHE = {"Cache-Control": "no-store"}
PAGE = (
    ("/", "index.html", "text/html"),
    ("/page.css", "page.css", "text/css"),
    ("/page.js", "page.js", "text/javascript"),
)
"""Address, file and type of the page's parts."""
FOR_EVER = "private, max-age=31536000, immutable"
AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp"}
"""Formats that every browser shows."""
SHOWN_PIXELS = 1600
"""Longer side of what is shown of an image in another format."""


def _page_file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def handler(_request: Request) -> Response:
        content = (Path(__file__).parent / "page" / name).read_bytes()
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return handler


def _image_kind(content: bytes) -> str:
    """Format of an image that can be read; raises ImageError."""
    with opened(content, MAX_PIXELS) as (image, _):
        return image.format or "image"


def _shown(path: Path) -> tuple[bytes, str]:
    content = path.read_bytes()
    kind = AS_THEY_ARE.get(_image_kind(content))
    if kind is not None:
        return content, kind
    image = read_image(content).image
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return _png(image), "image/png"


def _seen(path: Path, config: PreprocessConfig, mode: str) -> bytes:
    check_mode(mode)
    return _png(as_seen(read_image(path.read_bytes()).image, config, mode))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part


async def _unless_gone(request: Request, awaitable: Awaitable[Result]) -> Result:
    """The result, unless the client goes away first, which ends the work and raises ClientDisconnect."""
    work, gone = asyncio.ensure_future(awaitable), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})


class EventResponse(StreamingResponse):
    """A stream of events; its source is closed too where the client goes away, or takes nothing for too long."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], seconds: float = SEND_SECONDS) -> None:
        super().__init__(_chained(first, rest), media_type="text/event-stream", headers=NO_CACHE)
        self._rest, self._seconds = rest, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hurried(message: Message) -> None:
            with anyio.fail_after(self._seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, hurried)
        except (TimeoutError, ClientDisconnect):
            LOG.warning("an answer was ended: its client took nothing of it for %g s", self._seconds)
        finally:
            with anyio.CancelScope(shield=True):
                await self._rest.aclose()


async def _gone(request: Request) -> None:
    """Return when the client has gone away."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _not_found(request: Request, _error: Exception) -> Response:
    status, body = error_body(RequestError(f"there is nothing at {request.url.path}", status=404))
    return JSONResponse(body, status)


async def _not_allowed(request: Request, _error: Exception) -> Response:
    status, body = error_body(RequestError(f"{request.url.path} does not take {request.method}", status=405))
    return JSONResponse(body, status)
