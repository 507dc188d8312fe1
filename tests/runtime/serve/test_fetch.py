"""Images from the web: a real site at this machine's address, which only these tests allow."""

import http.server
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from conftest import GOLDEN
from serving import serving

from owl2.runtime.serve.fetch import Fetcher, FetchLimits, is_public
from owl2.runtime.serve.requests import RequestError

PICTURE = sorted((GOLDEN / "images").glob("*.png"))[0].read_bytes()
SECONDS = 0.6


class Site(http.server.BaseHTTPRequestHandler):
    """A site with pictures, detours and worse."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        match self.path.split("?")[0].split("/")[1:]:
            case ["picture.png" | "%C3%A4.png"]:
                self._send(200, PICTURE)
            case ["to", target]:
                self._send(302, b"", Location=f"/{target}")
            case ["inside"]:
                self._send(302, b"", Location="http://10.0.0.1/secret")
            case ["round"]:
                self._send(302, b"", Location="/round")
            case ["file"]:
                self._send(302, b"", Location="file:///etc/passwd")
            case ["large"]:
                self._send(200, bytes(3 << 20))
            case ["cut"]:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"a few")
                self.close_connection = True
            case ["slow"]:
                self.send_response(200)
                self.end_headers()
                self._drip(b"x")
            case ["slow-head"]:
                self._drip(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000)
            case _:
                self._send(404, b"nothing")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _drip(self, content: bytes) -> None:
        try:
            for index in range(200):
                self.wfile.write(content[index % len(content) :][:1])
                time.sleep(0.05)
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.asked = []  # type: ignore[attr-defined]
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return str(address) == "127.0.0.1"


def fetch(url: str, *, nbytes: int = 1 << 20) -> bytes:
    return Fetcher(FetchLimits(SECONDS, nbytes, allowed=local)).fetch_all([url])[url]


@pytest.mark.parametrize("path", ["picture.png", "picture.png?size=1", "to/picture.png", "ä.png"])
def test_a_picture(site: http.server.ThreadingHTTPServer, path: str) -> None:
    assert fetch(f"http://127.0.0.1:{site.server_port}/{path}") == PICTURE


def test_nothing_of_this_machine_is_told(
    site: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # would refuse
    fetch(f"http://127.0.0.1:{site.server_port}/picture.png")
    _, headers = site.asked[-1]  # type: ignore[attr-defined]
    assert set(headers) == {"Host", "Accept-Encoding", "Accept", "Connection", "User-Agent"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answered with 404"),
        ("inside", "10.0.0.1 is in this machine's own network"),
        ("round", "redirects more than 3 times"),
        ("file", "not a plain http or https address"),
        ("large", "more than 1048576 bytes"),
        ("cut", "broke off"),
        ("slow", "took more than 0.6 s"),
        ("slow-head", "took more than 0.6 s"),
    ],
)
def test_what_is_no_picture(site: http.server.ThreadingHTTPServer, path: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError, match=message):
        fetch(f"http://127.0.0.1:{site.server_port}/{path}")
    assert time.monotonic() - began < 5 * SECONDS


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@127.0.0.1/", "http://", "http:///x", "http://127.0.0.1:99999/", "http://[::1",
        "http://a b/", "http://127.0.0.1\r\nX: y/", "http://" + "a" * 300 + "/",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "fec0::1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:220:1::1", "::ffff:93.184.215.14", "64:ff9b::5db8:d70e"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_the_name_is_resolved_once(site: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads elsewhere at the second look leads nowhere: what was checked is connected to."""
    answers = iter(["127.0.0.1", "10.0.0.1"])

    def resolve(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, *rest, **more: resolve(host, port)
        if host == "rebinding.example" else real(host, port, *rest, **more)
    )  # fmt: skip
    assert fetch(f"http://rebinding.example:{site.server_port}/picture.png") == PICTURE
    assert next(answers) == "10.0.0.1"


def test_certificates_are_checked(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "1",
         "-subj", "/CN=localhost"], check=True, capture_output=True,
    )  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.asked = []  # type: ignore[attr-defined]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RequestError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(f"https://127.0.0.1:{server.server_port}/picture.png")
        server.shutdown()


def test_several_and_too_many(site: http.server.ThreadingHTTPServer) -> None:
    limits = FetchLimits(SECONDS, 2 * len(PICTURE), images=3, allowed=local)
    urls = [f"http://127.0.0.1:{site.server_port}/picture.png?{number}" for number in range(4)]
    assert set(Fetcher(limits).fetch_all(urls[:2]).values()) == {PICTURE}
    with pytest.raises(RequestError, match="names 4 images by URL; at most 3"):
        Fetcher(limits).fetch_all(urls)
    with pytest.raises(RequestError, match="the images of the request have more than"):
        Fetcher(limits).fetch_all(urls[:3])


def test_the_time_is_that_of_the_request(site: http.server.ThreadingHTTPServer) -> None:
    urls = [f"http://127.0.0.1:{site.server_port}/slow?{number}" for number in range(10)]
    before, began = threading.active_count(), time.monotonic()
    with pytest.raises(RequestError, match="took more than"):
        Fetcher(FetchLimits(SECONDS, allowed=local)).fetch_all(urls)
    assert time.monotonic() - began < 3 * SECONDS
    assert threading.active_count() <= before + 1  # the site's own


def test_a_cancelled_one_ends_at_once(site: http.server.ThreadingHTTPServer) -> None:
    fetcher = Fetcher(FetchLimits(60, allowed=local))
    threading.Timer(0.2, fetcher.cancel).start()
    began = time.monotonic()
    with pytest.raises(RequestError):
        fetcher.fetch_all([f"http://127.0.0.1:{site.server_port}/slow"])
    assert time.monotonic() - began < 3


def test_hosts_are_named_as_they_are(site: http.server.ThreadingHTTPServer) -> None:
    fetch(f"http://127.0.0.1:{site.server_port}/picture.png")
    _, headers = site.asked[-1]  # type: ignore[attr-defined]
    assert headers["Host"] == f"127.0.0.1:{site.server_port}"

    class Six(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6

    with Six(("::1", 0), Site) as six:
        six.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=six.serve_forever, daemon=True).start()
        url = f"http://[::1]:{six.server_port}/picture.png"
        limits = FetchLimits(SECONDS, allowed=lambda address: str(address) == "::1")
        assert Fetcher(limits).fetch_all([url]) == {url: PICTURE}
        assert six.asked[-1][1]["Host"] == f"[::1]:{six.server_port}"  # type: ignore[attr-defined]
        six.shutdown()


def test_a_server_that_may_fetch_asks_no_machine_of_its_own_network(
    site: http.server.ThreadingHTTPServer, bundle_a1: Path, tmp_path: Path
) -> None:
    before = len(site.asked)  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{site.server_port}/picture.png"
    with serving(bundle_a1, tmp_path / "store", "--allow-fetch") as server:
        for name in (url, url.replace("127.0.0.1", "localhost"), url.replace("127.0.0.1", "2130706433")):
            content = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": "What is it?"}]
            request = {"messages": [{"role": "user", "content": content}]}
            response = httpx2.post(f"{server.address}/v1/chat/completions", json=request)
            assert response.status_code == 403
            assert "public addresses only" in response.json()["error"]["message"]
    assert len(site.asked) == before  # type: ignore[attr-defined]
