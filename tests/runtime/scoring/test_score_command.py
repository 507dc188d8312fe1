"""``owl2 score``: tables that survive, broken images, the report."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN, RunCommand
from PIL import Image
from pyarrow import parquet

from owl2 import Owl2

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
                {name: float(cell) if name not in ("image", "task", "error", "bundle") and cell else cell or None
                 for name, cell in row.items()}
                for row in csv.DictReader(file)
            ]  # fmt: skip
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
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


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_a_name_that_is_no_unicode(run: RunCommand, bundle_a1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png"))).write_bytes(IMAGES[0].read_bytes())
    (folder / "b.png").write_bytes(IMAGES[1].read_bytes())
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"scores{suffix}"
        assert run("score", bundle_a1, folder, "--out", out).exit_code == 0
        if suffix != ".parquet":
            before = out.read_bytes()
            assert run("score", bundle_a1, folder, "--out", out, "--resume").exit_code == 0
            assert out.read_bytes() == before


def test_speed_by_stage(run: RunCommand, bundle_a1: Path) -> None:
    result = run("bench", bundle_a1, "--score", "--rounds", "1", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["positions"] == 33  # 26 tokens and 7 rows
    assert list(found["decoder"]) == ["1", "4", "16", "64"]
    assert min(found["read"], found["vision"], *found["decoder"].values()) > 0
    shown = run("bench", bundle_a1, "--score", "--rounds", "1")
    assert "images a second" in shown.stdout
