"""Scores in files: a row for each image and task, written as they come, so that a run that was stopped can go on."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from owl2.runtime.config import require
from owl2.runtime.errors import ConfigError, Owl2Error
from owl2.runtime.foreign import ForeignError, parse_json, reading, shorten
from owl2.runtime.scoring.scale import Scale
from owl2.runtime.scoring.score import Score
from owl2.runtime.scoring.summary import Summary
from owl2.runtime.stored import sync

FORMATS = (".csv", ".jsonl", ".parquet")
ANY_NAME = "surrogateescape"
"""How names of files that are no valid Unicode are kept."""
ADVICE = "give another --out, or --overwrite"
FIRST, LAST = ("image", "task", "value", "normalized", "std"), ("error", "bundle", "settings")
"""Columns before and after those of the levels."""
TEXTS = ("image", "task", "error", "bundle", "settings")
"""Columns that hold no number."""
LARGEST_VALUE = 1e6
"""Of a score: what weights may be."""
ROW_GROUP = 10_000
"""Rows that are written to Parquet at a time."""
Row = dict[str, Any]


@dataclass
class ResultFile:
    """A table of scores that grows; :meth:`open` makes it.

    A row has the image, the task, value, normalized, std, the probability of each level, the error of an image that
    could not be scored, the bundle, and what tells settings apart. Parquet cannot be added to: its rows are collected
    beside it as JSON lines, and it is written when all are there.

    Attributes:
        path: of the table.
        done: the images that have their rows, as :meth:`has` knows them.
    """

    path: Path
    done: set[str]
    _file: BinaryIO
    _columns: Sequence[str]
    _scales: Sequence[Scale]
    _settings: str

    @classmethod
    def open(
        cls,
        path: Path,
        scales: Sequence[Scale],
        bundle: str,
        settings: Mapping[str, Any],
        summary: Summary,
        *,
        resume: bool = False,
        retry: bool = False,
        overwrite: bool = False,
    ) -> ResultFile:
        """Begin a table, or go on with one. One process at a time writes to it.

        Args:
            path: ends with one of :data:`FORMATS`.
            scales: whose scores are written.
            bundle: fingerprint of the model that gives them.
            settings: whatever else decides about the numbers; JSON values.
            summary: told of the rows that are there.
            resume: go on with the rows that are there, if there are any.
            retry: drop the rows of images that could not be scored.
            overwrite: replace an older table.

        Raises:
            ConfigError: another suffix, a table that is there already, or one of other scales, settings or another
                bundle, or one that another process writes.
            OSError: it cannot be written.
        """
        require(path.suffix in FORMATS, f"{shorten(str(path))} has no suffix that is known: use {', '.join(FORMATS)}")
        levels = dict.fromkeys(level.name for scale in scales for level in scale.levels)
        taken = [name for name in levels if name in (*FIRST, *LAST)]
        require(not taken, f"the level {', '.join(taken)} has the name of a column of the table; use other words")
        columns = (*FIRST, *levels, *LAST)
        there = _lines_of(path)
        if path.suffix == ".parquet":
            _parquet()  # before any work
        for name in {path, there}:
            require(not name.is_dir(), f"{name} is a folder; give the name of a file")
        told = _digest({"scales": [asdict(scale) for scale in scales], **settings})
        expected = _Expected(columns, [scale.task for scale in scales], bundle, told)
        done: set[str] = set()
        is_new = not there.exists()
        file = _locked(there)
        try:
            if resume:
                with reading(path, ConfigError, ADVICE):
                    if is_new and there != path and path.exists():
                        file = _unpacked(path, there, file, columns)
                    if retry:
                        file = _without_errors(file, there, expected)
                    file.truncate(_read(file, there, expected, done, summary))
            else:
                old = next((name for name in (path, there) if name.exists() and name.stat().st_size), None)
                require(
                    overwrite or old is None, f"{old} exists already; give --resume to go on with it, or --overwrite"
                )
                file.truncate(0)
            file.seek(0, os.SEEK_END)
            table = cls(path, done, file, columns, scales, told)
            if there.suffix == ".csv" and file.tell() == 0:
                file.write(_header(columns))
                file.flush()
        except BaseException:
            file.close()
            if is_new and (not there.stat().st_size or (there != path and path.exists())):  # it is of this call
                there.unlink()
            raise
        return table

    def has(self, image: str) -> bool:
        """Whether an image has its rows."""
        return _key(image) in self.done

    def add(self, image: str, scores: Sequence[Score] | Owl2Error) -> None:
        """Write the rows of one image; those of a broken one have the error alone."""
        blank = dict.fromkeys(self._columns) | {"image": image, "settings": self._settings}
        if isinstance(scores, Owl2Error):
            rows = [blank | {"task": scale.task, "error": str(scores)} for scale in self._scales]
        else:
            rows = [
                blank
                | {"task": score.task, "value": score.value, "normalized": score.normalized, "std": score.std}
                | {"bundle": score.bundle, **score.probabilities}
                for score in scores
            ]
        self._write(rows)

    def finish(self) -> None:
        """Close the table; all rows are there."""
        if self.path.suffix == ".parquet":
            self._file.flush()
            _pack(_lines_of(self.path), self.path, self._columns)
            _lines_of(self.path).unlink()
        self._file.close()

    def close(self) -> None:
        """Leave the table as it is, for a later run to go on with."""
        self._file.close()

    def _write(self, rows: Iterable[Row]) -> None:
        self._file.write(_encoded(rows, self._columns, _lines_of(self.path).suffix))  # of one image at once
        self._file.flush()


@dataclass(frozen=True)
class _Expected:
    """What the rows of a table must be, so that others can follow them."""

    columns: Sequence[str]
    tasks: Sequence[str]
    bundle: str
    settings: str


def _lines_of(path: Path) -> Path:
    """The file that grows."""
    return path.with_name(f".{path.name}.jsonl") if path.suffix == ".parquet" else path


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _locked(path: Path) -> BinaryIO:
    """Open a file to read and add to it, which no other process can until it is closed.

    Raises:
        ConfigError: another process has it open.
    """
    while True:
        file = path.open("a+b")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ConfigError(f"another process is writing to {path}; wait for it, or give another --out") from error
        except (ImportError, OSError):  # Windows, or a file system without locks
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # it was replaced or removed meanwhile


def _settle(partial: Path, path: Path) -> None:
    """Put a whole file in another's place, so that a loss of power leaves one of them."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":
        sync(path.parent)


