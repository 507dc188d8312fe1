"""Verified files are remembered while nothing about them changes, and only then."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from owl2.runtime.verification import FileEntry, LoadProgress, hash_file, verify_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"first" * 1000)
    (tmp_path / "b").write_bytes(b"second")
    return tmp_path


@pytest.fixture
def files(folder: Path) -> dict[str, FileEntry]:
    return {name: FileEntry((folder / name).stat().st_size, hash_file(folder / name)) for name in "ab"}


def test_a_folder_that_has_not_changed_is_hashed_once(
    folder: Path, files: dict[str, FileEntry], hashed: list[str]
) -> None:
    assert verify_files(folder, files) == []
    assert sorted(hashed) == ["a", "b"]
    assert verify_files(folder, files) == []
    assert len(hashed) == 2
    assert verify_files(folder, files, force=True) == []
    assert len(hashed) == 4


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def touch_back(path: Path) -> None:
    """Other content of the same size, with the old modification time."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [rewrite, touch_back, replace])
def test_a_file_that_was_touched_is_hashed_again(
    folder: Path, files: dict[str, FileEntry], hashed: list[str], change: Callable[[Path], None]
) -> None:
    verify_files(folder, files)
    hashed.clear()
    change(folder / "a")
    wrong = ["a was changed (its sha256 differs)"] if change is touch_back else []
    assert verify_files(folder, files) == wrong
    assert hashed == ["a"]


def test_another_expectation_is_not_met_by_memory(folder: Path, files: dict[str, FileEntry]) -> None:
    verify_files(folder, files)
    other = files | {"b": FileEntry(6, "0" * 64)}
    assert verify_files(folder, other) == ["b was changed (its sha256 differs)"]
    assert verify_files(folder, other) == ["b was changed (its sha256 differs)"], "a failure is not remembered"


def test_every_problem_is_told_each_time(folder: Path, files: dict[str, FileEntry]) -> None:
    wrong = files | {"c": FileEntry(1, ""), "a": FileEntry(1, "")}
    expected = {"c is missing", "a has 5000 bytes, expected 1 (truncated?)"}
    assert set(verify_files(folder, wrong)) == expected
    assert set(verify_files(folder, wrong)) == expected


def test_without_a_cache_folder_everything_is_hashed(
    folder: Path, files: dict[str, FileEntry], hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a"))
    assert verify_files(folder, files) == verify_files(folder, files) == []
    assert len(hashed) == 4


def test_a_damaged_memory_is_not_used(folder: Path, files: dict[str, FileEntry], hashed: list[str]) -> None:
    verify_files(folder, files)
    for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        path.write_text('{"files": [3')
    assert verify_files(folder, files) == []
    assert len(hashed) == 4


@pytest.mark.parametrize("content", ["[" * 5000, '{"files": ' + "9" * 400 + "}", '{"files": [[1, 2]]}', "3", ""])
def test_a_hostile_memory_is_not_used(
    folder: Path, files: dict[str, FileEntry], hashed: list[str], content: str
) -> None:
    verify_files(folder, files)
    for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        path.write_text(content)
    assert verify_files(folder, files) == []
    assert len(hashed) == 4


def test_a_pipe_in_the_place_of_the_memory(folder: Path, files: dict[str, FileEntry], hashed: list[str]) -> None:
    verify_files(folder, files)
    paths = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"))
    for path in paths:
        path.unlink()
        os.mkfifo(path)
    assert verify_files(folder, files) == []
    assert len(hashed) == 4


def test_a_user_without_a_home(
    folder: Path, files: dict[str, FileEntry], hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(*_: object, **__: object) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("owl2.runtime.verification.user_cache_path", homeless)
    assert verify_files(folder, files) == verify_files(folder, files) == []
    assert len(hashed) == 4


def test_a_file_that_cannot_be_read_is_a_problem(
    folder: Path, files: dict[str, FileEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("owl2.runtime.verification.hash_file", denied)
    assert verify_files(folder, files) == ["a cannot be read: Permission denied", "b cannot be read: Permission denied"]


def test_a_full_disk_leaves_no_file_in_the_cache_folder(
    folder: Path, files: dict[str, FileEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = Path(os.environ["XDG_CACHE_HOME"])
    before = sorted(cache.rglob("*"))
    monkeypatch.setattr("owl2.runtime.verification.json.dump", full)
    assert verify_files(folder, files) == []
    assert sorted(cache.rglob("*")) == before


def test_progress_is_told_from_this_thread(folder: Path, files: dict[str, FileEntry]) -> None:
    told: list[tuple[LoadProgress, int]] = []
    verify_files(folder, files, on_progress=lambda progress: told.append((progress, threading.get_ident())))
    total = sum(entry.size for entry in files.values())
    assert told[-1][0] == LoadProgress("verifying", total, total)
    assert {thread for _, thread in told} == {threading.get_ident()}


def test_an_interrupt_ends_hashing(folder: Path, files: dict[str, FileEntry]) -> None:
    def interrupt(_: LoadProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_files(folder, files, on_progress=interrupt)
    assert verify_files(folder, files) == []
