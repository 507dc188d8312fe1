"""Nothing of anybody's is emptied, overwritten or removed by an export, wherever it lies."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import names

from owl2.export.config import ExportConfig
from owl2.export.job.contents import GPTQ_FILES, LISTS, LOCK, MARK, MARK_TEXT, in_work, is_marked, mark
from owl2.export.job.job import open_job
from owl2.export.job.progress import Silent
from owl2.export.job.staging import Staging
from owl2.export.pipeline import export_bundle
from owl2.runtime import spec
from owl2.runtime.errors import CheckpointError, ExportError, Owl2Warning

Snapshot = dict[str, object]


def snapshot(folder: Path) -> Snapshot:
    """Everything in a folder: content of files, targets of links."""
    found: Snapshot = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            what = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else path.is_dir()
            found[str(path.relative_to(folder))] = what
    return found


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The name of the hidden folder of an export to ``tmp_path / "bundle"``."""
    return tmp_path / ".bundle.partial"


def stage(tmp_path: Path, *, overwrite: bool = False) -> None:
    """Begin an export, and end it without a result."""
    with Staging(tmp_path / "bundle", overwrite=overwrite) as staging:
        (staging.folder / spec.DECODER_GRAPH).write_bytes(b"x")
        staging.clear()


def refused(tmp_path: Path, *patterns: str, overwrite: bool = False) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(ExportError) as caught:
        stage(tmp_path, overwrite=overwrite)
    for pattern in patterns:
        assert pattern in str(caught.value), caught.value
    assert snapshot(tmp_path) == before


