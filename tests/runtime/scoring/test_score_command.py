"""``owl2 score``: tables that survive, broken images, the report."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN, RunCommand
from PIL import Image
from pyarrow import parquet

from owl2 import Owl2
from owl2.runtime.scoring.report import report_page
from owl2.runtime.scoring.results import TEXTS, ResultFile
from owl2.runtime.scoring.scale import load_preset, make_scale
from owl2.runtime.scoring.score import score_of
from owl2.runtime.scoring.summary import Summary

IMAGES = sorted((GOLDEN / "images").glob("*.png"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 40 images of mixed sizes, a fold deeper some more."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    dice = np.random.default_rng(1)
    for number in range(40):
        width, height = dice.integers(8, 120, 2)
        pixels = dice.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if number % 4 == 0 else "") / f"{number:02}.png")
    return folder


def broken_files(folder: Path) -> list[str]:
    """Ten files that are no images, in their folder."""
    good = IMAGES[0].read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "head.png").write_bytes(good[:20])
    (folder / "text.png").write_text("no image")
    (folder / "folder.png").mkdir()
    (folder / "zeros.jpg").write_bytes(bytes(1000))
    (folder / "html.webp").write_text("<html></html>")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    Image.new("L", (20000, 20000)).save(folder / "bomb.png")
    (folder / "damaged.png").write_bytes(good[:16] + bytes(8) + good[24:])
    return sorted(path.name for path in folder.iterdir())


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [
                {name: float(cell) if name not in TEXTS and cell else cell or None
                 for name, cell in row.items()}
                for row in csv.DictReader(file)
            ]  # fmt: skip
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return list(parquet.read_table(path).to_pylist())


def test_scores_on_the_terminal(run: RunCommand, owl: Owl2, bundle_a1: Path) -> None:
    result = run("score", bundle_a1, *IMAGES[:2])
    assert result.exit_code == 0
    expected = [score.value for score in owl.score(IMAGES[:2])]
    assert result.stdout == "".join(f"{value:.4f}  {path}\n" for value, path in zip(expected, IMAGES))
    assert "2 files in" in result.stderr
    result = run("score", bundle_a1, IMAGES[0], "--task", "quality", "--task", "aesthetics", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["task"] for line in lines] == ["quality", "aesthetics"]
    assert lines[0] == owl.score(IMAGES[0])[0].to_json()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables_agree(run: RunCommand, owl: Owl2, bundle_a1: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"scores{suffix}"
    assert run("score", bundle_a1, photos, "-r", "--out", out).exit_code == 0
    rows = rows_of(out)
    assert [row["image"] for row in rows] == sorted(map(str, photos.glob("*.png"))) + sorted(
        map(str, photos.glob("more/*.png"))
    )
    for row in rows[::7]:
        [score] = owl.score(row["image"])
        assert (row["value"], row["normalized"], row["std"]) == (score.value, score.normalized, score.std)
        assert [row[name] for name in score.probabilities] == list(score.probabilities.values())
        assert (row["bundle"], row["error"]) == (score.bundle, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", out.name]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_killed_three_times_and_resumed(bundle_a1: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    """Nothing is lost, nothing is there twice, and the table is that of a run that was left alone."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(400):
        source = photos / "01.png" if number % 2 else photos / "02.png"
        (many / f'{number:03},"a\n{number}.png').symlink_to(source)
    out, whole = tmp_path / f"scores{suffix}", tmp_path / f"whole{suffix}"
    growing = out.with_name(f".{out.name}.jsonl") if suffix == ".parquet" else out
    tasks = ["--task", "quality", "--task", "aesthetics"]
    command = [sys.executable, "-m", "owl2.runtime", "score", str(bundle_a1), str(many), *tasks, "--batch", "1"]
    for kill in range(3):
        running = subprocess.Popen([*command, "--out", str(out), "--resume"], stderr=subprocess.DEVNULL)
        size = growing.stat().st_size if growing.exists() else 0
        while (not growing.exists() or growing.stat().st_size < size + 9000) and running.poll() is None:
            time.sleep(0.005)
        assert running.poll() is None, "it was over before it could be killed"
        running.send_signal(signal.SIGKILL if kill != 1 else signal.SIGINT)
        running.wait()
        if kill == 2:  # as a full disk or a crash of the machine leaves it
            content = growing.read_bytes()
            growing.write_bytes(content[: content.rstrip().rfind(b"\n") + 30])
    subprocess.run([*command, "--out", str(out), "--resume"], check=True, capture_output=True)
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
    rows = rows_of(out)
    assert len(rows) == 800
    assert rows == rows_of(whole)


