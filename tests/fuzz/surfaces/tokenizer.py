"""The tokenizer's three files: read, and used where they can be."""

import random
from pathlib import Path

from fuzz import binary, mutate
from fuzz.bundles import own_copy
from fuzz.surface import Input, Surface
from owl2.runtime.families.mplug_owl2.tokenizer import StreamDecoder, Tokenizer

NAMES = ("tokenizer.model",) * 3 + ("tokenizer_config.json", "special_tokens_map.json")
TEXT = "USER: <|image|>What is  it? é🦉\n ASSISTANT: A cat.</s>"


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On a copy of the base bundle."""
    bundle = own_copy(folder, scratch)
    originals = {name: (bundle / name).read_bytes() for name in NAMES}

    def make(rng: random.Random) -> Input:
        name = rng.choice(NAMES)
        change = binary.change_protobuf if name == "tokenizer.model" else mutate.change_json
        return Input(name, change(rng, originals[name]))

    def run(given: Input) -> None:
        (bundle / given.target).write_bytes(given.content)
        try:
            tokenizer = Tokenizer.load(bundle)
            ids = [token for token in tokenizer.encode_prompt(TEXT) if token >= 0]
            tokenizer.decode(ids)
            decoder = StreamDecoder(tokenizer)
            for token in ids:
                decoder.feed(token)
            decoder.flush()
        finally:
            (bundle / given.target).write_bytes(originals[given.target])

    return Surface(make, run)
