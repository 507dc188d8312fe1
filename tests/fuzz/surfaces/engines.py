"""Records of TensorRT engines, ``engine.json``: inspected without any GPU."""

import json
import random
from pathlib import Path

from fuzz import mutate
from fuzz.bundles import command, own_copy, write_manifest
from fuzz.surface import Input, Surface
from owl2.runtime.backends.tensorrt import records
from owl2.runtime.bundle import read_manifest
from owl2.runtime.spec import MANIFEST
from owl2.runtime.verification import FileEntry, hash_file

NAMES = ("tensorrt-sm87",) * 20 + (
    "tensorrt-rtx-sm120",
    "tensorrt-sm9",
    "../x",
    "",
    "\x1b[31m",
    "tensorrt-sm" + "9" * 5000,
)


def open_surface(folder: Path, scratch: Path) -> Surface:
    """On a copy of the base bundle, with engines that nothing can run."""
    bundle = own_copy(folder, scratch)
    manifest = read_manifest(bundle)
    engines = dict.fromkeys((records.DECODER_ENGINE, records.VISION_ENGINE), b"not an engine")
    place = bundle / records.FOLDER / NAMES[0]
    place.mkdir(parents=True)
    for name, content in engines.items():
        (place / name).write_bytes(content)
    record = records.EngineRecord(
        format=records.RECORD_FORMAT, kind="tensorrt", tensorrt="10.3", compute_capability=(8, 7), gpu="Orin",
        driver="540", context=512, prefill=128, images=1,
        source={name: manifest.files[name].sha256 for name in ("decoder.onnx", "vision.onnx")},
        files={name: FileEntry(len(content), hash_file(place / name)) for name, content in engines.items()},
    )  # fmt: skip
    original = json.dumps(record.to_json()).encode()
    content = json.loads((bundle / MANIFEST).read_text())

    def make(rng: random.Random) -> Input:
        return Input(str(NAMES.index(rng.choice(NAMES))), mutate.change_json(rng, original))

    def run(given: Input) -> None:
        (place / records.RECORD).write_bytes(given.content)
        write_manifest(bundle, content | {"engines": {NAMES[int(given.target)]: hash_file(place / records.RECORD)}})
        command("info", bundle)

    return Surface(make, run)
