"""Graphs: loaded by ONNX Runtime and run. They are code, so that a crash here breaks no promise, but is counted."""

import random
from pathlib import Path

from fuzz import binary, mutate
from fuzz.bundles import PICTURE, own_copy, sign
from fuzz.surface import Input, Surface
from owl2 import Owl2
from owl2.runtime.spec import KvType

NAMES = ("decoder.onnx",) * 4 + ("vision.onnx",) * 4 + ("decoder.kv_int8.onnx", "decoder.onnx.data", "vision.onnx.data")


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On a copy of the base bundle."""
    bundle = own_copy(folder, scratch)
    originals = {name: (bundle / name).read_bytes() for name in NAMES}

    def make(rng: random.Random) -> Input:
        name = rng.choice(NAMES)
        change = mutate.change_bytes if name.endswith(".data") else binary.change_protobuf
        return Input(name, change(rng, originals[name]))

    def run(given: Input) -> None:
        (bundle / given.target).write_bytes(given.content)
        sign(bundle, given.target)
        try:
            kv_cache: KvType | None = "int8" if given.target == "decoder.kv_int8.onnx" else None
            with Owl2.load(bundle, kv_cache=kv_cache) as owl:
                owl.generate("USER: <|image|>Hi ASSISTANT:", images=PICTURE, max_new_tokens=2)
        finally:
            (bundle / given.target).write_bytes(originals[given.target])
            sign(bundle, given.target)

    return Surface(make, run)
