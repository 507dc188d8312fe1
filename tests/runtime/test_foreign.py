"""Reading foreign files within bounds, and quoting them without harm."""

import json
import os
from pathlib import Path

import pytest

from owl2.runtime import foreign
from owl2.runtime.errors import CheckpointError, DataError
from owl2.runtime.foreign import ForeignError
from owl2.runtime.harmless import harmless


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs more than once"),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"a": {"9" * 400}}}', "400 digits"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": NaN}', "NaN is not a number"),
        (r'["\ud83d\ude00", "\uD800"]', "half of a surrogate pair"),
        ("{", "it is not JSON: .* at column 2$"),
        ('{"a": 1,}', "a comma before a closing bracket at column 9"),
        ("[1, [2, 3,\n ]]", "a comma before a closing bracket at line 2 column 2"),
        ("[1,, 2]", "Expecting value at column 4"),
        ('"a,', "Unterminated string starting at column 1"),
    ],
)
def test_json_is_refused_in_a_sentence(content: str, message: str) -> None:
    with pytest.raises(ForeignError, match=message):
        foreign.parse_json(content)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be", "latin-1"])
def test_another_encoding_is_named(encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("-be") else ""
    with pytest.raises(ForeignError, match=encoding[:6].upper() if encoding != "latin-1" else "0xe9 in line 2"):
        foreign.decode_text(f"{mark}a\ncafé".encode(encoding))


def test_what_is_no_text_is_not_read() -> None:
    with pytest.raises(ForeignError, match="it has a byte 0 in line 2, as UTF-16 text and binary files have"):
        foreign.decode_text(b"a\nb\0c")


def test_marks_and_line_ends_go() -> None:
    assert foreign.decode_text(b"\xef\xbb\xbfa\r\nb\rc\n") == "a\nb\nc\n"


def test_text_with_nul_bytes_is_refused() -> None:
    with pytest.raises(ForeignError, match="a byte 0 in line 1, as UTF-16 text and binary files have"):
        foreign.decode_text("caf".encode("utf-16-le"))


def test_lines_are_counted_from_the_given_one() -> None:
    with pytest.raises(ForeignError, match="0xe9 in line 8"):
        foreign.decode_text(b"a\ncaf\xe9", first_line=7)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForeignError, match="not a regular file"):
        foreign.read_bytes(tmp_path / "pipe", 10)
    with pytest.raises(ForeignError, match="not a regular file"):
        foreign.read_bytes(Path(os.devnull), 10)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no space
    with pytest.raises(ForeignError, match="1099511627776 bytes, at most 16777216"):
        foreign.read_json(path)


@pytest.mark.parametrize("problem", [KeyError("x"), RecursionError(), OSError(5, "broken"), ZeroDivisionError()])
def test_whatever_is_raised_becomes_an_error_of_ours(problem: Exception) -> None:
    expected = pytest.raises(CheckpointError, match=r"cannot read a\.json: .+; copy it again")
    with expected, foreign.reading("a.json", CheckpointError, "copy it again"):
        raise problem


def test_errors_of_ours_pass() -> None:
    with pytest.raises(DataError, match=r"^line 3$"), foreign.reading("a.json", CheckpointError, "copy it again"):
        raise DataError("line 3")


def test_what_is_quoted_is_short_and_harmless() -> None:
    assert foreign.shorten("\x1b[31mred\u202e") == r"'\x1b[31mred\u202e'"
    assert len(foreign.shorten("x" * 10_000_000)) == foreign.QUOTED
    assert foreign.shorten(list(range(1000))) == "list of 1000 entries"
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert foreign.shorten(deep) == "a value of type list"
    assert foreign.listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … and 2 more"
    assert harmless("a\nb\x9b") == r"a\nb\x9b"
    assert foreign.shorten(json.loads("1" * 4000)).startswith("1111")
