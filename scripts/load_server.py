"""Clients in conversations about pictures: is anything lost or mixed up, how long do they wait, does memory grow?

Starts ``owl2 serve`` and, for each number of clients, lets them hold conversations of five turns with greedy answers;
every answer is compared with that of the same conversation in this process, alone. Some clients go away in the middle
of an answer. At last the server is killed and started again.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl2 import Owl2

TURNS, TOKENS = 5, 24
QUESTIONS = (
    "Describe the picture.",
    "What shapes are there?",
    "Which of them is the largest?",
    "What colour is it?",
    "How many are there?",
    "What is at the top?",
)
GONE = 0.1
"""Share of answers whose client goes away in their middle, and asks again."""


@dataclass
class Result:
    """What the clients of one run saw."""

    firsts: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gone: int = 0


def main() -> int:
    """Command line; 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="folder of images")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of clients")
    options = parser.parse_args()
    pictures = sorted(path for path in options.pictures.iterdir() if path.suffix in (".png", ".jpg"))
    expected = Expected(options.bundle, pictures)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.bundle, Path(folder))
        print("clients  answers  wrong  left    to the first token: median, 99 %    whole answer    memory, MiB")
        for count in options.clients:
            result = run(server.address, count, options.seconds, pictures, expected)
            wrong += len(result.wrong)
            print(
                f"{count:7}  {len(result.wholes):7}  {len(result.wrong):5}  {result.gone:4}    "
                f"{1000 * statistics.median(result.firsts):.0f} ms, {1000 * late(result.firsts):.0f} ms    "
                f"{1000 * statistics.median(result.wholes):.0f} ms    {server.memory():.0f}",
                flush=True,
            )
            for sentence in result.wrong[:5]:
                print(f"  {sentence}")
        server.process.kill()
        server.process.wait()
        again = Server(options.bundle, Path(folder))
        result = run(again.address, 4, min(20.0, options.seconds), pictures, expected)
        print(f"after kill -9 and a new start: {len(result.wholes)} answers, {len(result.wrong)} wrong")
        again.process.terminate()
        print(f"SIGTERM: exit code {again.process.wait(60)}")
    return int(bool(wrong or result.wrong))


def late(seconds: list[float]) -> float:
    """The 99th percentile."""
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]


class Server:
    """A server in a process of its own."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "owl2.runtime", "serve", str(bundle), "--port", "0", "--cache", "200MiB"]
        command += ["--store", str(folder / "store"), "--disk-cache", "1GiB"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = re.search(rb"is at (http\S+),", line)
            if found:
                self.address = found[1].decode()
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise SystemExit("the server did not start")

    def memory(self) -> float:
        """Resident MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


class Expected:
    """Answers of conversations in this process, each made once."""

    def __init__(self, bundle: Path, pictures: list[Path]) -> None:
        self._owl, self._pictures = Owl2.load(bundle), pictures
        self._known: dict[tuple[int, ...], str] = {}
        self._lock = threading.Lock()

    def answer(self, picture: int, questions: tuple[int, ...]) -> str:
        """To the last of the questions, after the others were answered."""
        key = (picture, *questions)
        with self._lock:
            if key not in self._known:
                chat = self._owl.chat()
                for index, question in enumerate(questions):
                    images = [self._pictures[picture]] if index == 0 else []
                    text = chat.ask(QUESTIONS[question], images, max_new_tokens=TOKENS).text
                    self._known[(picture, *questions[: index + 1])] = text
            return self._known[key]


def run(address: str, count: int, seconds: float, pictures: list[Path], expected: Expected) -> Result:
    """Conversations of so many clients."""
    result, lock, until = Result(), threading.Lock(), time.monotonic() + seconds
    uris = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in pictures]

    def client(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < until:
            picture = dice.randrange(len(uris))
            asked: tuple[int, ...] = ()
            messages: list[dict[str, Any]] = []
            for turn in range(TURNS):
                asked = (*asked, dice.randrange(len(QUESTIONS)))
                content: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[asked[-1]]}]
                if turn == 0:
                    content.insert(0, {"type": "image_url", "image_url": {"url": uris[picture]}})
                messages.append({"role": "user", "content": content})
                if dice.random() < GONE:
                    _ask(address, messages, leave=True)
                    with lock:
                        result.gone += 1
                first, whole, text = _ask(address, messages)
                right = expected.answer(picture, asked)
                with lock:
                    result.firsts.append(first)
                    result.wholes.append(whole)
                    if text != right:
                        result.wrong.append(f"{asked} about {pictures[picture].name}: {text!r} instead of {right!r}")
                messages.append({"role": "assistant", "content": right})

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def _ask(address: str, messages: list[dict[str, Any]], *, leave: bool = False) -> tuple[float, float, str]:
    """Seconds to the first token and to the end, and the text."""
    body = json.dumps({"messages": messages, "max_tokens": TOKENS, "temperature": 0, "stream": True}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
    began, first, text = time.perf_counter(), 0.0, ""
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return 0.0, 0.0, str(event["error"]["message"])
            delta = event["choices"][0]["delta"]
            if not first and "role" not in delta:
                first = time.perf_counter() - began
                if leave:
                    break
            text += delta.get("content", "")
    return first, time.perf_counter() - began, text


if __name__ == "__main__":
    raise SystemExit(main())