def _key(image: str) -> str:
    """By which an image is known: its full path, as far as Parquet can hold it."""
    return _portable(os.path.abspath(image))  # noqa: PTH100 - a million of them


def _portable(name: str) -> str:
    """A name as valid Unicode."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _encoded(rows: Iterable[Row], columns: Sequence[str], suffix: str) -> bytes:
    text = io.StringIO(newline="")
    if suffix == ".csv":
        # Texts in quotes: a name may have a carriage return, which Python quotes from version 3.13 on.
        csv.DictWriter(text, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
    else:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            text.write((line if _is_unicode(line) else json.dumps(row)) + "\n")
    return text.getvalue().encode(errors=ANY_NAME)


def _header(columns: Sequence[str]) -> bytes:
    """The first line of CSV."""
    return _encoded([dict(zip(columns, columns))], columns, ".csv")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(file: BinaryIO, path: Path, expected: _Expected, done: set[str], summary: Summary) -> int:
    """Take in the images that have all their rows; returns the bytes up to there.

    Raises:
        ForeignError: the file is something else, or its rows are not as expected.
    """
    kept = len(_header(expected.columns)) if path.suffix == ".csv" else 0
    for rows, end in _groups(file, path, expected):
        image, error = rows[0]["image"], rows[0]["error"]
        done.add(_key(image))
        summary.add(image, error, ((row["task"], row["value"]) for row in rows))
        kept = end
    return kept if kept <= file.seek(0, os.SEEK_END) else 0


def _groups(file: BinaryIO, path: Path, expected: _Expected) -> Iterator[tuple[list[Row], int]]:
    """The rows of each image that has all its tasks, and the bytes up to there."""
    file.seek(0)
    group: list[Row] = []
    for row, end in (_csv_rows if path.suffix == ".csv" else _json_rows)(file, expected.columns):
        if row["bundle"] not in (None, "", expected.bundle):
            raise ForeignError("its scores are those of another bundle")
        value = row["value"]
        if not (value is None or (isinstance(value, int | float) and abs(value) <= LARGEST_VALUE)):
            raise ForeignError(f"it has the value {shorten(value)}")
        group.append(row)
        if row["task"] != expected.tasks[len(group) - 1] or row["image"] != group[0]["image"]:
            raise ForeignError(
                f"it has the task {shorten(row['task'])}, expected {', '.join(expected.tasks)} for each image"
            )
        if row["settings"] != expected.settings:
            raise ForeignError(
                "its scores were made with other settings (preset, prompt, weights, preprocessing, reading of images, "
                "frames of videos, backend or K/V cache), so they cannot be compared with those of this run"
            )
        if len(group) == len(expected.tasks):
            yield group, end
            group = []


def _without_errors(file: BinaryIO, path: Path, expected: _Expected) -> BinaryIO:
    """Put a table without the rows of broken images in the place of the one that is open."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as copy:
        if path.suffix == ".csv":
            copy.write(_header(expected.columns))
        for rows, _ in _groups(file, path, expected):
            if not rows[0]["error"]:
                copy.write(_encoded(rows, expected.columns, path.suffix))
    _settle(partial, path)
    file.close()
    return _locked(path)


