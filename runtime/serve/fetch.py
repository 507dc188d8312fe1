"""Images from the web, for servers that may fetch them: over http and https, from public addresses alone."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

import anyio
import anyio.to_thread

from owl2.runtime.foreign import cut
from owl2.runtime.serve.requests import RequestError
from owl2.runtime.version import __version__

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
MOVED = frozenset({301, 302, 303, 307, 308})
PIECE = 1 << 16
SAFE = "/%:@!$&'()*+,;=~?"
"""Characters of a path or query that stay as they are."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Carries an IPv4 address in its last four bytes (RFC 6052)."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet, and not to this machine, its network or a tunnel into it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


@dataclass(frozen=True)
class Fetcher:
    """Fetches images.

    The address that is checked is the one that is connected to, and every redirect is checked anew, so that no name can
    lead into the machine's own network. Proxies of the environment are not used; nothing but the address is sent.

    Attributes:
        at_once: fetches at a time.
        seconds: that one may take, redirects included.
        nbytes: of one, at most.
        images: of one request, at most.
        allowed: which addresses may be connected to.
    """

    at_once: anyio.CapacityLimiter
    seconds: float = 10.0
    nbytes: int = 32 << 20
    images: int = 16
    allowed: Callable[[Address], bool] = is_public

    async def all(self, urls: set[str]) -> Mapping[str, bytes]:
        """Contents by URL.

        Raises:
            RequestError: one cannot be fetched, or they are too many.
        """
        if len(urls) > self.images:
            raise RequestError(
                f"the request names {len(urls)} images by URL; at most {self.images} are fetched", "messages"
            )
        # Threads of their own: slow sites take none from those who ask for nothing.
        fetches = (
            anyio.to_thread.run_sync(self.fetch, url, limiter=self.at_once, abandon_on_cancel=True) for url in urls
        )
        return dict(zip(urls, await asyncio.gather(*fetches)))

    def fetch(self, url: str) -> bytes:
        """Content of a URL; raises RequestError."""
        until, at = time.monotonic() + self.seconds, url
        try:
            for _ in range(REDIRECTS + 1):
                with self._response(at, until) as response:
                    if response.status not in MOVED:
                        return self._content(response, until)
                    at = urljoin(at, response.getheader("Location") or "")
            raise OSError(f"it redirects more than {REDIRECTS} times")
        except RequestError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= until
            reason = f"it took more than {self.seconds:g} s" if late else str(error) or type(error).__name__
            raise RequestError(f"{cut(url, 200)} cannot be fetched: {cut(reason, 200)}", "messages") from error

    @contextlib.contextmanager
    def _response(self, url: str, until: float) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(url)
        if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
            raise OSError("it is not a plain http or https address")
        host, port = parts.hostname.encode("idna").decode(), parts.port or PORTS[parts.scheme]
        with contextlib.ExitStack() as closing:
            plain = closing.enter_context(socket.create_connection((self._address(host, port), port), _left(until)))
            # A timeout is for each read alone: a site that sends a byte a second would go on for hours.
            ending = threading.Timer(_left(until), _shut, [closing.enter_context(plain.dup())])
            ending.start()
            closing.callback(ending.cancel)
            connection = http.client.HTTPConnection(host, parts.port)
            connection.sock = plain
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = closing.enter_context(context.wrap_socket(plain, server_hostname=host))
            closing.callback(connection.close)
            path = (quote(parts.path, SAFE) or "/") + (f"?{quote(parts.query, SAFE)}" if parts.query else "")
            headers = {"Accept": "image/*", "Connection": "close", "User-Agent": f"owl2/{__version__}"}
            connection.request("GET", path, headers=headers)
            yield closing.enter_context(connection.getresponse())

    def _address(self, host: str, port: int) -> str:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not all(self.allowed(ipaddress.ip_address(address.partition("%")[0])) for address in found):
            raise RequestError(
                f"{cut(host, 200)} is in this machine's own network; images are fetched from public addresses only",
                "messages",
                403,
            )
        return found[0]

    def _content(self, response: http.client.HTTPResponse, until: float) -> bytes:
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"the site answered with {response.status}")
        content = bytearray()
        while piece := response.read1(PIECE):
            content += piece
            if len(content) > self.nbytes:
                raise OSError(f"it has more than {self.nbytes} bytes")
        _left(until)
        if response.length:
            raise OSError("it broke off")
        return bytes(content)


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
