"""Arguments of the public functions: values of every type, possible and impossible, several at a time."""

import base64
import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import owl2
from fuzz import mutate
from fuzz.bundles import BUNDLE, PICTURE
from fuzz.surface import Input, Surface
from owl2 import GenerationConfig, Owl2


class Odd:
    """A value that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no text for this")


def deep(levels: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def _closed() -> Image.Image:
    image = Image.open(PICTURE)
    image.close()
    return image


VALUES: dict[str, Callable[[], Any]] = {
    "odd": Odd,
    "object": object,
    "class": lambda: type,
    "bytes": lambda: b"USER: Hi",
    "bytearray": lambda: bytearray(b"x" * 5000),
    "complex": lambda: 1j,
    "ellipsis": lambda: ...,
    "generator": lambda: (x for x in "ab"),
    "set": lambda: {"a", 1},
    "deep": lambda: deep(5_000),
    "long list": lambda: ["x"] * 100_000,
    "numpy integer": lambda: np.int64(3),
    "numpy number": lambda: np.float32(0.5),
    "numpy bool": lambda: np.bool_(True),
    "numpy text": lambda: np.str_("USER: Hi"),
    "array": lambda: np.zeros((8, 9, 3), np.uint8),
    "grey array": lambda: np.zeros((8, 9), np.uint8),
    "empty array": lambda: np.zeros((0, 9, 3), np.uint8),
    "flat array": lambda: np.zeros(9, np.uint8),
    "number array": lambda: np.zeros((8, 9, 3), np.float32),
    "object array": lambda: np.array([None, Odd()], dtype=object),
    "large array": lambda: np.broadcast_to(np.uint8(1), (100_000, 100_000, 3)),
    "turned array": lambda: np.zeros((8, 9, 3), np.uint8)[::-1, ::-1],
    "image": lambda: Image.new("RGB", (9, 8)),
    "palette image": lambda: Image.new("P", (9, 8)),
    "closed image": _closed,
    "picture": lambda: PICTURE,
    "picture text": lambda: str(PICTURE),
    "pictures": lambda: [PICTURE, PICTURE],
    "folder": lambda: Path("/"),
    "device": lambda: Path("/dev/zero"),
    "missing": lambda: Path("/nowhere/at/all"),
    "long path": lambda: Path("x" * 5000),
    "null path": lambda: Path("a\0b"),
    "config": lambda: GenerationConfig(max_new_tokens=1),
    "lambda": lambda: lambda progress: None,
    "raising": lambda: _raising,
    "huge": lambda: 10**5000,
    "messages": lambda: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    "messages with image": lambda: [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Ho"},
    ],
    "odd messages": lambda: [{"role": Odd(), "content": Odd()}],
    "odd parts": lambda: [{"role": "user", "content": [Odd(), {"type": "image", "image": Odd()}]}],
}
"""What JSON has no form for."""


def _raising(_: object) -> None:
    raise OwnError


class OwnError(Exception):
    """Raised by a caller's own function, which passes through."""


