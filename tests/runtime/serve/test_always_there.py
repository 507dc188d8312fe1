"""Memory that is given back and taken again, the browser that opens, and clients that do not read."""

import asyncio
import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from serving import RunningServer, serving
from starlette.types import Message

from owl2.runtime.cli.serve import serve
from owl2.runtime.serve.app import EventResponse

ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def answer(server: RunningServer) -> str:
    body = json.dumps(ASK).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def loaded(server: RunningServer) -> bool:
    with urllib.request.urlopen(f"{server.address}/health", timeout=60) as response:
        return bool(json.load(response)["loaded"])


def mapped(server: RunningServer) -> str:
    return Path(f"/proc/{server.process.pid}/maps").read_text()


def test_memory_is_given_back_and_taken_again(bundle_a1: Path, tmp_path: Path) -> None:
    weights = str(bundle_a1 / "decoder.onnx.data")
    with serving(bundle_a1, tmp_path / "store", "--idle-unload", "1s") as server:
        first = answer(server)
        assert weights in mapped(server)
        until = time.monotonic() + 20
        while loaded(server) and time.monotonic() < until:
            time.sleep(0.2)
        assert not loaded(server)
        assert weights not in mapped(server)
        assert answer(server) == first
        assert loaded(server)
        for _ in range(8):  # one that is asked stays
            time.sleep(0.25)
            assert answer(server) == first
            assert loaded(server)
        assert server.stop() == 0


def test_the_browser_opens(bundle_a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    # Like w3m: it asks for the page before it returns.
    ask = "import sys, urllib.request as u; u.urlopen(sys.argv[1]).read()"
    browser.write_text(f'#!/bin/sh\n{sys.executable} -c "{ask}" "$1" && echo "$1" > {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setitem(os.environ, "BROWSER", str(browser))
    with serving(bundle_a1, tmp_path / "store", "--open") as server:
        until = time.monotonic() + 20
        while not (opened.exists() and opened.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        assert opened.read_text().strip() == server.address


def test_a_client_that_does_not_read_is_left() -> None:
    ended = []

    async def events() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            ended.append(True)

    async def never() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    async def full(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def run() -> None:
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        rest = events()
        await EventResponse(await anext(rest), rest, seconds=0.2)(scope, never, full)

    began = time.monotonic()
    asyncio.run(run())
    assert ended == [True]
    assert time.monotonic() - began < 10


def test_the_unit_asks_for_what_there_is() -> None:
    folder = Path(__file__).parents[3] / "contrib"
    [command] = re.findall(r"^ExecStart=(.*)$", (folder / "owl2.service").read_text(), re.MULTILINE)
    context = serve.make_context("serve", command.split()[2:])
    assert context.params["idle_unload"] == 600
    [opened] = re.findall(r"^Exec=xdg-open (.*)$", (folder / "owl2.desktop").read_text(), re.MULTILINE)
    assert opened == f"http://{context.params['host']}:{context.params['port']}"
