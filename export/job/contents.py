"""What the folders of an export hold by its own doing, so that nothing else is overwritten or removed.

Names are relative to a folder, with slashes; those of folders end with one. Links are never followed, and never known.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from owl2.export.checkpoint.files import GPTQ_INDEX, OPTIONAL_FILES, PREPROCESSOR
from owl2.export.checkpoint.gptq_format import CONFIG_FILE
from owl2.export.job.disk import write_text
from owl2.runtime import spec
from owl2.runtime.backends.tensorrt.records import DECODER_ENGINE, FOLDER as ENGINES, RECORD, VISION_ENGINE
from owl2.runtime.foreign import ForeignError, read_json

Known = Callable[[str], object]
"""Whether a name is one that an export writes."""

MARK, LOCK = "made-by-owl2-export", "lock"
MARK_TEXT = (
    "owl2-export works in this folder, and removes it when it is done.\n"
    "After an interruption the same command continues here. Keep nothing of your own in it.\n"
)
INDEX = "journal.json"
INDEX_BYTES = 1 << 30
"""Largest index that is read; it grows with the layers and the names in the graphs."""
ENGINE_FILES = frozenset({DECODER_ENGINE, VISION_ENGINE, RECORD, spec.MANIFEST})
"""In a folder of engines; the manifest, which is renamed into place, for a moment only."""

GPTQ_FILES = frozenset(
    {*spec.TOKENIZER_FILES, *OPTIONAL_FILES, PREPROCESSOR, "config.json", CONFIG_FILE, GPTQ_INDEX, spec.REPORT}
)
GPTQ_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
LISTS = (GPTQ_INDEX, CONFIG_FILE, spec.REPORT, spec.MANIFEST)
"""Files that tell what else is an export's: removed last, so that a kill in between leaves nothing unknown."""
FLOAT_SUFFIX = ".float.onnx"
"""Of the copy of a graph that is checked and removed again; see owl2.export.checks.parity."""
_GRAPHS = (spec.VISION_GRAPH, *spec.DECODER_GRAPHS.values())
_FLOAT_GRAPHS = (Path(name).with_suffix(FLOAT_SUFFIX).name for name in _GRAPHS)
_WRITTEN = {*_GRAPHS, *_FLOAT_GRAPHS, *spec.BUNDLE_FILES, spec.MANIFEST, *GPTQ_FILES, *ENGINE_FILES}
# The last one is of whoever takes the lock, for a moment; filelock 4.3 and newer.
_LOCKING = re.compile(rf"{MARK}|{LOCK}|\.filelock-probe-[0-9a-f]{{32}}")
_SAFETENSORS_TEMPORARY = r"\.tmp\w{6}"  # of a kill while it writes
_WORK = re.compile(
    rf"{_LOCKING.pattern}|(bundle|journal|replaced)/"
    rf"|bundle/({'|'.join(map(re.escape, sorted(_WRITTEN)))}|{GPTQ_SHARD.pattern}|{_SAFETENSORS_TEMPORARY})"
    rf"|journal/({re.escape(INDEX)}(\.new)?|vision\.rows|layer-\d+\.(graph|rows))"
)
# What an interrupted build of engines leaves in a bundle.
_ENGINE_WORK = re.compile(
    rf"{ENGINES}/\.[\w-]+\.partial/({_WORK.pattern}|replaced/({'|'.join(map(re.escape, sorted(ENGINE_FILES)))}))?"
)


def in_work(name: str) -> bool:
    """Whether this is a name in the hidden folder of an export; those of the folder ``replaced`` not included."""
    return _WORK.fullmatch(name) is not None


def of_locking(name: str) -> bool:
    """Whether this is a name in the hidden folder that is there before and after an export's own files."""
    return _LOCKING.fullmatch(name) is not None


def of_exported(folder: Path) -> Known:
    """What a bundle or a GPTQ checkpoint lists as its own.

    Raises:
        ForeignError: the folder is neither, or what lists its files cannot be used.
        OSError: that cannot be read.
    """
    if (folder / spec.MANIFEST).exists():
        names = _listed_by_manifest(read_json(folder / spec.MANIFEST))
        return lambda name: name in names or _ENGINE_WORK.fullmatch(name)
    if all((folder / name).exists() for name in (CONFIG_FILE, spec.REPORT, GPTQ_INDEX)):
        return _listed_by_index(read_json(folder / CONFIG_FILE), read_json(folder / GPTQ_INDEX)).__contains__
    raise ForeignError(f"it has neither {spec.MANIFEST} nor the files of a checkpoint that owl2-export wrote")


