"""``owl2.json``: planned for, inspected, loaded."""

import json
import random
from pathlib import Path

import owl2
from fuzz import mutate
from fuzz.bundles import command, own_copy, signed
from fuzz.surface import Input, Surface
from owl2.runtime.spec import MANIFEST

TARGETS = ("plan",) * 12 + ("info",) * 4 + ("load",)


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On a copy of the base bundle."""
    bundle = own_copy(folder, scratch)
    original = (bundle / MANIFEST).read_bytes()

    def make(rng: random.Random) -> Input:
        target, kind = rng.choice(TARGETS), rng.random()
        if kind < 0.4:
            return Input(target, mutate.change_json(rng, original))
        content = json.loads(original)
        for _ in range(rng.choice((1, 1, 2))):
            content = mutate.change_value(rng, content)
        return Input(target, mutate.written(rng, signed(content)))

    def run(given: Input) -> None:
        (bundle / MANIFEST).write_bytes(given.content)
        match given.target:
            case "plan":
                str(owl2.plan(bundle, device="orin-nx-16gb"))
            case "info":
                command("info", bundle)
            case _:
                owl2.Owl2.load(bundle).close()

    return Surface(make, run)
