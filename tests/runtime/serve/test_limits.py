"""What a server does to requests that mean it no good; honest ones go on."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import GOLDEN
from PIL import Image
from serving import RunningServer, serving

KEY = "secret"
ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def strict(bundle_a1: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    store = tmp_path_factory.mktemp("strict") / "store"
    options = ("--api-key", KEY, "--max-body", "100k", "--max-active", "1", "--max-waiting", "1")
    with serving(bundle_a1, store, *options) as it:
        yield it


def send(
    server: RunningServer, path: str = "/v1/chat/completions", data: object = ASK, **headers: str
) -> tuple[int, Any]:
    body = data if isinstance(data, bytes) or data is None else json.dumps(data).encode()
    settings = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    request = urllib.request.Request(server.address + path, data=body, headers=settings)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def test_an_honest_client_is_answered(strict: RunningServer) -> None:
    status, answer = send(strict)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", "Basic secret", "Bearer secret2", "secret"])
def test_a_wrong_key(strict: RunningServer, key: str) -> None:
    for path, data in (("/v1/chat/completions", ASK), ("/v1/models", None), ("/metrics", None)):
        status, body = send(strict, path, data, Authorization=key)
        assert (status, body["error"]["message"]) == (401, "the API key is missing or wrong")
    assert send(strict, "/health", None, Authorization=key)[0] == 200


def test_bodies_that_are_too_large(strict: RunningServer) -> None:
    status, body = send(strict, data=b" " * 200_000)
    assert status == 413
    assert "102400 bytes" in body["error"]["message"]
    # One that does not say its size.
    with _connected(strict) as raw:
        raw.sendall(_head("Transfer-Encoding: chunked"))
        with contextlib.suppress(OSError):
            for _ in range(300):
                raw.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert b"413" in raw.recv(100)
    assert send(strict)[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 50_000, "nested"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"messages": [], "messages": []}', "more than once"),
        (b'{"messages": 1}', "must be a list"),
        (b"[]", "JSON object"),
        (b"{}", "no messages"),
    ],
)
def test_bodies_that_make_no_sense(strict: RunningServer, body: bytes, message: str) -> None:
    status, answer = send(strict, data=body)
    assert status == 400
    assert message in answer["error"]["message"]


@pytest.mark.parametrize("name", ["..", "%2e%2e%2fx", "a" * 16 + "/../../x", "A" * 16, "", "x" * 5000])
def test_names_that_lead_elsewhere(strict: RunningServer, name: str) -> None:
    for path in (f"/owl2/conversations/{name}", f"/owl2/pictures/{name}"):
        status, _ = send(strict, path, None)
        assert status in (404, 405, 200 if name == "" and "conv" in path else 404)


def test_a_bomb_is_not_kept(strict: RunningServer) -> None:
    png = (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
        + (100_000).to_bytes(4, "big") * 2
        + b"\x08\x02\x00\x00\x00\x00\x00\x00\x00"
    )
    status, body = send(strict, "/owl2/pictures", png)
    assert status == 400
    assert "error" in body


def test_no_more_than_may_wait(strict: RunningServer) -> None:
    long = {**ASK, "max_tokens": 4000, "temperature": 1.5, "messages": [{"role": "user", "content": "go on"}]}
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(send(strict, data=long)[0])) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {200, 429}
    assert send(strict)[0] == 200


def test_idle_connections_are_closed_and_disturb_nobody(strict: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(_connected(strict)) for _ in range(1000)]
        idle[0].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")  # never ends
        began = time.monotonic()
        assert send(strict)[0] == 200
        assert time.monotonic() - began < 5
        idle[0].settimeout(20)
        assert idle[0].recv(1) == b""
        assert idle[-1].recv(1) == b""


def _connected(server: RunningServer) -> socket.socket:
    parts = urlsplit(server.address)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 0), timeout=20)


def _head(*lines: str) -> bytes:
    fixed = ("POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {KEY}", *lines)
    return ("\r\n".join(fixed) + "\r\n\r\n").encode()


def test_another_interface_needs_a_key(bundle_a1: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="lets other machines in"),
        serving(bundle_a1, tmp_path / "store", "--host", "0.0.0.0"),
    ):
        pass


def test_an_empty_key_is_no_key(bundle_a1: Path, tmp_path: Path) -> None:
    options = ("--host", "0.0.0.0", "--api-key", "")
    with pytest.raises(AssertionError, match="is empty"), serving(bundle_a1, tmp_path / "store", *options):
        pass


def test_clients_that_leave_before_their_turn_take_no_place(strict: RunningServer) -> None:
    body = json.dumps({**ASK, "max_tokens": 4000}).encode()
    for stream in (b"", b"stream"):
        for _ in range(6):
            with _connected(strict) as raw:
                data = body.replace(b'"max_tokens"', b'"stream": true, "max_tokens"') if stream else body
                raw.sendall(_head(f"Content-Length: {len(data)}") + data)
        until = time.monotonic() + 10
        while send(strict)[0] == 429:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_the_end_is_told_to_those_who_wait(bundle_a1: Path, tmp_path: Path) -> None:
    """SIGTERM: running answers end by themselves or with an error event, waiting ones are refused; exit code 0."""
    with serving(bundle_a1, tmp_path / "store", "--max-active", "1") as server:
        long = {**ASK, "max_tokens": 4000, "temperature": 1.5}
        results: list[int] = []

        def one() -> None:
            with contextlib.suppress(OSError):
                results.append(send(server, data=long)[0])

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert server.stop() == 0
        for thread in threads:
            thread.join()
        assert set(results) <= {200, 503}
        assert "Traceback" not in server.log.read_text()


def test_pictures_that_are_not_shown_yet_are_kept(strict: RunningServer) -> None:
    image = next(iter(sorted((GOLDEN / "images").glob("*.png")))).read_bytes()
    status, made = send(strict, "/owl2/pictures", image)
    assert status == 200
    name = "0123456789abcdef"
    url = f"{strict.address}/owl2/conversations/{name}"
    for method, body in (("PUT", b'{"messages": []}'), ("DELETE", None)):
        request = urllib.request.Request(url, data=body, method=method, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as response:
            assert response.status == 204
    picture = urllib.request.Request(
        f"{strict.address}/owl2/pictures/{made['id']}", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(picture) as response:
        assert response.read() == image


def connected(server: RunningServer, head: str) -> socket.socket:
    parts = urlsplit(server.address)
    made = socket.create_connection((str(parts.hostname), int(parts.port or 80)), timeout=60)
    made.sendall(head.encode())
    return made


def test_connections_that_get_nowhere_after_a_request_are_closed(strict: RunningServer) -> None:
    head = "Host: localhost\r\nContent-Length: 1000\r\n"
    for begin, more in (
        ("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", "G"),
        (f"POST /nothing HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n{head}\r\n", "x"),
        (f"POST /v1/score HTTP/1.1\r\n{head}\r\n", "x"),
    ):
        with connected(strict, begin) as made:
            assert made.recv(4096).startswith(b"HTTP/1.1 ")
            made.sendall(more.encode())
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while made.recv(4096):
                    pass
            assert time.monotonic() - began < 25


def test_a_slow_body_is_refused_in_time(strict: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000\r\n\r\n"
    with connected(strict, head) as made:
        made.settimeout(45)
        assert made.recv(4096).startswith(b"HTTP/1.1 408")


def test_bombs_at_once_leave_room_for_others(bundle_a1: Path, tmp_path: Path) -> None:
    """A file of 250 kB that is 768 MB of pixels, asked for a dozen times."""
    bomb = tmp_path / "bomb.png"
    Image.new("L", (16000, 16000)).save(bomb)
    with serving(bundle_a1, tmp_path / "store") as server:
        name = json.loads(
            urllib.request.urlopen(
                urllib.request.Request(f"{server.address}/owl2/pictures", bomb.read_bytes(), method="POST"), timeout=60
            ).read()
        )["id"]
        address = f"{server.address}/owl2/pictures/{name}?seen=resize"

        def look() -> None:
            with contextlib.suppress(urllib.error.HTTPError):  # where there is too little memory for one
                urllib.request.urlopen(address, timeout=300).read()

        threads = [threading.Thread(target=look) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        began = time.monotonic()
        assert send(server)[0] == 200
        waited = time.monotonic() - began
        for thread in threads:
            thread.join()
        peak = int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        assert peak < 3000  # two at a time
        assert waited < 20


def test_bodies_of_all_requests_are_bounded(strict: RunningServer) -> None:
    """100k each at most, and four times that of all."""
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 90000\r\n\r\n"
    held = [connected(strict, head + "x" * 80000) for _ in range(4)]
    time.sleep(0.5)
    with connected(strict, head + "x" * 89999 + "}") as one:
        assert one.recv(4096).startswith((b"HTTP/1.1 503", b"HTTP/1.1 400"))
        refused = send(strict, "/v1/score", b"x" * 99_000)
    for made in held:
        made.close()
    assert refused[0] == 503
    time.sleep(0.5)
    assert send(strict)[0] == 200


def test_lists_and_deletions_at_once(strict: RunningServer) -> None:
    """Nothing that another request deletes meanwhile is an error."""
    failed: list[int] = []

    def one(number: int) -> None:
        for turn in range(20):
            name = f"{(number * 20 + turn) % 12:016x}"
            data = {"messages": [{"role": "user", "text": "x"}]}
            body = json.dumps(data).encode()
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            for method, path in (("PUT", f"/{name}"), ("GET", ""), ("DELETE", f"/{name}")):
                request = urllib.request.Request(
                    f"{strict.address}/owl2/conversations{path}",
                    body if method == "PUT" else None,
                    headers,
                    method=method,
                )
                try:
                    urllib.request.urlopen(request, timeout=60).read()
                except urllib.error.HTTPError as error:
                    failed.append(error.code)

    threads = [threading.Thread(target=one, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