def photos(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wedding.jpg").write_bytes(b"precious")
    return folder


FOREIGN: dict[str, tuple[Callable[[Path], object], ...]] = {
    "a folder": (photos,),
    "a folder of an export's names": (
        lambda work: photos(work / "bundle"),
        lambda work: photos(work / "journal"),
        lambda work: photos(work / "replaced"),
    ),
    "a journal of something else": (
        lambda work: photos(work / "journal"),
        lambda work: (work / "journal" / "journal.json").write_text('{"my": "diary"}'),
    ),
    "an empty folder in it": (lambda work: (work / "bundle").mkdir(parents=True),),
    "another mark": (photos, lambda work: (work / MARK).write_text("mine")),
    "a lock of something else": (Path.mkdir, lambda work: (work / LOCK).write_text("precious")),
    "a file": (lambda work: work.write_text("precious"),),
    "a pipe": (os.mkfifo,),
    "a link to a folder": (lambda work: work.symlink_to(photos(work.with_name("photos"))),),
    "a link to a file": (
        lambda work: work.with_name("file").write_text("precious"),
        lambda work: work.symlink_to(work.with_name("file")),
    ),
    "a link to a marked folder": (
        lambda work: mark(photos(work.with_name("photos"))),
        lambda work: work.symlink_to(work.with_name("photos")),
    ),
    "a link to nothing": (lambda work: work.symlink_to("nowhere"),),
    "a link to itself": (lambda work: work.symlink_to(work.name),),
    "a link in place of the mark": (
        photos,
        lambda work: (work.parent / "text").write_text(MARK_TEXT),
        lambda work: (work / MARK).symlink_to(work.parent / "text"),
    ),
}


@pytest.mark.parametrize("what", list(FOREIGN))
def test_a_hidden_folder_that_no_export_made_is_refused(tmp_path: Path, work: Path, what: str) -> None:
    for make in FOREIGN[what]:
        make(work)
    refused(tmp_path, f"{work} ", "is left alone; an export to", "move it away, or choose another folder")


@pytest.mark.parametrize("name", ["wedding.jpg", "bundle/wedding.jpg", "journal/layer-1.graph.bak", "photos/1.jpg"])
def test_a_foreign_file_in_the_hidden_folder_stays_and_is_named(tmp_path: Path, work: Path, name: str) -> None:
    work.mkdir()
    mark(work)
    (work / name).parent.mkdir(exist_ok=True)
    (work / name).write_bytes(b"precious")
    refused(tmp_path, f"{work} holds {name if name[0] != 'p' else 'photos/'}, which no export wrote", "move it away")


@pytest.mark.parametrize("name", ["bundle", "journal", "replaced", "lock", f"bundle/{spec.DECODER_GRAPH}.data"])
@pytest.mark.parametrize("to", ["photos", "photos/wedding.jpg", "nowhere"])
def test_links_in_the_hidden_folder_are_not_followed(tmp_path: Path, work: Path, name: str, to: str) -> None:
    photos(tmp_path / "photos")
    (work / name).parent.mkdir(parents=True)
    mark(work)
    (work / name).symlink_to(tmp_path / to)
    refused(tmp_path, str(work))


def test_what_appears_while_an_export_runs_stays_and_is_named(tmp_path: Path, work: Path) -> None:
    staging = Staging(tmp_path / "bundle", overwrite=False).__enter__()
    photos(staging.folder)
    (staging.folder / spec.DECODER_GRAPH).write_bytes(b"x")
    (staging.folder / spec.EMBEDDINGS).symlink_to(photos(tmp_path / "photos") / "wedding.jpg")
    photos(work / "photos")
    staging.clear()
    assert names(staging.folder) == [spec.EMBEDDINGS, "wedding.jpg"]
    with pytest.warns(Owl2Warning, match=r"\.bundle\.partial stays, since it holds bundle/, photos/; move what is"):
        staging.__exit__(None, None, None)
    assert (work / "photos" / "wedding.jpg").read_bytes() == b"precious"
    assert (tmp_path / "photos" / "wedding.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("left", [[], [MARK], [LOCK], [MARK, LOCK]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_kill_right_after_the_folder_was_made_holds_nobody_off(
    tmp_path: Path, work: Path, left: list[str], whole: bool
) -> None:
    work.mkdir()
    for name in left:
        (work / name).write_text({MARK: MARK_TEXT, LOCK: "123"}[name] if whole else "")
    stage(tmp_path)
    assert names(tmp_path) == []


def test_a_journal_counts_as_the_mark(tmp_path: Path, work: Path) -> None:
    """Exports made no mark before."""
    (work / "journal").mkdir(parents=True)
    (work / "journal" / "journal.json").write_text(json.dumps({"sha256": "0", "content": "{}"}))
    with Staging(tmp_path / "bundle", overwrite=False):
        assert is_marked(work)
        assert (work / MARK).read_text() == MARK_TEXT
    assert names(tmp_path) == []


def test_the_checkpoint_is_looked_at_first(tmp_path: Path, work: Path) -> None:
    with Staging(tmp_path / "bundle", overwrite=False) as staging:
        (staging.folder / spec.DECODER_GRAPH).write_bytes(b"x")
        (staging.journal / "journal.json").write_text("damaged")
        staging.kept = "1 layer"
    before = snapshot(tmp_path)
    for source in ("nowhere", "."):
        with pytest.raises(CheckpointError):
            export_bundle(ExportConfig(tmp_path / source, tmp_path / "bundle", fresh=True))
        assert snapshot(tmp_path) == before
    with pytest.raises(CheckpointError):
        export_bundle(ExportConfig(tmp_path / "nowhere", tmp_path / "deep" / "bundle"))
    assert snapshot(tmp_path) == before


def bundle(folder: Path, *others: str, **manifest: object) -> Path:
    """A folder with what a bundle lists, and others."""
    content = {
        "format": 2,
        "producer": "owl2 0.1",
        "files": {"decoder.onnx": {"size": 1, "sha256": ""}},
        "engines": {"tensorrt-sm87": ""},
    }
    listed = ("decoder.onnx", "engines/tensorrt-sm87/engine.json", "engines/tensorrt-sm87/decoder.engine")
    for name in (*listed, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    (folder / spec.MANIFEST).write_text(json.dumps(content | manifest))
    return folder


def gptq(folder: Path, *others: str, producer: str = "owl2:0.1") -> Path:
    folder.mkdir()
    shard = "model-00001-of-00001.safetensors"
    for name in (*GPTQ_FILES, shard, *others):
        (folder / name).write_text("{}")
    (folder / "quantize_config.json").write_text(json.dumps({"meta": {"quantizer": [producer]}}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    return folder


@pytest.mark.parametrize("make", [bundle, gptq])
def test_what_an_export_wrote_is_replaced(tmp_path: Path, make: Callable[..., Path]) -> None:
    make(tmp_path / "bundle")
    refused(tmp_path, "exists; give --overwrite to replace it")
    with Staging(tmp_path / "bundle", overwrite=True) as staging:
        (staging.folder / spec.DECODER_GRAPH).write_text("new")
        staging.publish()
    assert snapshot(tmp_path) == {"bundle": True, f"bundle/{spec.DECODER_GRAPH}": b"new"}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (bundle, "wedding.jpg"),
        (bundle, ".DS_Store"),
        (bundle, "encoder.onnx"),
        (bundle, "photos/1.jpg"),
        (bundle, "engines/notes.txt"),
        (bundle, "engines/tensorrt-sm87/notes.txt"),
        (bundle, "engines/tensorrt-sm89/engine.json"),
        (gptq, "wedding.jpg"),
        (gptq, "model.safetensors"),
        (gptq, "model-00002-of-00002.safetensors"),
        (gptq, "owl2.md"),
    ],
)
def test_what_no_export_wrote_is_named_and_kept(tmp_path: Path, make: Callable[..., Path], name: str) -> None:
    make(tmp_path / "bundle", *([name] if make is bundle else []))
    if make is gptq:
        (tmp_path / "bundle" / name).write_text("precious")
    shown = {"photos/1.jpg": "photos/", "engines/tensorrt-sm89/engine.json": "engines/tensorrt-sm89/"}.get(name, name)
    refused(tmp_path, f"bundle holds {shown}, which no export wrote and which would be lost", overwrite=True)


def test_a_link_in_a_bundle_is_named(tmp_path: Path) -> None:
    bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "decoder.onnx").unlink()
    (tmp_path / "bundle" / "decoder.onnx").symlink_to(photos(tmp_path / "photos") / "wedding.jpg")
    refused(tmp_path, "bundle holds decoder.onnx, which no export wrote", overwrite=True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"files": {}}',
        '{"producer": "mine", "files": {"wedding.jpg": 1}}',
        '{"producer": "owl2 0.1", "files": ["wedding.jpg"]}',
        '{"producer": 3, "files": 3, "engines": 3}',
        "[" * 100_000,
        b"\xff\xfe{}",
        None,
    ],
)
def test_a_manifest_of_something_else_makes_no_bundle(tmp_path: Path, content: str | bytes | None) -> None:
    folder = photos(tmp_path / "bundle")
    if content is None:
        os.mkfifo(folder / spec.MANIFEST)
        with pytest.raises(ExportError, match="is not a bundle; it is left alone"):
            stage(tmp_path, overwrite=True)
        assert names(folder) == [spec.MANIFEST, "wedding.jpg"]
        return
    (folder / spec.MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path, "exists and is not a bundle; it is left alone: choose another folder (", overwrite=True)


