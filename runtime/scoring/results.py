"""Scores in files: a row for each image and task, written as they come, so that a run that was stopped can go on."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from owl2.runtime.config import require
from owl2.runtime.errors import ConfigError, Owl2Error
from owl2.runtime.foreign import ForeignError, parse_json, reading, shorten
from owl2.runtime.scoring.scale import Scale
from owl2.runtime.scoring.score import Score

FORMATS = (".csv", ".jsonl", ".parquet")
ANY_NAME = "surrogateescape"
"""How names of files that are no valid Unicode are kept."""
ADVICE = "give another --out, or --overwrite"
SUFFIXES = frozenset(
    (
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
    )
)
"""Of the names of images in folders."""
Row = dict[str, Any]


@dataclass
class ResultFile:
    """A table of scores that grows; :meth:`open` makes it.

    A row has the image, the task, value, normalized, std, the probability of each level, the error of an image that
    could not be scored, and the bundle. Parquet cannot be added to: its rows are collected beside it as JSON lines, and
    it is written when all are there.

    Attributes:
        path: of the table.
        rows: that it has, by image.
    """

    path: Path
    rows: dict[str, list[Row]]
    _file: TextIO
    _columns: Sequence[str]

    @classmethod
    def open(
        cls, path: Path, scales: Sequence[Scale], bundle: str, *, resume: bool = False, overwrite: bool = False
    ) -> ResultFile:
        """Begin a table, or go on with one.

        Args:
            path: ends with one of :data:`FORMATS`.
            scales: whose scores are written.
            bundle: fingerprint of the model that gives them.
            resume: go on with the rows that are there, if there are any.
            overwrite: replace an older table.

        Raises:
            ConfigError: another suffix, a table that is there already, or one of other scales or another bundle.
            OSError: it cannot be written.
        """
        require(path.suffix in FORMATS, f"{shorten(str(path))} has no suffix that is known: use {', '.join(FORMATS)}")
        levels = dict.fromkeys(level.name for scale in scales for level in scale.levels)
        columns = ("image", "task", "value", "normalized", "std", *levels, "error", "bundle")
        there = _lines_of(path)
        if path.suffix == ".parquet":
            _parquet()  # before any work
        if not resume and not overwrite:
            for name in {path, there}:
                require(not name.exists(), f"{name} exists already; give --resume to go on with it, or --overwrite")
        rows: dict[str, list[Row]] = {}
        kept, content = 0, ""
        if resume and path.suffix == ".parquet" and path.exists() and not there.exists():
            raise ConfigError(f"{path} is finished already; {ADVICE}")
        if resume and there.exists():
            with reading(there, ConfigError, ADVICE):
                content = there.read_bytes().decode(errors=ANY_NAME)
                rows, kept = _finished(content, columns, [scale.task for scale in scales], bundle)
        file = there.open("a+" if rows else "w", encoding="utf-8", errors=ANY_NAME, newline="")
        if rows:
            file.truncate(len(content[:kept].encode(errors=ANY_NAME)))
        table = cls(path, rows, file, columns)
        if not rows and there.suffix == ".csv":
            table._write([dict(zip(columns, columns))])
        return table

    def add(self, image: str, scores: Sequence[Score] | Owl2Error, scales: Sequence[Scale]) -> None:
        """Write the rows of one image; those of a broken one have the error alone."""
        if isinstance(scores, Owl2Error):
            rows = [
                _empty(self._columns) | {"image": image, "task": scale.task, "error": str(scores)} for scale in scales
            ]
        else:
            rows = [
                _empty(self._columns)
                | {"image": image, "task": score.task, "value": score.value, "normalized": score.normalized}
                | {"std": score.std, "bundle": score.bundle, **score.probabilities}
                for score in scores
            ]
        self.rows[image] = rows
        self._write(rows)

    def finish(self) -> None:
        """Close the table; all rows are there."""
        self._file.close()
        if self.path.suffix == ".parquet":
            pyarrow, parquet = _parquet()
            rows = [
                row | {"image": row["image"].encode(errors=ANY_NAME).decode(errors="replace")}
                for rows in self.rows.values()
                for row in rows
            ]
            kinds = {name: pyarrow.string() if name in TEXTS else pyarrow.float64() for name in self._columns}
            table = pyarrow.Table.from_pylist(rows, pyarrow.schema(list(kinds.items())))
            partial = self.path.with_name(f".{self.path.name}.partial")
            parquet.write_table(table, partial)
            partial.replace(self.path)
            _lines_of(self.path).unlink()

    def close(self) -> None:
        """Leave the table as it is, for a later run to go on with."""
        self._file.close()

    def _write(self, rows: Iterable[Row]) -> None:
        text = io.StringIO(newline="")
        if _lines_of(self.path).suffix == ".csv":
            csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        else:
            for row in rows:
                text.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.write(text.getvalue())  # of one image at once
        self._file.flush()


TEXTS = ("image", "task", "error", "bundle")
"""Columns that hold no number."""


def _lines_of(path: Path) -> Path:
    """The file that grows."""
    return path.with_name(f".{path.name}.jsonl") if path.suffix == ".parquet" else path


def _empty(columns: Sequence[str]) -> Row:
    return dict.fromkeys(columns)


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet needs another package: pip install 'owl2[parquet]', or give .csv or .jsonl"
        ) from error
    return pyarrow, parquet


def _finished(
    content: str, columns: Sequence[str], tasks: Sequence[str], bundle: str
) -> tuple[dict[str, list[Row]], int]:
    """The rows of images that have all their tasks, and the characters up to there.

    Raises:
        ForeignError: they are of other scales or another bundle.
    """
    rows: dict[str, list[Row]] = {}
    group: list[Row] = []
    kept = 0
    for row, end in _csv_rows(content, columns) if content[:6] == "image," else _json_rows(content, columns):
        if row is None:  # the header
            kept = end
            continue
        if row["bundle"] not in (None, "", bundle):
            raise ForeignError("its scores are those of another bundle")
        group.append(row)
        if row["task"] != tasks[len(group) - 1] or row["image"] != group[0]["image"]:
            raise ForeignError(f"it has the task {shorten(row['task'])}, expected {', '.join(tasks)} for each image")
        if len(group) == len(tasks):
            rows[group[0]["image"]] = group
            group, kept = [], end
    return rows, kept


def _csv_rows(content: str, columns: Sequence[str]) -> Iterator[tuple[Row | None, int]]:
    lines = _whole_lines(content)
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    reader = csv.reader(lines)
    for number, cells in enumerate(reader):
        if number == 0:
            if tuple(cells) != tuple(columns):
                raise ForeignError(f"its columns are {shorten(cells)}, expected {', '.join(columns)}")
            yield None, ends[reader.line_num]
            continue
        if len(cells) < len(columns) and reader.line_num == len(lines):
            return  # the name of an image has a line break, after which it was cut off
        if len(cells) != len(columns):
            raise ForeignError(f"line {reader.line_num} has {len(cells)} cells, expected {len(columns)}")
        row: Row = dict(zip(columns, cells))
        yield {name: row[name] if name in TEXTS else _number(row[name]) for name in columns}, ends[reader.line_num]


def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError as error:
        raise ForeignError(f"{shorten(text)} is not a number") from error


def _json_rows(content: str, columns: Sequence[str]) -> Iterator[tuple[Row | None, int]]:
    end = 0
    for line in _whole_lines(content):
        row, end = parse_json(line), end + len(line)
        if not isinstance(row, dict) or row.keys() != set(columns):
            raise ForeignError(f"a line is {shorten(row)}, expected the fields {', '.join(columns)}")
        yield row, end


def _whole_lines(content: str) -> list[str]:
    """Lines with their ends; what is left of an unfinished one is dropped."""
    return [f"{line}\n" for line in content.split("\n")[:-1]]


@dataclass
class Summary:
    """What a run has found, for people.

    Attributes:
        values: score and image, by task.
        errors: image and error.
    """

    values: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Mapping[str, Sequence[Row]]) -> Summary:
        """Of the rows by image."""
        summary = cls()
        for image, of_image in rows.items():
            summary.add(image, of_image[0]["error"], ((row["task"], row["value"]) for row in of_image))
        return summary

    def add(self, image: str, error: str | None, values: Iterable[tuple[str, float]]) -> None:
        """Count one image: its error, or the value of each task."""
        if error:
            self.errors.append((image, error))
            return
        for task, value in values:
            self.values.setdefault(task, []).append((value, image))


def find_files(paths: Iterable[Path], suffixes: frozenset[str], *, recursive: bool = False) -> list[str]:
    """Paths of files: as they are given, and of folders those whose names have one of the suffixes, sorted.

    Raises:
        ConfigError: a path does not exist, or there is nothing.
    """
    found: dict[str, None] = {}
    for path in paths:
        if not path.is_dir():
            require(os.path.lexists(path), f"{shorten(str(path))} does not exist")
            found[str(path)] = None
            continue
        for folder, folders, names in os.walk(path):
            folders.sort()
            inside = sorted(name for name in (*names, *folders) if _is_named(name, suffixes))
            found.update((os.path.join(folder, name), None) for name in inside)  # noqa: PTH118
            if not recursive:
                break
    require(bool(found), "there is nothing to score; give files, or --recursive for folders within folders")
    return list(found)


def _is_named(name: str, suffixes: frozenset[str]) -> bool:
    return Path(name).suffix.lower() in suffixes and not name.startswith(".")
