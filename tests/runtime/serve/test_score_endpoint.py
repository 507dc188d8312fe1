"""Scores for many clients: those of Python, whoever asks beside."""

import base64
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN
from serving import RunningServer, serving

from owl2 import Owl2

IMAGES = sorted((GOLDEN / "images").glob("*.png"))


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


URIS = [data_uri(path.read_bytes()) for path in IMAGES]


def send(server: RunningServer, **fields: Any) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}/v1/score", json.dumps(fields).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(owl: Owl2, image: Path, task: str = "quality", **settings: Any) -> dict[str, Any]:
    return owl.score(image, task, **settings)[0].to_json() | {"image": None}


def test_scores_are_those_of_python(owl: Owl2, server: RunningServer) -> None:
    status, body = send(server, images=URIS)
    assert status == 200
    assert [entry["index"] for entry in body["data"]] == list(range(len(URIS)))
    assert [entry["scores"] for entry in body["data"]] == [[expected(owl, path)] for path in IMAGES]
    _, both = send(server, images=URIS[:1], task=["quality", "aesthetics"])
    assert both["data"][0]["scores"] == [expected(owl, IMAGES[0]), expected(owl, IMAGES[0], "aesthetics")]
    settings: dict[str, Any] = {"levels": ["good", "bad"], "weights": [1, 0], "preprocess": "crop"}
    _, own = send(server, images=[IMAGES[0].name], **settings)  # of the folder that it may read
    assert own["data"][0]["scores"] == [expected(owl, IMAGES[0], **settings)]


def test_a_broken_image_spoils_no_other(owl: Owl2, server: RunningServer) -> None:
    status, body = send(server, images=[URIS[0], data_uri(IMAGES[0].read_bytes()[:100]), URIS[1], "data:image/png,x"])
    assert status == 200
    assert [("scores" in entry) for entry in body["data"]] == [True, False, True, False]
    assert "cannot read" in body["data"][1]["error"]["message"]
    assert body["data"][2]["scores"] == [expected(owl, IMAGES[1])]


def test_many_clients_at_once_and_chats_beside(owl: Owl2, server: RunningServer) -> None:
    wanted = {task: [expected(owl, path, task) for path in IMAGES] for task in ("quality", "aesthetics")}
    chat = owl.chat().ask("What is this?", max_new_tokens=20).text

    def one(number: int) -> None:
        if number % 5 == 4:
            fields = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 20, "temperature": 0}
            headers = {"Content-Type": "application/json"}
            address = f"{server.address}/v1/chat/completions"
            with urllib.request.urlopen(
                urllib.request.Request(address, json.dumps(fields).encode(), headers), timeout=60
            ) as response:
                assert json.load(response)["choices"][0]["message"]["content"] == chat
            return
        task = ("quality", "aesthetics")[number % 2]
        places = [(number + step) % len(URIS) for step in range(1 + number % 4)]
        status, body = send(server, images=[URIS[place] for place in places], task=task)
        assert status == 200
        assert [entry["scores"] for entry in body["data"]] == [[wanted[task][place]] for place in places]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(80)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no images"),
        ({"images": []}, "1 to 256 images, got 0"),
        ({"images": "data:"}, "images must be a list"),
        ({"images": [3]}, "images must be a list"),
        ({"images": URIS[:1] * 257}, "1 to 256 images, got 257"),
        ({"images": URIS[:1], "task": "smell"}, "does not score 'smell'"),
        ({"images": URIS[:1], "task": []}, None),
        ({"images": URIS[:1], "task": {"a": 1}}, "task must be a name"),
        ({"images": URIS[:1], "preset": "/etc/passwd.json"}, "preset '/etc/passwd.json' is not known"),
        ({"images": URIS[:1], "preset": ["q-align"]}, "preset"),
        ({"images": URIS[:1], "prompt": 3}, "prompt must be a text"),
        ({"images": URIS[:1], "prompt": "no image"}, "has no <|image|>"),
        ({"images": URIS[:1], "weights": "12345"}, "weights must be a list"),
        ({"images": URIS[:1], "weights": [1, 2, 3, 4, "x"]}, "weights must be numbers"),
        ({"images": URIS[:1], "weights": [1e200, -1e200, 2, 3, 4]}, "weights must be numbers from -1e6 to 1e6"),
        ({"images": URIS[:1], "task": [1, None], "prompt": "<|image|>"}, "task must be a name or a list of names"),
        ({"images": URIS[:1], "task": list("abcde"), "prompt": "<|image|>"}, "1 to 4 tasks, got 5"),
        ({"images": URIS[:1], "levels": ["x" * 1000, "y"], "weights": [1, 0]}, "words of at most 100 characters"),
        ({"images": URIS[:1], "color": "red"}, "'color' is not a field"),
        ({"images": ["../../secret.png"]}, "outside of the folder"),
        ({"images": ["https://example.com/a.png"]}, "start it with --allow-fetch"),
    ],
)
def test_what_makes_no_sense_is_refused(server: RunningServer, fields: dict[str, Any], message: str | None) -> None:
    status, body = send(server, **fields)
    if message is None:
        assert status == 200  # an empty task is the usual one
        return
    assert status in (400, 403)
    assert message in body["error"]["message"]


def test_nothing_is_lost_when_it_stops(owl: Owl2, bundle_a1: Path, tmp_path: Path) -> None:
    """Requests in flight are answered, or told that the server stops; none is left without a word."""
    with serving(bundle_a1, tmp_path / "store") as server:
        outcomes: list[int] = []

        def one() -> None:
            status, body = send(server, images=URIS * 8)
            outcomes.append(status)
            if status == 200:
                assert len(body["data"]) == 8 * len(URIS)
            else:
                assert (status, "stopping" in body["error"]["message"]) == (503, True)

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert server.stop(signal.SIGTERM) == 0
        for thread in threads:
            thread.join()
        assert len(outcomes) == 6
