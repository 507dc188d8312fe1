"""Clients that ask for scores: how many a second, how long they wait, and is every number right?

Starts ``owl2 serve`` and, for each number of clients, lets them send one to four images of a folder at a time; every
score is compared with that of the same image in this process. At last the server is stopped with requests in flight.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import signal
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from load_server import Server, late

from owl2 import Owl2


def main() -> int:
    """Command line; 1 if a score was wrong or a request left without an answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, help="folder of .png images")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of clients")
    options = parser.parse_args()
    paths = sorted(options.images.glob("*.png"))
    uris = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in paths]
    with Owl2.load(options.bundle) as owl:
        expected = [score.to_json() | {"image": None} for score in owl.score(paths)]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.bundle, Path(folder))
        print("clients  requests/s  images/s  wrong    median, 99 %")
        for count in options.clients:
            times, images, wrong = _run(server.address, count, options.seconds, uris, expected)
            failed += wrong
            print(
                f"{count:7}  {len(times) / options.seconds:10.1f}  {images / options.seconds:8.1f}  {wrong:5}    "
                f"{1000 * statistics.median(times):.0f} ms, {1000 * late(times):.0f} ms",
                flush=True,
            )
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(_ask(server.address, uris * 4)[0])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        told = all(status in (200, 503) for status in statuses) and len(statuses) == len(threads)
        print(f"stopped with {len(threads)} requests in flight: {sorted(statuses)}, exit {server.process.wait(60)}")
    return int(failed > 0 or not told)


def _run(
    address: str, count: int, seconds: float, uris: list[str], expected: list[dict[str, Any]]
) -> tuple[list[float], int, int]:
    times: list[float] = []
    images, wrong, lock, until = 0, 0, threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        nonlocal images, wrong
        dice = random.Random(number)
        while time.monotonic() < until:
            places = dice.choices(range(len(uris)), k=dice.randint(1, 4))
            began = time.perf_counter()
            status, body = _ask(address, [uris[place] for place in places])
            took = time.perf_counter() - began
            right = status == 200 and [entry["scores"] for entry in body["data"]] == [[expected[at]] for at in places]
            with lock:
                times.append(took)
                images += len(places)
                wrong += not right

    threads = [threading.Thread(target=client, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, images, wrong


def _ask(address: str, images: list[str]) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/score", json.dumps({"images": images}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


if __name__ == "__main__":
    raise SystemExit(main())