def test_a_checkpoint_that_another_program_quantized_is_not_replaced(tmp_path: Path) -> None:
    gptq(tmp_path / "bundle", producer="gptqmodel:4.0")
    refused(tmp_path, "is not a bundle; it is left alone", overwrite=True)


def test_a_checkpoint_without_its_index_is_not_replaced(tmp_path: Path) -> None:
    (gptq(tmp_path / "bundle") / "model.safetensors.index.json").unlink()
    refused(tmp_path, "is not a bundle; it is left alone: choose another folder (it has neither", overwrite=True)


def test_a_folder_that_became_a_link_is_not_emptied(tmp_path: Path, work: Path) -> None:
    (photos(tmp_path / "photos") / spec.DECODER_GRAPH).write_bytes(b"precious")
    staging = Staging(tmp_path / "bundle", overwrite=False).__enter__()
    staging.folder.rmdir()
    staging.folder.symlink_to(tmp_path / "photos")
    with pytest.warns(Owl2Warning, match="stays, since it holds bundle;"):
        staging.__exit__(None, None, None)
    assert names(tmp_path / "photos") == [spec.DECODER_GRAPH, "wedding.jpg"]


def test_a_file_that_comes_while_the_export_runs_is_kept(tmp_path: Path, work: Path) -> None:
    bundle(tmp_path / "bundle")
    with Staging(tmp_path / "bundle", overwrite=True) as staging:
        (staging.folder / spec.DECODER_GRAPH).write_text("new")
        staging.kept = "1 layer"
        (tmp_path / "bundle" / "notes.txt").write_text("precious")
        with pytest.raises(ExportError, match=r"bundle holds notes\.txt, which no export wrote"):
            staging.publish()
    assert (tmp_path / "bundle" / "notes.txt").read_text() == "precious"
    assert (work / "bundle" / spec.DECODER_GRAPH).read_text() == "new"
    (tmp_path / "bundle" / "notes.txt").unlink()
    with Staging(tmp_path / "bundle", overwrite=True) as staging:
        staging.publish()
    assert snapshot(tmp_path) == {"bundle": True, f"bundle/{spec.DECODER_GRAPH}": b"new"}


def test_a_bundle_that_comes_while_the_export_runs_is_kept(tmp_path: Path) -> None:
    with Staging(tmp_path / "bundle", overwrite=False) as staging:
        bundle(tmp_path / "bundle")
        with pytest.raises(ExportError, match="exists; give --overwrite"):
            staging.publish()
    assert (tmp_path / "bundle" / "decoder.onnx").read_text() == "precious"


@pytest.mark.parametrize("make", [bundle, gptq])
def test_a_kill_at_any_moment_of_the_removal_leaves_nothing_unknown(
    tmp_path: Path, work: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole")
    total = sum(path.is_file() for path in (tmp_path / "whole").rglob("*")) + 2
    unlink = Path.unlink
    for kill in range(total):
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "bundle")
        left = kill

        def deadly(path: Path, *, missing_ok: bool = False) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", deadly)
            staging = Staging(tmp_path / "bundle", overwrite=True).__enter__()
            staging.publish()
            with pytest.raises(KeyboardInterrupt):
                staging.__exit__(None, None, None)
        with Staging(tmp_path / "bundle", overwrite=True):
            pass
        assert names(tmp_path) == ["bundle", "whole"], kill


