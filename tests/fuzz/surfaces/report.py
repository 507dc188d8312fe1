"""``report.json``: shown by ``owl2 info``, and read for the limits of the golden prompts."""

import random
from pathlib import Path

import owl2
from fuzz import mutate
from fuzz.bundles import command, own_copy, sign
from fuzz.surface import Input, Surface
from owl2.runtime.spec import REPORT


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On a copy of the base bundle."""
    bundle = own_copy(folder, scratch)
    original = (bundle / REPORT).read_bytes()

    def make(rng: random.Random) -> Input:
        return Input(rng.choice(("info", "info", "verify")), mutate.change_json(rng, original))

    def run(given: Input) -> None:
        (bundle / REPORT).write_bytes(given.content)
        sign(bundle, REPORT)
        if given.target == "info":
            command("info", bundle)
            command("info", bundle, "--json")
        else:
            owl2.verify(bundle)

    return Surface(make, run)
