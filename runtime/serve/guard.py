"""What is checked of every request before anything else sees it."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl2.runtime.serve.requests import RequestError
from owl2.runtime.serve.responses import error_body

BODIES = 4
"""Bodies of the largest size that are held at a time, of all requests that are being answered."""
OPEN = ("/health", "/", "/page.css", "/page.js")
"""Addresses without a key: the page asks for it."""
COOKIE = "owl2_key"
"""Where the page keeps the key: images are shown by requests that carry no other header."""
SECURITY_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


def _is_local(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _cookie(header: str) -> str:
    pairs = (pair.strip().partition("=") for pair in header.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")


class Guard:
    """ASGI middleware: key, origin and host, size of the body, headers of every response."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, body_bytes: int) -> None:
        self._app, self._api_key, self._body_bytes = app, api_key, body_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *SECURITY_HEADERS.items()]
            await send(message)

        if refusal is not None:
            status, body = error_body(refusal)
            await JSONResponse(body, status)(scope, receive, secured)
            return
        limited = _Limited(receive, self)
        try:
            await self._app(scope, limited, secured)
        finally:
            self._held -= limited.read

    def hold(self, count: int, read: int) -> None:
        """Take ``count`` bytes more of a request that has ``read`` with them; raises RequestError for too many."""
        self._held += count
        if read > self._body_bytes:
            raise self._too_large()
        if self._held > BODIES * self._body_bytes:
            raise RequestError("other requests are too large at the moment; ask again later", status=503)

    def _refusal(self, path: str, headers: Mapping[str, str]) -> RequestError | None:
        try:
            host, origin = urlsplit(f"//{headers.get('host', '')}"), urlsplit(headers.get("origin", ""))
        except ValueError:
            return RequestError("the headers Host and Origin cannot be read", status=400)
        if self._api_key is None and not _is_local(host.hostname or ""):
            # Another site's name that leads here: the browser would send it our answers.
            return RequestError(f"this server answers as localhost only, not as {host.hostname}", status=403)
        if "origin" in headers and origin.netloc != host.netloc:
            return RequestError("requests from the pages of other sites are refused", status=403)
        if self._api_key is not None and path not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            cookie = unquote(_cookie(headers.get("cookie", "")))
            given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else cookie.encode()
            if not hmac.compare_digest(given, self._api_key.encode()):
                return RequestError("the API key is missing or wrong", status=401)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> RequestError:
        return RequestError(f"the request has more than {self._body_bytes} bytes; scale its images down", status=413)


class _Limited:
    """Receives a request whose bytes are counted until it is answered."""

    def __init__(self, receive: Receive, guard: Guard) -> None:
        self._receive, self._guard, self.read = receive, guard, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        count = len(message.get("body", b""))
        self.read += count
        self._guard.hold(count, self.read)
        return message