def test_broken_files_are_rows_with_their_error(run: RunCommand, bundle_a1: Path, photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    names = broken_files(bad)
    out, report = tmp_path / "scores.csv", tmp_path / "report.html"
    result = run("score", bundle_a1, bad, photos, "--out", out, "--report", report)
    assert result.exit_code == 0
    assert "10 could not be scored" in result.stderr
    rows = rows_of(out)
    assert len(rows) == 10 + 30
    errors = {Path(row["image"]).name: row["error"] for row in rows if row["error"]}
    assert sorted(errors) == names
    assert all(row["value"] is None for row in rows if row["error"])
    assert "bomb.png" in report.read_text()
    alone = run("score", bundle_a1, bad)
    assert alone.exit_code == 1
    assert alone.stdout == ""


def test_what_is_refused(run: RunCommand, bundle_a1: Path, bundle_a2: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"

    def refused(*arguments: object) -> str:
        result = run("score", bundle_a1, *arguments)
        assert result.exit_code in (1, 2)
        return str(result.stderr)

    assert "does not exist" in refused(tmp_path / "nothing.png")
    assert "there is nothing to score" in refused(tmp_path)
    assert "does not score 'smell'" in refused(photos, "--task", "smell")
    assert "use .csv, .jsonl, .parquet" in refused(photos, "--out", tmp_path / "scores.txt")
    assert "give --out" in refused(photos, "--resume")
    assert "does not exist; make it first" in refused(photos, "--out", tmp_path / "no" / "scores.csv")
    assert "does not exist; make it first" in refused(photos, "--report", tmp_path / "no" / "report.html")
    assert "not a whole number" in refused(photos, "--batch", "many")
    assert "batch must be positive" in refused(photos, "--batch", "0")
    assert "compares several images" in refused(photos, "--preset", "compare2score")
    assert run("score", bundle_a1, photos / "01.png", "--out", out).exit_code == 0
    before = out.read_bytes()
    assert "exists already; give --resume" in refused(photos, "--out", out)
    assert "expected aesthetics" in refused(photos, "--out", out, "--resume", "--task", "aesthetics")
    words = ("--level", "good", "--level", "bad", "--weight", "1", "--weight", "0")
    assert "its columns are" in refused(photos, "--out", out, "--resume", *words)
    result = run("score", bundle_a2, photos, "--out", out, "--resume")
    assert "those of another bundle" in result.stderr
    assert out.read_bytes() == before
    assert run("score", bundle_a1, photos / "02.png", "--out", out, "--overwrite").exit_code == 0
    assert [Path(row["image"]).name for row in rows_of(out)] == ["02.png"]
    assert run("score", bundle_a1, photos / "02.png", "--out", out, "--resume").exit_code == 0  # nothing to do
    assert len(rows_of(out)) == 1
    assert "are the same file" in refused(photos, "--out", out, "--report", out, "--overwrite")
    assert "is a folder; give the name of a file" in refused(photos, "--report", photos)
    assert "--retry goes with --resume" in refused(photos, "--out", out, "--retry")
    assert "the level error has the name of a column" in refused(
        photos, "--out", tmp_path / "x.csv", "--level", "good", "--level", "error", "--weight", "1", "--weight", "0"
    )


@pytest.mark.parametrize(
    "changed",
    [
        ("--preset", "one-align-score"),
        ("--prompt", "USER: <|image|> How good is it? ASSISTANT: It is"),
        ("--weight", "9", "--weight", "4", "--weight", "3", "--weight", "2", "--weight", "1"),
        ("--preprocess", "crop"),
        ("--orientation", "stored"),
        ("--background", "none"),
        ("--backend", "onnxruntime", "--kv-cache", "fp32"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_scores_that_cannot_be_compared_are_not_mixed(
    run: RunCommand, bundle_a1: Path, tmp_path: Path, changed: tuple[str, ...], suffix: str
) -> None:
    out = tmp_path / f"scores{suffix}"
    backend = ("--backend", "native") if "--backend" in changed else ()
    assert run("score", bundle_a1, IMAGES[0], "--out", out, *backend).exit_code == 0
    before = out.read_bytes()
    result = run("score", bundle_a1, *IMAGES, "--out", out, "--resume", *changed)
    assert result.exit_code == 1
    assert "its scores were made with other settings" in result.stderr
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_one_process_at_a_time(run: RunCommand, bundle_a1: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no locks of this kind here")
    out = tmp_path / "scores.csv"
    assert run("score", bundle_a1, IMAGES[0], "--out", out).exit_code == 0
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for how in ("--resume", "--overwrite"):
            result = run("score", bundle_a1, *IMAGES, "--out", out, how)
            assert result.exit_code == 1
            assert "another process is writing to" in result.stderr
    assert len(rows_of(out)) == 1


def test_two_processes_begin_at_once(bundle_a1: Path, photos: Path, tmp_path: Path) -> None:
    """One of them does the work, the other is told."""
    for suffix in (".csv", ".parquet"):
        out = tmp_path / f"scores{suffix}"
        command = [sys.executable, "-m", "owl2.runtime", "score", str(bundle_a1), str(photos), "--out", str(out)]
        for how in ([], ["--resume"], ["--resume"]):
            runs = [subprocess.Popen([*command, *how], stderr=subprocess.PIPE, text=True) for _ in range(2)]
            said = [one.communicate()[1] for one in runs]
            codes = [one.returncode for one in runs]
            assert 0 in codes
            for code, text in zip(codes, said):
                assert code == 0 or re.search(r"another process is writing to|exists already", text)
            rows = rows_of(out)
            assert len({row["image"] for row in rows}) == len(rows) == 30
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_what_failed_is_tried_again_when_asked(
    run: RunCommand, bundle_a1: Path, photos: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"scores{suffix}"
    content = (photos / "02.png").read_bytes()
    (photos / "02.png").write_bytes(content[:50])
    assert run("score", bundle_a1, photos, "--out", out).exit_code == 0
    (photos / "02.png").write_bytes(content)
    assert run("score", bundle_a1, photos, "--out", out, "--resume").exit_code == 0
    assert sum(bool(row["error"]) for row in rows_of(out)) == 1
    assert run("score", bundle_a1, photos, "--out", out, "--resume", "--retry").exit_code == 0
    rows = rows_of(out)
    assert len({row["image"] for row in rows}) == len(rows) == 30
    assert not any(row["error"] for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", out.name]


def test_a_finished_parquet_grows(run: RunCommand, bundle_a1: Path, photos: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "scores.parquet", tmp_path / "whole.parquet"
    names = sorted(photos.glob("*.png"))
    assert run("score", bundle_a1, *names[:10], "--out", out).exit_code == 0
    assert run("score", bundle_a1, *names, "--out", out, "--resume").exit_code == 0
    assert run("score", bundle_a1, *names, "--out", out, "--resume").exit_code == 0  # nothing to do
    assert run("score", bundle_a1, *names, "--out", whole).exit_code == 0
    assert rows_of(out) == rows_of(whole)
    out.write_bytes(out.read_bytes()[:-9])
    result = run("score", bundle_a1, *names, "--out", out, "--resume")
    assert (result.exit_code, "Traceback" in result.stderr) == (1, False)
    assert "cannot read" in result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.jsonl", b'{"my": "notes"}'),
        ("notes.csv", b"my notes"),
        ("notes.csv", b"a,b\n1,2\n"),
        ("notes.jsonl", b"[]\n"),
        ("notes.jsonl", bytes(100)),
        ("notes.parquet", b"my notes"),
    ],
)
def test_files_of_others_are_left_alone(
    run: RunCommand, bundle_a1: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("score", bundle_a1, IMAGES[0], "--out", tmp_path / name, "--resume")
    assert result.exit_code == 1
    assert "cannot read" in result.stderr
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("kept", [0, 3, 40, 200])
def test_a_beginning_of_ours_is_gone_on_with(
    run: RunCommand, bundle_a1: Path, tmp_path: Path, suffix: str, kept: int
) -> None:
    """As a power failure leaves it."""
    out = tmp_path / f"scores{suffix}"
    assert run("score", bundle_a1, *IMAGES[:2], "--out", out).exit_code == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:kept])
    assert run("score", bundle_a1, *IMAGES[:2], "--out", out, "--resume").exit_code == 0
    assert out.read_bytes() == whole


@pytest.mark.skipif(os.name != "posix", reason="other systems have fewer names")
def test_names_with_anything_in_them(run: RunCommand, owl: Owl2, bundle_a1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["a\rb.png", 'q"uote,.png', "line\nbreak.png", "\u2028.png", "data:image.png", " .png", "=1+1.png"]
    for name in names:
        (folder / name).write_bytes(IMAGES[0].read_bytes())
    expected = owl.score(IMAGES[0])[0].value
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"scores{suffix}"
        assert run("score", bundle_a1, folder, "--out", out).exit_code == 0
        rows = rows_of(out)
        assert sorted(Path(row["image"]).name for row in rows) == sorted(names)
        assert {row["value"] for row in rows} == {expected}
        before = out.read_bytes()
        assert run("score", bundle_a1, folder, "--out", out, "--resume").exit_code == 0
        assert rows_of(out) == rows
        assert suffix == ".parquet" or out.read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert f"{expected:.4f}" in run("score", bundle_a1, "data:image.png").stdout


@pytest.mark.parametrize("values", [[4.0], [4.0, 4.0], [4.0, float(np.nextafter(4, 5))], [1.0, 5.0], [-1e6, 1e6]])
def test_a_report_of_any_scores(values: list[float]) -> None:
    summary = Summary()
    for number, value in enumerate(values):
        summary.add(f"{number}.png", None, [("quality", value)])
    page = report_page("Scores", summary).decode()
    assert f"{len(values)} images; mean {np.mean(values):.3f}" in page
    assert sum(int(count) for count in re.findall(r": (\d+)</title>", page)) == len(values)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """What is kept of an image is its name and a number for each task."""
    scale = make_scale(load_preset(), "quality")
    [score] = [score_of(np.arange(5.0, dtype=np.float32), [[0], [1], [2], [3], [4]], scale, None, "b")]

    def peak(count: int, suffix: str) -> int:
        out = tmp_path / f"{count}{suffix}"
        table = ResultFile.open(out, [scale], "b", {}, Summary())
        for number in range(count):
            table.add(f"{number}.png", [score])
        table.close()
        tracemalloc.start()
        table = ResultFile.open(out, [scale], "b", {}, Summary(), resume=True)
        table.finish()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(table.done) == count
        return most

    for suffix in (".csv", ".jsonl", ".parquet"):
        assert (peak(24_000, suffix) - peak(12_000, suffix)) / 12_000 < 300


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(run: RunCommand, bundle_a1: Path, photos: Path) -> None:
    (photos / "more").chmod(0)
    assert "more cannot be read" in run("score", bundle_a1, photos, "-r").stderr


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_a_name_that_is_no_unicode(run: RunCommand, bundle_a1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png"))).write_bytes(IMAGES[0].read_bytes())
    (folder / "b.png").write_bytes(IMAGES[1].read_bytes())
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"scores{suffix}"
        assert run("score", bundle_a1, folder, "--out", out).exit_code == 0
        before = out.read_bytes()
        rows = rows_of(out) if suffix == ".parquet" else []
        for _ in range(2):
            assert "0 files" in run("score", bundle_a1, folder, "--out", out, "--resume").stderr
        assert out.read_bytes() == before or rows_of(out) == rows
    assert "\\udcff" in (tmp_path / "scores.jsonl").read_text()  # JSON for everybody
    assert [row["image"][-12:] for row in rows_of(tmp_path / "scores.parquet")][1] == r"\xff\xfe.png"


def test_speed_by_stage(run: RunCommand, bundle_a1: Path) -> None:
    result = run("bench", bundle_a1, "--score", "--rounds", "1", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["positions"] == 33  # 26 tokens and 7 rows
    assert list(found["decoder"]) == ["1", "4", "16", "64"]
    assert min(found["read"], found["vision"], *found["decoder"].values()) > 0
    shown = run("bench", bundle_a1, "--score", "--rounds", "1")
    assert "images a second" in shown.stdout