class _Lines:
    """Whole lines of a file, one after the other; an unfinished last one is left out.

    Attributes:
        end: bytes up to the end of the last line that was taken.
        last: whether nothing follows.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.end, self.last = file, 0, False

    def __iter__(self) -> Iterator[str]:
        following = self._file.readline()
        while following.endswith(b"\n"):
            line, following = following, self._file.readline()
            self.end += len(line)
            self.last = not following.endswith(b"\n")
            yield line.decode(errors=ANY_NAME)


def _csv_rows(file: BinaryIO, columns: Sequence[str]) -> Iterator[tuple[Row, int]]:
    _check_beginning(file, _header(columns))
    lines = _Lines(file)
    reader = csv.reader(lines)
    for number, cells in enumerate(reader):
        if number == 0:
            if tuple(cells) != tuple(columns):
                raise ForeignError(f"its columns are {shorten(cells)}, expected {', '.join(columns)}")
            continue
        if len(cells) < len(columns) and lines.last:
            return  # the name of an image has a line break, after which it was cut off
        if len(cells) != len(columns):
            raise ForeignError(f"line {reader.line_num} has {len(cells)} cells, expected {len(columns)}")
        row = dict(zip(columns, cells))
        yield (
            {name: (row[name] or None) if name in TEXTS else _number(row[name]) for name in columns},
            lines.end,
        )


def _json_rows(file: BinaryIO, columns: Sequence[str]) -> Iterator[tuple[Row, int]]:
    _check_beginning(file, b'{"image": "')
    lines = _Lines(file)
    for line in lines:
        row = parse_json(line, any_text=True)
        if not isinstance(row, dict) or row.keys() != set(columns):
            raise ForeignError(f"a line is {shorten(row)}, expected the fields {', '.join(columns)}")
        yield row, lines.end


def _check_beginning(file: BinaryIO, expected: bytes) -> None:
    """Refuse a file whose only, unfinished line is not ours: it would be overwritten."""
    line = file.readline(1 << 20)
    file.seek(0)
    if not line.endswith(b"\n") and not line.startswith(expected[: len(line)]):
        raise ForeignError("it is no table of scores")


def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError as error:
        raise ForeignError(f"{shorten(text)} is not a number") from error


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet needs another package: pip install 'owl2[parquet]', or give .csv or .jsonl"
        ) from error
    return pyarrow, parquet


def _pack(lines: Path, path: Path, columns: Sequence[str]) -> None:
    """Write a table of JSON lines as Parquet."""
    pyarrow, parquet = _parquet()
    kinds = {name: pyarrow.string() if name in TEXTS else pyarrow.float64() for name in columns}
    schema = pyarrow.schema(list(kinds.items()))
    partial = path.with_name(f".{path.name}.partial")
    with lines.open("rb") as file, parquet.ParquetWriter(partial, schema) as writer:
        pending: list[Row] = []
        for row, _ in _json_rows(file, columns):
            pending.append(row | {"image": _portable(row["image"])})
            if len(pending) == ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(pending, schema))
                pending = []
        writer.write_table(pyarrow.Table.from_pylist(pending, schema))
    _settle(partial, path)


def _unpacked(path: Path, lines: Path, file: BinaryIO, columns: Sequence[str]) -> BinaryIO:
    """Put the rows of Parquet as JSON lines, which can grow again, in the place of the empty file that is open."""
    _, parquet = _parquet()
    partial = lines.with_name(f".{path.name}.partial")
    with contextlib.closing(parquet.ParquetFile(path)) as table:
        if tuple(table.schema_arrow.names) != tuple(columns):
            raise ForeignError(f"its columns are {shorten(table.schema_arrow.names)}, expected {', '.join(columns)}")
        with partial.open("wb") as copy:
            for batch in table.iter_batches(ROW_GROUP):
                copy.write(_encoded(batch.to_pylist(), columns, ".jsonl"))
    _settle(partial, lines)
    file.close()
    return _locked(lines)