def test_two_bundles_where_one_should_be_are_both_kept(tmp_path: Path, work: Path) -> None:
    bundle(tmp_path / "bundle")
    bundle(work / "replaced")
    (work / "bundle").mkdir()
    mark(work)
    refused(tmp_path, "until an interrupted export began to replace it", overwrite=True)


def test_a_bundle_that_was_left_aside_comes_back_before_anything_else(tmp_path: Path, work: Path) -> None:
    bundle(work / "replaced", "notes.txt")
    (work / "bundle").mkdir()
    mark(work)
    with pytest.raises(ExportError, match=r"bundle holds notes\.txt, which no export wrote"):
        stage(tmp_path, overwrite=True)
    assert (tmp_path / "bundle" / "notes.txt").read_text() == "precious"


def test_a_linked_parent_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Staging(tmp_path / "link" / "bundle", overwrite=False) as staging:
        assert staging.work.parent == tmp_path / "real"
        staging.publish()
    assert names(tmp_path / "real") == ["bundle"]


@pytest.mark.parametrize(("name", "said"), [("loop", "is not a bundle"), ("x" * 250, "File name too long")])
def test_impossible_targets_are_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ExportError, match=said), Staging(tmp_path / name, overwrite=True):
        pass
    assert names(tmp_path) == ["loop"]


def test_what_a_kill_right_after_publication_leaves(tmp_path: Path, work: Path) -> None:
    bundle(tmp_path / "bundle")
    bundle(work / "replaced")
    (work / "journal").mkdir()
    mark(work)
    refused(tmp_path, f"give --overwrite to replace it or choose another folder. It is complete: {work} can be deleted")
    stage(tmp_path, overwrite=True)
    assert names(tmp_path) == ["bundle"]


def test_names_of_an_export() -> None:
    for name in (*spec.BUNDLE_FILES, *spec.DECODER_GRAPHS.values(), *LISTS, *GPTQ_FILES):
        assert in_work(f"bundle/{name}")
        assert not in_work(name)


def test_what_a_lock_leaves_is_not_in_the_way(tmp_path: Path) -> None:
    """filelock tries the folder with a file of its own, which a kill leaves there."""
    work = tmp_path / ".bundle.partial"
    work.mkdir()
    probe = work / ".filelock-probe-3dc71b23d1a1fb894493992f7209ceda"
    probe.touch()
    (work / LOCK).touch()
    assert is_marked(work)
    with Staging(tmp_path / "bundle", overwrite=False) as staging:
        assert staging.work == work
        probe.touch()
    assert names(tmp_path) == []


def test_the_mark_of_the_next_export_stays(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come between the steps in which the last one removes the folder."""
    unlink, came = Path.unlink, list[Path]()

    def interrupted(path: Path, *, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.name == MARK and not came:
            came.append(path)
            mark(work)

    with Staging(tmp_path / "bundle", overwrite=False):
        monkeypatch.setattr(Path, "unlink", interrupted)
    assert came
    assert is_marked(work)


@pytest.mark.slow
def test_one_of_many_at_a_time(tmp_path: Path) -> None:
    """Whoever comes while another removes its folder waits, or is told; nobody else's work is taken away."""
    inside, most, finished, problems = 0, 0, 0, list[BaseException]()
    count = threading.Lock()

    def export() -> None:
        nonlocal inside, most, finished
        for _ in range(40):
            try:
                with Staging(tmp_path / "bundle", overwrite=True) as staging:
                    with count:
                        inside += 1
                        most = max(most, inside)
                    (staging.folder / spec.DECODER_GRAPH).write_text("x")
                    staging.clear()
                    with count:
                        inside -= 1
                        finished += 1
            except ExportError as error:
                if "another owl2-export" not in str(error):
                    problems.append(error)
            except BaseException as error:
                problems.append(error)

    threads = [threading.Thread(target=export) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert (most, inside) == (1, 0)
    assert finished > 5
    assert names(tmp_path) == []


def test_a_job_looks_at_the_folder_before_it_reads_a_checkpoint(a1: Path, tmp_path: Path, work: Path) -> None:
    photos(work)
    with (
        pytest.raises(ExportError, match="was not made by owl2-export"),
        open_job(ExportConfig(a1, tmp_path / "bundle"), Silent()),
    ):
        pass
    assert names(work) == ["wedding.jpg"]