def foreign(folder: Path, known: Known, prefix: str = "") -> list[str]:
    """Names of everything in a folder that is not known; of a folder that is not known, only its own name."""
    names = []
    for entry, name in _entries(folder, prefix):
        is_folder = name.endswith("/")
        if not (is_folder or entry.is_file(follow_symlinks=False)) or not known(name):
            names.append(name)
        elif is_folder:
            names += foreign(Path(entry.path), known, name)
    return names


def remove(folder: Path, known: Known, prefix: str = "") -> None:
    """Remove what is known in a folder, and the folder itself if nothing is left in it; a link stays as it is."""
    if folder.is_symlink():
        return
    with contextlib.suppress(OSError):  # what cannot be removed stays, with the folders that hold it
        for entry, name in _entries(folder, prefix):
            if not known(name):
                continue
            if name.endswith("/"):
                remove(Path(entry.path), known, name)
            elif entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)
        folder.rmdir()


def mark(work: Path) -> None:
    """Mark the hidden folder ``work`` as an export's."""
    if _text(work / MARK) != MARK_TEXT:
        write_text(work / MARK, MARK_TEXT)


def is_marked(work: Path) -> bool:
    """Whether an export has made the hidden folder ``work``.

    Its mark or a journal says so; a kill right after it was made may have left neither, but then nothing else is there.

    Raises:
        FileNotFoundError: another process is just removing it.
    """
    names = {entry.name for entry, _ in _entries(work, "")}
    if (work / LOCK).is_symlink():
        return False
    text, lock = _text(work / MARK), _text(work / LOCK) or ""
    if text == MARK_TEXT or _is_journal(work / "journal" / INDEX):
        return True
    if MARK in names and not os.path.lexists(work / MARK):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(work / MARK))
    return all(map(of_locking, names)) and not text and re.fullmatch(r"\d*", lock) is not None


def _entries(folder: Path, prefix: str) -> Iterable[tuple[os.DirEntry[str], str]]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: (entry.name in LISTS, entry.name))
    return [(entry, prefix + entry.name + "/" * entry.is_dir(follow_symlinks=False)) for entry in found]


def _text(path: Path) -> str | None:
    """The start of a small file; None if there is none."""
    if not path.is_file() or path.is_symlink():
        return None
    with path.open("rb") as file:
        return file.read(2 * len(MARK_TEXT)).decode(errors="replace")


def _is_journal(path: Path) -> bool:
    """Whether this is the index of a journal; exports made no mark before."""
    if path.is_symlink() or path.parent.is_symlink():
        return False
    try:
        content = read_json(path, INDEX_BYTES)
    except (OSError, ForeignError):
        return False
    return isinstance(content, dict) and set(content) == {"sha256", "content"}


def _listed_by_manifest(content: Any) -> frozenset[str]:  # noqa: ANN401 - any JSON value
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not str(content.get("producer", "")).startswith("owl2 "):
        raise ForeignError(f"its {spec.MANIFEST} is not the manifest of a bundle")
    listed = content.get("engines")
    engines = [f"{ENGINES}/{name}/" for name in listed if "/" not in name] if isinstance(listed, dict) else []
    inside = [folder + name for folder in engines for name in ENGINE_FILES]
    return frozenset({spec.MANIFEST, *(name for name in files if "/" not in name), f"{ENGINES}/", *engines, *inside})


def _listed_by_index(config: Any, index: Any) -> frozenset[str]:  # noqa: ANN401 - any JSON value
    meta = config.get("meta") if isinstance(config, dict) else None
    producers = meta.get("quantizer") if isinstance(meta, dict) else None
    shards = index.get("weight_map") if isinstance(index, dict) else None
    ours = isinstance(producers, list) and any(str(name).startswith("owl2:") for name in producers)
    if not ours or not isinstance(shards, dict):
        raise ForeignError("it is not a checkpoint that owl2-export wrote")
    return GPTQ_FILES | {name for name in shards.values() if isinstance(name, str) and GPTQ_SHARD.fullmatch(name)}
