"""Files of a loaded bundle: truncating or overwriting them kills no process and changes no answer unnoticed."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, edit_manifest
from numpy.typing import NDArray

from owl2 import Owl2
from owl2.runtime import spec
from owl2.runtime.bundle import Bundle
from owl2.runtime.engine import CLOSED
from owl2.runtime.errors import BackendError, BundleCorruptError
from owl2.runtime.open_file import OpenFile
from owl2.runtime.token_table import ArrayTable
from owl2.runtime.verification import FileEntry, hash_file

CHANGED = "was changed while the model used it, .*; copy or export the bundle again, then load it again"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def opened(path: Path) -> OpenFile:
    return OpenFile(path, FileEntry(path.stat().st_size, hash_file(path)))


def truncate(path: Path) -> None:
    os.truncate(path, 5000)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


def overwrite_with_old_times(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [truncate, overwrite, overwrite_with_old_times])
def test_a_change_in_place_is_found(path: Path, change: Callable[[Path], None]) -> None:
    file = opened(path)
    file.check()
    change(path)
    with pytest.raises(BundleCorruptError, match=CHANGED):
        file.check()


def same_content(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"other")
    other.replace(path)


@pytest.mark.parametrize("change", [same_content, replaced, Path.unlink, Path.touch])
def test_what_changes_no_content_does_no_harm(path: Path, change: Callable[[Path], object]) -> None:
    file = opened(path)
    change(path)
    file.check()
    assert file.read(250, 10) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3])


def test_a_short_read(path: Path) -> None:
    file = opened(path)
    truncate(path)
    with pytest.raises(BundleCorruptError, match=CHANGED):
        file.read(9000, 10)


def test_another_size_than_the_verified_one(path: Path) -> None:
    with pytest.raises(BundleCorruptError, match=CHANGED):
        OpenFile(path, FileEntry(3, ""))
    with pytest.raises(BundleCorruptError, match="No such file"):
        OpenFile(path.with_name("missing"), FileEntry(3, ""))


def test_a_closed_file(path: Path) -> None:
    file = opened(path)
    file.close()
    file.close()
    for use in (file.check, lambda: file.read(0, 1)):
        with pytest.raises(BackendError, match=CLOSED):
            use()


def test_reads_without_pread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, from several threads."""
    monkeypatch.delattr(os, "pread")
    file = opened(path)
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(place for place in range(500) if file.read(place, 1)[0] != place % 256)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("bundle", ["bundle_a1", "bundle_a2"])
def test_rows_of_the_token_table(bundle: str, request: pytest.FixtureRequest) -> None:
    opened_bundle = Bundle.open(request.getfixturevalue(bundle))
    decoder, stored = opened_bundle.manifest.model.decoder, opened_bundle.manifest.weights.embeddings
    dtype = np.float16 if stored == "fp16" else np.float32
    whole: NDArray[Any] = np.fromfile(opened_bundle.path(spec.EMBEDDINGS), dtype).reshape(decoder.vocab_size, -1)
    ids = [5, 0, decoder.vocab_size - 1, 5]
    for table in (opened_bundle.token_table(), ArrayTable(whole)):
        rows = table.rows(ids)
        assert rows.dtype == np.float32
        assert table.width == decoder.hidden_size
        np.testing.assert_array_equal(rows, whole[ids])
        assert table.rows([]).shape == (0, table.width)
        table.close()


CHILD = """
import os, sys
import numpy as np
from owl2 import Owl2
owl = Owl2.load(sys.argv[1], threads=1, backend=sys.argv[4])
image = np.full((40, 90, 3), 200, np.uint8)
ask = lambda: owl.logits("USER: <|image|>What is it? ASSISTANT:", images=[image]).tobytes()
expected = ask()
image[0] = 0
path, how = sys.argv[2:4]
size = os.path.getsize(path)
if how == "truncate":
    os.truncate(path, 0)
else:
    with open(path, "r+b") as file:
        file.write(os.urandom(size))
try:
    ask()
    print("answered")
except Exception as error:
    print(type(error).__name__)
with open("/proc/self/maps") as maps:
    print("mapped", sum(".onnx.data" in line or "embeddings" in line for line in maps))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["truncate", "overwrite"])
@pytest.mark.parametrize("name", sorted(spec.BUNDLE_FILES))
def test_no_change_kills_a_process_with_a_loaded_bundle(copy: Path, name: str, how: str, backend: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, copy, copy / name, how, backend], capture_output=True, text=True, check=False
    )
    mapped = int(backend == "native")  # the decoder's weights
    used = name in ("embeddings.bin", "vision.onnx.data", "decoder.onnx.data")
    expected = "BundleCorruptError" if used else "answered"
    assert (result.returncode, result.stdout) == (0, f"{expected}\nmapped {mapped}\n"), result.stderr


def test_a_file_that_changes_between_hashing_and_opening(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer

    load = Tokenizer.load

    def changing(folder: Path) -> Tokenizer:
        tokenizer = load(folder)
        overwrite(folder / "decoder.onnx.data")
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", changing)
    with pytest.raises(BundleCorruptError, match=r"decoder\.onnx\.data changed while the bundle was loaded; load it"):
        Owl2.load(copy)


def test_a_tokenizer_with_more_tokens_than_the_table(copy: Path, sample_checkpoint: Path) -> None:
    """The hashes are right."""
    for name in spec.TOKENIZER_FILES:
        shutil.copy(sample_checkpoint / name, copy / name)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in copy.iterdir()
        if path.name != spec.MANIFEST
    }
    edit_manifest(copy, files=files)
    with pytest.raises(Exception, match="it has 1024 tokens, the model's token table has 800 rows; use the tokenizer"):
        Owl2.load(copy)
