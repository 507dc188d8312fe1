"""``goldens.npz``: an archive of arrays that ``owl2 verify`` reads."""

import random
from pathlib import Path

import owl2
from fuzz import binary
from fuzz.bundles import own_copy, sign
from fuzz.surface import Input, Surface
from owl2.runtime.bundle import Bundle, read_manifest
from owl2.runtime.evaluation.goldens import read_goldens
from owl2.runtime.spec import GOLDENS

TARGETS = ("read",) * 15 + ("verify",)


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On a copy of the base bundle."""
    bundle = own_copy(folder, scratch)
    original, opened = (bundle / GOLDENS).read_bytes(), Bundle(bundle, read_manifest(bundle))

    def make(rng: random.Random) -> Input:
        return Input(rng.choice(TARGETS), binary.change_zip(rng, original))

    def run(given: Input) -> None:
        (bundle / GOLDENS).write_bytes(given.content)
        if given.target == "read":
            read_goldens(opened)
        else:
            sign(bundle, GOLDENS)
            owl2.verify(bundle)

    return Surface(make, run)
