"""Videos made here: frames by time, the whole and windows, what is broken."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import RunCommand
from PIL import Image

from owl2 import ConfigError, ImageError, Owl2
from owl2.runtime.scoring.video import _on_screen, read_frames

SIDE = 64


def write_video(path: Path, frames: int, rate: Fraction | int = 8) -> Path:
    """A video whose frame number is in its brightness, losslessly."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(rate))
        stream.width = stream.height = SIDE
        stream.pix_fmt = "bgr0"
        for number in range(frames):
            pixels = np.full((SIDE, SIDE, 3), number % 256, np.uint8)
            pixels[: SIDE // 2, :, 0] = 255 - number % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(path: Path, per_second: float = 1.0) -> list[int]:
    return [int(np.asarray(frame)[-1, 0, 2]) for frame in read_frames(path, per_second)]


@pytest.mark.parametrize(
    ("frames", "rate", "per_second", "expected"),
    [
        (32, 8, 1, [0, 8, 16, 24]),
        (37, 8, 1, [0, 8, 16, 24]),  # the last second is not whole
        (40, 8, 2, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]),
        (100, Fraction(30000, 1001), 1, [0, 29, 59]),
        (3, 8, 1, [0]),  # shorter than a second
        (16, 8, 8, list(range(16))),
        (60, 8, 0.5, [0, 16, 32]),
        (4, 2, 4, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_frames_are_those_of_the_original(
    tmp_path: Path, frames: int, rate: Fraction | int, per_second: float, expected: list[int]
) -> None:
    path = write_video(tmp_path / "video.mkv", frames, rate)
    assert numbers(path, per_second) == expected
    if per_second == 1 and frames > rate:  # int(fps * i) for i in range(int(count / fps)), as in Q-Align
        assert expected == [int(Fraction(rate) * i) for i in range(int(frames / Fraction(rate)))]


def write_at(path: Path, seconds: list[float]) -> Path:
    """A video whose frames come at these times; the number of each is in its brightness."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(second * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.1 * number for number in range(10)] + [float(second) for second in range(1, 10)], [0, *range(10, 18)]),
        ([0.0, 5.0], [0, 0, 0, 0, 0]),  # on screen for five seconds
        ([0.0, 0.4, 2.5, 3.1], [0, 1, 1]),
        ([3.0, 4.0, 5.0, 6.0], [0, 1, 2]),  # begins later
    ],
)
def test_frames_are_those_on_screen(tmp_path: Path, seconds: list[float], expected: list[int]) -> None:
    assert numbers(write_at(tmp_path / "video.mkv", seconds)) == expected


def test_frames_are_turned_as_the_video_says(tmp_path: Path, owl: Owl2, run: RunCommand, bundle_a1: Path) -> None:
    """Written by hand: the matrix of an MP4's track header says a quarter turn, as phones do."""
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 2 * SIDE, SIDE, "yuv420p"
        pixels = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
        pixels[:, :SIDE, 0] = 255
        for _ in range(16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    unit, zero = (1 << 16).to_bytes(4, "big"), bytes(4)
    upright = unit + zero * 3 + unit + zero * 3 + (1 << 30).to_bytes(4, "big")
    turned = zero + unit + zero + (-(1 << 16)).to_bytes(4, "big", signed=True) + zero * 4 + upright[-4:]
    track = content.index(b"tkhd")
    matrix = content.index(upright, track)
    path.write_bytes(content[:matrix] + turned + content[matrix + 36 :])
    [first, _] = read_frames(path)
    assert first.size == (SIDE, 2 * SIDE)
    red = np.asarray(first)[..., 0]
    assert red[: SIDE // 2].mean() > 200  # the left end is at the top: a quarter clockwise
    assert red[-SIDE // 2 :].mean() < 50
    [stored, _] = read_frames(path, orientation="stored")
    assert stored.size == (2 * SIDE, SIDE)
    value = owl.score_video(path, orientation="stored").value
    assert run("score", bundle_a1, path, "--video", "--orientation", "stored").stdout.startswith(f"{value:.4f}")
    assert not run("score", bundle_a1, path, "--video").stdout.startswith(f"{value:.4f}")


def test_what_is_too_long_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "long.mkv", 8 * 20)
    with pytest.raises(ImageError, match="more than 10 frames"):
        next(read_frames(path, most=10))
    assert len(list(read_frames(path, most=20))) == 20
    (tmp_path / "12:30.mkv").write_bytes(path.read_bytes())  # no protocol called 12
    monkeypatch.chdir(tmp_path)
    assert len(list(read_frames("12:30.mkv"))) == 20


@pytest.mark.parametrize("rate", ["24000/1001", "24", "25", "30000/1001", "30", "60000/1001"])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".avi"])
def test_constant_rates_in_other_formats(tmp_path: Path, suffix: str, rate: str) -> None:
    """Some count in milliseconds: which frame is shown must not depend on how its time was rounded."""
    path, exact = tmp_path / f"video{suffix}", Fraction(rate)
    for count in (int(exact * 41), int(exact * 41) + 1, int(exact * 41) - 1):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=exact)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            for _ in range(count):
                container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
            container.mux(stream.encode())
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            places = {id(frame): number for number, frame in enumerate(frames)}
            found = [places[id(frame)] for frame in _on_screen(frames, stream, Fraction(1))]
        assert found == [int(exact * i) for i in range(int(count / exact))]


def test_long_sound_is_no_long_picture(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("mpeg4", rate=8), container.add_stream("aac", rate=8000)
        video.width, video.height, video.pix_fmt = SIDE, SIDE, "yuv420p"
        for _ in range(16):
            container.mux(video.encode(av.VideoFrame(SIDE, SIDE, "yuv420p")))
        container.mux(video.encode())
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), layout="mono", format="fltp")
            frame.sample_rate = 8000
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert len(list(read_frames(path, most=3))) == 2


def test_the_context_decides_about_a_video(run: RunCommand, bundle_a1: Path, tmp_path: Path) -> None:
    path, out = write_video(tmp_path / "video.mkv", 8 * 6), tmp_path / "scores.csv"
    assert run("score", bundle_a1, path, "--video", "--context", "64", "--window", "2", "--out", out).exit_code == 0
    result = run("score", bundle_a1, path, "--video", "--window", "2", "--out", out, "--resume")
    assert "made with other settings" in result.stderr


@pytest.mark.parametrize("setting", [("--window", "0"), ("--per-second", "nan"), ("--max-frames", "-1")])
def test_settings_are_refused_before_the_work(run: RunCommand, tmp_path: Path, setting: tuple[str, str]) -> None:
    path = write_video(tmp_path / "video.mkv", 8)
    result = run("score", tmp_path / "no bundle", path, "--video", "--out", tmp_path / "scores.csv", *setting)
    assert result.exit_code == 1
    assert "must be" in result.stderr
    assert not (tmp_path / "scores.csv").exists()


def test_the_whole_and_its_windows(owl: Owl2, tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mkv", 8 * 10)
    found = owl.score_video(path, window=4)
    images = list(read_frames(path))
    scorer = owl.scorer(video=True)
    [(whole,)] = scorer.score([scorer.prepare(images)], [path])
    assert found.whole == whole
    assert (found.frames, found.starts, found.video) == (10, (0.0, 4.0, 8.0), str(path))
    windows = [scorer.score([scorer.prepare(images[start : start + 4])])[0][0].value for start in (0, 4, 8)]
    assert [score.value for score in found.windows] == windows
    assert (found.value, found.minimum) == (whole.value, min(windows))
    assert found.mean == pytest.approx(np.mean(windows))


def test_long_videos_have_windows_alone(bundle_a1: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mkv", 8 * 60)
    with Owl2.load(bundle_a1, context=128) as owl:
        assert owl.scorer(video=True).frames_that_fit < 60
        found = owl.score_video(path)
        assert found.whole is None
        assert len(found.windows) == 8
        assert found.value == found.mean
    with Owl2.load(bundle_a1) as owl:
        again = owl.score_video(path)
        assert [score.value for score in again.windows] == [score.value for score in found.windows]
        assert again.whole is not None


def test_what_is_broken_or_does_not_end(owl: Owl2, tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mkv", 80)
    cases = {
        "empty.mp4": b"",
        "text.mp4": b"no video",
        "cut.mkv": good.read_bytes()[:200],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"cannot read .*{name}|{name} has no"):
            owl.score_video(tmp_path / name)
    with pytest.raises(ImageError, match="missing"):
        owl.score_video(tmp_path / "missing.mp4")
    with pytest.raises(ImageError, match="more than 5 frames"):
        owl.score_video(good, most_frames=5)
    with pytest.raises(ConfigError, match=r"per_second must be from 0\.001 to 1000"):
        owl.score_video(good, per_second=0)
    Image.new("RGB", (20, 20)).save(tmp_path / "still.png")
    assert owl.score_video(tmp_path / "still.png").frames == 1
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ImageError, match="has no picture"):
        owl.score_video(tmp_path / "sound.wav")
    half = tmp_path / "half.mkv"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    assert 0 < owl.score_video(half).frames < 10  # what can be read of it


def test_videos_on_the_command_line(run: RunCommand, owl: Owl2, bundle_a1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    good = write_video(folder / "good.mkv", 80)
    (folder / "bad.mp4").write_bytes(b"")
    result = run("score", bundle_a1, folder, "--video", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0]["error"].startswith("cannot read")
    expected = owl.score_video(good)
    assert lines[1] == expected.to_json()
    out = tmp_path / "scores.jsonl"
    assert run("score", bundle_a1, folder, "--video", "--out", out).exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["value"], bool(row["error"])) for row in rows] == [(None, True), (expected.value, False)]
    assert run("score", bundle_a1, good, "--video", "--per-second", "2").stdout.split()[1] == str(good)
