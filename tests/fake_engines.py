"""Bundles with "engines" for the GPU of :mod:`fake_tensorrt`, and models that run them there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_tensorrt import Copy, FakeEngineFile, FakeGpu, FakeTensorRt, Profile
from numpy.typing import NDArray

from owl2 import Owl2
from owl2.export.tensorrt.profiles import Limits, decoder_profiles, vision_profile
from owl2.runtime import spec
from owl2.runtime.backends.ort.engine import OrtEngine
from owl2.runtime.backends.tensorrt.engine import TensorRtEngine
from owl2.runtime.backends.tensorrt.records import RECORD_FORMAT, EngineRecord, find_record
from owl2.runtime.backends.tensorrt.rows import DeviceRows
from owl2.runtime.bundle import Bundle, read_manifest
from owl2.runtime.engine import EngineOptions, Floats
from owl2.runtime.load import Preparation
from owl2.runtime.placement import EngineKind, Placement
from owl2.runtime.verification import FileEntry, hash_file, signatures_of

VERSION = "10.3.0"
CONTEXT = 640


def build(folder: Path, **changes: Any) -> EngineRecord:
    """Put "engines" into a bundle, with the profiles that the exporter builds with; ``changes`` are of the record."""
    bundle = Bundle.open(folder)
    model, listed = bundle.manifest.model, bundle.manifest.files
    record = EngineRecord(
        format=RECORD_FORMAT,
        kind="tensorrt",
        tensorrt=VERSION,
        gpu="Fake Orin",
        compute_capability=(8, 7),
        driver=None,
        context=CONTEXT,
        prefill=512,
        images=1,
        source={
            name: entry.sha256 for name, entry in listed.items() if name.startswith(("decoder.onnx", "vision.onnx"))
        },
        files={name: FileEntry(0, "") for name in ("decoder.engine", "vision.engine")},
    )
    record = replace(record, **changes)
    target = record.folder_in(folder)
    target.mkdir(parents=True)
    limits = Limits(record.context, record.prefill, record.images)
    decoder, vision = (
        [{name: (least, most) for name, (least, _, most) in profile.items()} for profile in profiles]
        for profiles in (decoder_profiles(model, limits), (vision_profile(model, limits),))
    )
    write_engine(target / "decoder.engine", folder / spec.DECODER_GRAPH, decoder, [5000, 300])
    write_engine(target / "vision.engine", folder / spec.VISION_GRAPH, vision, [1000])
    files = {path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in target.iterdir()}
    record = replace(record, files=files)
    write_record(target, record.to_json())
    return record


def write_engine(path: Path, graph: Path, profiles: list[Profile], scratch: list[int]) -> None:
    """Write an "engine" that runs a graph."""
    FakeEngineFile(str(graph), profiles, scratch).write(path)


def read_record(folder: Path) -> EngineRecord:
    """The record in a folder of engines."""
    return EngineRecord.from_json(json.loads((folder / "engine.json").read_text()))


def write_record(folder: Path, content: dict[str, Any]) -> Path:
    """Write ``engine.json`` and let the manifest name it."""
    path, bundle = folder / "engine.json", folder.parents[1]
    path.write_text(json.dumps(content))
    manifest = read_manifest(bundle)
    manifest = replace(manifest, engines={**manifest.engines, folder.name: hash_file(path)})
    (bundle / spec.MANIFEST).write_text(json.dumps(manifest.sealed()))
    return path


def with_engines(source: Path, target: Path, **changes: Any) -> Bundle:
    """A copy of a bundle with engines; ``changes`` are of their record."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("engines"))
    build(target, **changes)
    return Bundle.open(target)


class FakeModel:
    """A bundle loaded onto a fake GPU.

    Attributes:
        gpu, trt: that it runs on.
        engine, owl: the model.
        prefilling, decoding, vision: TensorRT's contexts.
    """

    def __init__(
        self,
        bundle: Bundle,
        gpu: FakeGpu | None = None,
        *,
        kind: EngineKind = "tensorrt",
        version: str = VERSION,
        context: int | None = None,
    ) -> None:
        self.gpu = gpu or FakeGpu()
        self.trt = FakeTensorRt(self.gpu, version, rtx=kind == "tensorrt-rtx")
        capability = self.gpu.compute_capability
        record = find_record(bundle.folder, bundle.manifest, kind, self.gpu.name, capability, version)
        self.engine = TensorRtEngine(bundle, record, self.trt, self.gpu)
        options = EngineOptions(Placement(kind), context=context)
        files = signatures_of(bundle.folder, bundle.manifest.files)
        loaded = Preparation(bundle.folder, bundle.manifest, options, lambda _: self.engine, files).open()
        self.owl = Owl2(*loaded, options.device)
        self.prefilling, self.decoding, self.vision = self.trt.contexts

    def host_copies_of(self, rows: DeviceRows) -> list[Copy]:
        """Copies between the host and K/V rows."""
        end = rows.address + rows.nbytes
        copies = [copy for copy in self.gpu.copies if copy.direction != "within"]
        return [copy for copy in copies if rows.address < copy.address + copy.nbytes <= end]


class Steps:
    """Random rows, of which some are of an image, and the logits that ONNX Runtime computes of them."""

    def __init__(self, bundle: Bundle, count: int) -> None:
        self._reference = OrtEngine(bundle)
        hidden = bundle.manifest.model.decoder.hidden_size
        self.embeds: Floats = np.random.default_rng(5).standard_normal((count, hidden), dtype=np.float32)
        self.modality: NDArray[np.int64] = np.zeros(count, np.int64)
        self.modality[10:30] = 1

    def expected(self) -> Floats:
        """Logits of all rows."""
        count = len(self.embeds)
        buffers = self._reference.allocate(count, None)
        return self._reference.prefill(self.embeds, self.modality, 0, buffers, np.arange(count))
