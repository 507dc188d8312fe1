"""Images from the web, for servers that may fetch them: over http and https, from public addresses alone."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

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
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


@dataclass(frozen=True)
class FetchLimits:
    """What one request may fetch.

    Attributes:
        seconds: for all of its images, redirects included.
        nbytes: of all.
        images: at most.
        allowed: which addresses may be connected to.
    """

    seconds: float = 20.0
    nbytes: int = 64 << 20
    images: int = 16
    allowed: Callable[[Address], bool] = is_public


class Fetcher:
    """Fetches the images of one request, one after the other; any thread may cancel it.

    The address that is checked is the one that is connected to, and every redirect is checked anew, so that no name can
    lead into the machine's own network. Proxies of the environment are not used; nothing but the address is sent.
    """

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._left = limits.nbytes
        self._cancelled = False
        self._connected: socket.socket | None = None

    def cancel(self) -> None:
        """Let :meth:`fetch_all` raise at once."""
        self._cancelled = True
        if self._connected is not None:
            _shut(self._connected)

    def fetch_all(self, urls: Sequence[str]) -> Mapping[str, bytes]:
        """Contents by URL.

        Raises:
            RequestError: one cannot be fetched, or they are too many.
        """
        limits = self._limits
        if len(urls) > limits.images:
            raise RequestError(
                f"the request names {len(urls)} images by URL; at most {limits.images} are fetched", "messages"
            )
        until = time.monotonic() + limits.seconds
        return {url: self._fetch(url, until) for url in urls}

    def _fetch(self, url: str, until: float) -> bytes:
        at = url
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
            reason = f"it took more than {self._limits.seconds:g} s" if late else str(error) or type(error).__name__
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
            self._connected = closing.enter_context(plain.dup())
            ending = threading.Timer(_left(until), _shut, [self._connected])
            ending.daemon = True
            ending.start()
            closing.callback(ending.cancel)
            if self._cancelled:
                raise OSError("it was cancelled")
            connection = http.client.HTTPConnection(host, port)
            connection.sock = plain
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = closing.enter_context(context.wrap_socket(plain, server_hostname=host))
            closing.callback(connection.close)
            path = (quote(parts.path, SAFE) or "/") + (f"?{quote(parts.query, SAFE)}" if parts.query else "")
            named = f"[{host}]" if ":" in host else host
            headers = {"Host": named if parts.port is None else f"{named}:{port}", "Accept": "image/*"}
            headers |= {"Connection": "close", "User-Agent": f"owl2/{__version__}"}
            connection.request("GET", path, headers=headers)
            yield closing.enter_context(connection.getresponse())

    def _address(self, host: str, port: int) -> str:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not all(self._limits.allowed(ipaddress.ip_address(address.partition("%")[0])) for address in found):
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
            self._left -= len(piece)
            if self._left < 0:
                raise OSError(f"the images of the request have more than {self._limits.nbytes} bytes")
        _left(until)
        if self._cancelled:
            raise OSError("it was cancelled")
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