GENERATION: dict[str, list[Any]] = {
    "max_new_tokens": [1, 2], "temperature": [0, 0.7], "top_k": [0, 5], "top_p": [1, 0.5], "min_p": [0, 0.1],
    "repetition_penalty": [1, 1.2], "seed": [None, 1], "stop": [[], "x", ["x", "y"]],
}  # fmt: skip
LOADING: dict[str, list[Any]] = {
    "device": ["cpu"], "threads": [None, 1], "context": [None, 64], "kv_cache": [None, "int8"],
    "check_memory": [True, False],
}  # fmt: skip
ASKING: dict[str, list[Any]] = {"images": [None, {"is": "picture"}], "preprocess": [None, "pad"], "config": [None]}
FUNCTIONS: dict[str, dict[str, list[Any]]] = {
    "load": {"bundle": [{"is": "bundle"}], "verify": [False, True], "progress": [None], **LOADING},
    "ask": {"question": ["Hi"], **ASKING, **GENERATION},
    "stream": {"prompt": ["USER: Hi ASSISTANT:"], **ASKING, **GENERATION},
    "generate": {"prompt": ["USER: <|image|>Hi ASSISTANT:"], **ASKING, **GENERATION},
    "logits": {"prompt": ["USER: Hi"], "images": [None], "preprocess": [None]},
    "chat": {"messages": [[], {"is": "messages"}, {"is": "messages with image"}]},
    "config": GENERATION,
    "plan": {
        "bundle": [{"is": "bundle"}],
        "device": ["orin-nx-16gb"],
        "context": [None, 64],
        "kv_cache": [None, "int8"],
        "images": [0, 1],
    },
    "evaluate": {
        "bundle": [{"is": "loaded"}, {"is": "bundle"}],
        "data": [{"is": "data"}],
        "against": [None],
        "limit": [None, 1],
        "max_new_tokens": [1],
        "device": [None, "cpu"],
        "threads": [None],
        "context": [None],
        "kv_cache": [None],
        "preprocess": [None, "crop"],
        "check_memory": [True],
        "progress": [None],
    },
    "verify": {
        "bundle": [{"is": "bundle"}],
        "device": ["cpu"],
        "threads": [None, 1],
        "check_memory": [True],
        "progress": [None],
    },
}
WEIGHTS = {"verify": 1, "evaluate": 2, "load": 3}


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On the base bundle, loaded once for what needs it loaded."""
    bundle, data = folder / BUNDLE, scratch / "data.jsonl"
    owl = Owl2.load(bundle)
    data.write_text('{"question": "Hi?", "answers": ["yes"]}\n')
    values = VALUES | {"bundle": lambda: bundle, "loaded": lambda: owl, "data": lambda: data}
    names = [name for name in FUNCTIONS for _ in range(WEIGHTS.get(name, 8))]
    calls: dict[str, Callable[..., object]] = {
        "load": lambda **given: Owl2.load(**given).close(),
        "ask": lambda **given: owl.chat().ask(**given),
        "stream": lambda **given: owl.stream(**given).read(),
        "generate": owl.generate,
        "logits": owl.logits,
        "chat": lambda **given: owl.chat(**given).messages,
        "config": GenerationConfig,
        "plan": lambda **given: str(owl2.plan(**given)),
        "evaluate": owl2.evaluate,
        "verify": owl2.verify,
    }

    def make(rng: random.Random) -> Input:
        name = rng.choice(names)
        return Input(name, json.dumps(_arguments(rng, FUNCTIONS[name])).encode())

    def run(given: Input) -> None:
        arguments = {key: _value(values, stated) for key, stated in json.loads(given.content).items()}
        with contextlib.suppress(OwnError):
            calls[given.target](**arguments)

    return Surface(make, run)


def _arguments(rng: random.Random, known: dict[str, list[Any]]) -> dict[str, Any]:
    """The required arguments and some others, a few of them hostile: ``{"is": name}`` stands for one of the values."""
    required = {next(iter(known)), "data"}
    given = {key: rng.choice(usual) for key, usual in known.items() if key in required or rng.random() < 0.15}
    for _ in range(rng.choice((1, 1, 1, 2))):
        key = rng.choice(list(known)) if rng.random() < 0.97 else rng.choice(("max_tokens", "x", "é"))
        given[key] = {"is": rng.choice(list(VALUES))} if rng.random() < 0.5 else _stated(mutate.value(rng))
    return given


def _stated(value: Any) -> Any:
    """A value that JSON may not hold as it is: text in pieces of surrogates, or an object with the key "is"."""
    return {"json": base64.b64encode(json.dumps(value).encode()).decode()}


def _value(values: dict[str, Callable[[], Any]], stated: Any) -> Any:
    match stated:
        case {"is": name}:
            return values[name]()
        case {"json": encoded}:
            return json.loads(base64.b64decode(encoded))
        case _:
            return stated
