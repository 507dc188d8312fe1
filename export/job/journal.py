"""A record of what an export has finished, so that the next one continues there after an interruption.

It is a folder next to the unfinished files of the bundle::

    journal.json     what is finished, and the SHA-256 of everything that it relies on
    vision.rows      the rows of all images
    layer-K.graph    nodes of the decoder graph after K layers; its weights are in decoder.onnx.data
    layer-K.rows     hidden rows of all prompts after K layers, and what else the layers to come depend on

A step counts once ``journal.json`` names it, and that file is replaced as a whole: the files it names are on the disk
before, those it no longer names are removed after. So a kill at any moment leaves one consistent state.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from owl2.export.graph.builder import BuilderState, data_path
from owl2.export.graph.decoder import DecoderGraph, DecoderState
from owl2.export.job.contents import INDEX, INDEX_BYTES, in_work
from owl2.export.job.job import ExportJob
from owl2.export.prompts import digests, fingerprint
from owl2.export.report import Parity, PartReport
from owl2.export.vision import ExportedVision
from owl2.quant.layer import ModuleReport
from owl2.runtime import spec
from owl2.runtime.config import from_json, require
from owl2.runtime.errors import ConfigError, ExportError
from owl2.runtime.foreign import parse_json, read_json, reading
from owl2.runtime.stored import sync
from owl2.runtime.verification import HASH_BLOCK, hash_file
from owl2.runtime.version import __version__

Array = NDArray[Any]
FORMAT = 1
VISION_ROWS = "vision.rows"
# These name files, which are in the key by their content or times, or say what to do with earlier ones.
UNKEYED_SETTINGS = ("checkpoint", "bundle", "calibration", "lora", "overwrite", "fresh", "preset")


class _UnusableError(ExportError):
    """The journal cannot be continued; the message says why."""


class Journal:
    """Keeps what is finished in ``staging.journal`` and gives it back to the next run.

    Attributes:
        layers: finished decoder layers.
    """

    def __init__(self, job: ExportJob) -> None:
        self.layers = 0
        self._job, self._staging = job, job.staging
        self._key = resume_key(job)
        self._vision: dict[str, Any] | None = None
        self._decoder: dict[str, Any] | None = None

    def resume(self) -> None:
        """Take up what an earlier run left, or clear it away, and tell the user."""
        left, note, content = (self._staging.journal / INDEX).exists(), self._job.reporter.note, None
        if left and self._job.config.fresh:
            note("starting over; the finished parts of an earlier export are removed")
        elif left:
            try:
                content = self._read()
                self._job.usage.restore(content["usage"])
            except (_UnusableError, ConfigError) as error:
                note(f"starting over; the interrupted export cannot be continued: {error}")
        if content is None:
            self._staging.clear()
            return
        vision = content["vision"]  # the first that is committed
        self._vision, self._decoder = vision, content["decoder"]
        self._remove_others()
        # What came after the last commit is made again; temporary files must not stay.
        weights = data_path(Path(spec.DECODER_GRAPH)).name
        _remove_all_but({*vision["files"], weights}, self._staging.folder)
        if self._decoder is None:
            note("continuing an interrupted export after the vision tower")
            return
        self.layers, total = self._decoder["layers"], self._job.layers
        self._keep()
        place = (
            f"after the last of {total} layers" if self.layers == total else f"at layer {self.layers + 1} of {total}"
        )
        note(f"continuing an interrupted export {place}")

    def keep_vision(self, vision: ExportedVision) -> None:
        """Note that the vision side is finished; its files are closed."""
        named = [*vision.original.items(), *vision.rows.items()]
        graph = self._staging.folder / spec.VISION_GRAPH
        for path in (graph, data_path(graph)):
            sync(path)
        self._vision = {
            "files": {path.name: hash_file(path) for path in (graph, data_path(graph))},
            "rows": self._write_arrays(VISION_ROWS, [rows for _, rows in named]),
            "digests": [digest for digest, _ in named],
            "references": len(vision.original),
            "parity": asdict(vision.parity),
            "sensitivity": [asdict(part) for part in vision.sensitivity],
        }
        self._commit()

    def vision(self) -> ExportedVision | None:
        """The vision side as an earlier run left it; None if it is still to be exported."""
        if self._vision is None:
            return None
        with self._reading():
            arrays = self._read_arrays(self._vision["rows"])
            named, first = list(zip(self._vision["digests"], arrays)), self._vision["references"]
            parity = from_json(Parity, self._vision["parity"], INDEX)
            parts = tuple(from_json(PartReport, part, INDEX) for part in self._vision["sensitivity"])
            vision = ExportedVision(dict(named[:first]), dict(named[first:]), parity, parts)
            prompts, shape = self._job.prompts, (self._job.model.rows_per_image, self._job.model.decoder.hidden_size)
            whole = set(vision.original) == set(digests(prompts.measured)) and set(vision.rows) == set(prompts.images)
            require(whole and all(rows.shape == shape for rows in arrays), "the rows are not those of the images")
            return vision

    def keep_layer(self, writer: DecoderGraph, arrays: Sequence[Array], modules: Mapping[str, ModuleReport]) -> None:
        """Note that the next layer is finished; ``arrays`` is everything outside the graph that later layers need."""
        state = writer.state()
        name, builder = f"layer-{state.layers}", state.builder
        earlier = self._decoder["segments"] if self._decoder is not None else []
        self._decoder = {
            "layers": state.layers,
            "segments": [*earlier, [builder.length, builder.sha256]],
            "graph": self._write(f"{name}.graph", [builder.graph]),
            "names": builder.names,
            "residual": state.residual,
            "pending": state.pending,
            "rows": self._write_arrays(f"{name}.rows", arrays),
            "modules": {module: asdict(report) for module, report in modules.items()},
        }
        self._commit()
        self.layers = state.layers
        self._keep()

    def restore_layers(self, writer: DecoderGraph, restore: Callable[[list[Array]], None]) -> dict[str, ModuleReport]:
        """Bring a fresh writer to where the finished layers end, of which there are some; returns their reports.

        Args:
            writer: without any layer.
            restore: takes the arrays that were kept with the last layer; no reference to them is kept here.
        """
        record = self._decoder
        assert record is not None
        with self._reading():
            nodes = (self._staging.journal / record["graph"]["file"]).read_bytes()
            builder = BuilderState(nodes, record["names"], *record["segments"][-1])
            writer.restore(DecoderState(builder, record["residual"], record["pending"], record["layers"]))
            restore(self._read_arrays(record["rows"]))
            return {name: from_json(ModuleReport, report, INDEX) for name, report in record["modules"].items()}

    def _reading(self) -> AbstractContextManager[None]:
        """Turn what a record of another shape raises into an error that says how to go on without it."""
        return reading(self._staging.journal, ExportError, "give --fresh to start over")

    def _keep(self) -> None:
        self._staging.kept = f"{self.layers} of {self._job.layers} decoder layers"

    def _commit(self) -> None:
        sync(self._staging.folder)
        content = {
            "format": FORMAT,
            "key": self._key,
            "usage": self._job.usage.to_json(),
            "vision": self._vision,
            "decoder": self._decoder,
        }
        text = json.dumps(content)
        complete = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}
        written = self._write(INDEX + ".new", [json.dumps(complete).encode()])
        (self._staging.journal / written["file"]).rename(self._staging.journal / INDEX)
        sync(self._staging.journal)
        self._remove_others()

    def _remove_others(self) -> None:
        """Remove files that the journal no longer names."""
        records = [record for record in (self._vision, self._decoder) if record is not None]
        named = {record[part]["file"] for record in records for part in ("graph", "rows") if part in record}
        _remove_all_but(named | {INDEX}, self._staging.journal)

    def _read(self) -> dict[str, Any]:
        """The content of the journal, once everything that it relies on has proved unchanged."""
        with reading(INDEX, _UnusableError, "it is damaged"):
            return self._verified(read_json(self._staging.journal / INDEX, INDEX_BYTES))

    def _verified(self, complete: dict[str, Any]) -> dict[str, Any]:
        text = complete["content"]
        if hashlib.sha256(text.encode()).hexdigest() != complete["sha256"]:
            raise _UnusableError(f"{INDEX} is damaged")
        content: dict[str, Any] = parse_json(text)
        if content.get("format") != FORMAT:
            raise _UnusableError(f"it is of format {content.get('format')}, this version writes {FORMAT}")
        if different := _differences(content["key"], self._key):
            raise _UnusableError(different)
        vision, decoder = content["vision"], content["decoder"]
        hashes = {self._staging.folder / name: sha256 for name, sha256 in vision["files"].items()}
        for entry in (vision["rows"], *((decoder["graph"], decoder["rows"]) if decoder else ())):
            hashes[self._staging.journal / entry["file"]] = entry["sha256"]
        for path, sha256 in hashes.items():
            if not path.is_file() or hash_file(path) != sha256:
                raise _UnusableError(f"{path.name} is missing or damaged")
        if decoder:
            _check_segments(data_path(self._staging.folder / spec.DECODER_GRAPH), decoder["segments"])
        return content

    def _write(self, name: str, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        digest = hashlib.sha256()
        with (self._staging.journal / name).open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        return {"file": name, "sha256": digest.hexdigest()}

    def _write_arrays(self, name: str, arrays: Sequence[Array]) -> dict[str, Any]:
        layout = {"arrays": [[array.dtype.str, array.shape] for array in arrays]}
        return self._write(name, (np.ascontiguousarray(array).data for array in arrays)) | layout

    def _read_arrays(self, record: Mapping[str, Any]) -> list[Array]:
        with (self._staging.journal / record["file"]).open("rb") as file:
            return [
                np.fromfile(file, dtype=dtype, count=math.prod(shape)).reshape(shape)
                for dtype, shape in record["arrays"]
            ]


def resume_key(job: ExportJob) -> dict[str, str]:
    """Everything that decides about the files of a bundle, by a name for messages.

    Weight files are named with size and time of change: hashing a full-size checkpoint takes a minute.
    """
    config, checkpoint, prompts = job.config, job.checkpoint, job.prompts
    versions = {"owl2": __version__} | {module.__name__: module.__version__ for module in (torch, onnx, onnxruntime)}
    settings = {name: value for name, value in asdict(config).items() if name not in UNKEYED_SETTINGS}
    settings["quantization"] = config.quant
    small = [
        path for path in checkpoint.folder.iterdir() if path.suffix == ".json" or path.name in spec.TOKENIZER_FILES
    ]
    stats = {f"the checkpoint's {name}": (checkpoint.folder / name).stat() for name in checkpoint.weight_files}
    if checkpoint.adapter is not None:
        stats |= {f"the adapter's {path.name}": path.stat() for path in checkpoint.adapter.files}
    return (
        {name: str(value) for name, value in (versions | settings).items()}
        | {"calibration data": fingerprint(prompts.calibration), "measured prompts": fingerprint(prompts.measured)}
        | {f"the checkpoint's {path.name}": hash_file(path) for path in sorted(small)}
        | {name: f"{stat.st_size} bytes of {stat.st_mtime_ns}" for name, stat in stats.items()}
    )


def journal_size(job: ExportJob) -> int:
    """Most bytes that the journal takes at a time: the rows after two layers and those of the images."""
    model, prompts = job.model, job.prompts
    positions = sum(len(prompt.keys) for prompt in (*prompts.measured, *prompts.calibration))
    images = 2 * len(prompts.images) * model.rows_per_image
    return 4 * model.decoder.hidden_size * (4 * positions + images)


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The names that changed, with their values if these are short enough to mean something; empty if none did."""
    changed = sorted(name for name in set(old) | set(new) if old.get(name) != new.get(name))
    short = {name for name in changed if max(len(values.get(name, "-" * 99)) for values in (old, new)) < 20}
    changes = {name: f"was {old[name]}, now {new[name]}" if name in short else "changed" for name in changed}
    return ", ".join(f"{name} {change}" for name, change in changes.items())


def _remove_all_but(names: Collection[str], folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in names and in_work(f"{folder.name}/{path.name}"):
            path.unlink()


def _check_segments(path: Path, segments: Sequence[Sequence[Any]]) -> None:
    if not path.is_file():
        raise _UnusableError(f"{path.name} is missing")
    with path.open("rb") as file:
        start = 0
        for number, (stop, sha256) in enumerate(segments, 1):
            found = hashlib.sha256()
            while start < stop and (block := file.read(min(HASH_BLOCK, stop - start))):
                found.update(block)
                start += len(block)
            if start < stop or found.hexdigest() != sha256:
                raise _UnusableError(f"layer {number} in {path.name} is incomplete or damaged")
