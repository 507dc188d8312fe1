"""Videos: frames by time, one score of the whole where it fits the context, and a curve of windows for any length."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

from PIL import Image

from owl2.runtime.config import require
from owl2.runtime.engine import Floats
from owl2.runtime.errors import ConfigError, ImageError
from owl2.runtime.foreign import cut, reason
from owl2.runtime.harmless import harmless
from owl2.runtime.images import PreparedImage
from owl2.runtime.preprocess import Orientation
from owl2.runtime.scoring.score import Score
from owl2.runtime.scoring.scorer import Scorer

PER_SECOND = 1.0
WINDOW = 8
MOST_FRAMES = 3600
"""An hour at one a second: streams need not end."""
PER_SECOND_RANGE = 0.001, 1000
ROUNDING = Fraction(2, 1000)
"""Seconds by which the times in a file may be off: some formats count in milliseconds."""


@dataclass(frozen=True, slots=True)
class VideoScore:
    """Scores of one video on one scale.

    Attributes:
        whole: of all frames in one prompt, as the original computes it; None where they do not fit the context.
        windows: of frames in a row, one window after the other.
        starts: seconds at which the windows begin.
        frames: that were scored.
        video: path.
    """

    whole: Score | None
    windows: tuple[Score, ...]
    starts: tuple[float, ...]
    frames: int
    video: str

    @property
    def score(self) -> Score:
        """Of the whole, or else the mean of the windows."""
        if self.whole is not None:
            return self.whole
        count = len(self.windows)

        def mean(field: str) -> dict[str, float]:
            names = getattr(self.windows[0], field)
            return {name: sum(getattr(one, field)[name] for one in self.windows) / count for name in names}

        return replace(
            self.windows[0],
            value=self.mean,
            normalized=statistics.fmean(one.normalized for one in self.windows),
            std=statistics.fmean(one.std for one in self.windows),
            probabilities=mean("probabilities"),
            logits=mean("logits"),
        )

    @property
    def value(self) -> float:
        """Of :attr:`score`."""
        return self.score.value

    @property
    def mean(self) -> float:
        """Of the windows."""
        return statistics.fmean(score.value for score in self.windows)

    @property
    def minimum(self) -> float:
        """The worst window."""
        return min(score.value for score in self.windows)

    @property
    def task(self) -> str:
        """That was scored."""
        return self.windows[0].task

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; the curve as pairs of second and value."""
        curve = [[start, score.value] for start, score in zip(self.starts, self.windows)]
        whole = None if self.whole is None else asdict(self.whole)
        return {
            "video": self.video,
            "task": self.task,
            "value": self.value,
            "mean": self.mean,
            "minimum": self.minimum,
            "frames": self.frames,
            "curve": curve,
            "whole": whole,
        }


def check_video_settings(*, per_second: float = PER_SECOND, window: int = WINDOW, most: int = MOST_FRAMES) -> None:
    """Refuse numbers that no video can be scored with.

    Raises:
        ConfigError: one makes no sense.
    """
    low, high = PER_SECOND_RANGE
    require(low <= per_second <= high, f"per_second must be from {low} to {high}, got {per_second}")
    require(window > 0, f"window must be positive, got {window}")
    require(most > 0, f"the most frames must be positive, got {most}")


def read_frames(
    path: str | os.PathLike[str],
    per_second: float = PER_SECOND,
    most: int = MOST_FRAMES,
    *,
    orientation: Orientation = "exif",
) -> Iterator[Image.Image]:
    """Frames at a steady rate, RGB, decoded one after the other.

    The i-th is the one on screen i / per_second seconds after the beginning, as long as the time up to the next is
    whole; the first one of a video that is shorter. Where frames come at a constant rate these are the frames with the
    numbers int(rate * i), as in Q-Align.

    Args:
        path: of the video.
        per_second: frames.
        most: frames, after which a video is refused; at once, if it says how long it is.
        orientation: ``exif`` turns frames as the video says, ``stored`` ignores that, as the original.

    Raises:
        ConfigError: PyAV is not installed, or a rate that makes no sense.
        ImageError: the video cannot be read, has no picture, or does not end.
    """
    check_video_settings(per_second=per_second, most=most)
    av, name = load_av(), cut(harmless(str(path)))
    spacing = 1 / Fraction(per_second).limit_denominator(1_000_000)
    count = 0
    too_long = f"{name} has more than {most} frames to score; ask for fewer a second, or allow more"
    try:
        with av.open(os.path.abspath(path)) as container:  # noqa: PTH100 - a relative name may look like a protocol
            if not container.streams.video:
                raise ImageError(f"{name} has no picture; give a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if _seconds(container, stream) >= (most + 1) * spacing:
                raise ImageError(too_long)
            for count, frame in enumerate(_on_screen(container.decode(stream), stream, spacing), 1):
                if count > most:
                    raise ImageError(too_long)
                image: Image.Image = frame.to_image()
                turn = frame.rotation if orientation == "exif" else 0
                yield image.rotate(turn, expand=True) if turn else image
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot read {name}: {reason(error)}; give a video that plays") from error
    if count == 0:
        raise ImageError(f"{name} has no frames; give a video that plays")


def _seconds(container: Any, stream: Any) -> Fraction:  # noqa: ANN401 - of PyAV
    """How long the picture says it is; 0 if it does not."""
    if stream.duration:
        return Fraction(stream.duration * stream.time_base)
    alone = len(container.streams) == 1  # else it may be the sound that is so long
    return Fraction(container.duration, load_av().time_base) if container.duration and alone else Fraction(0)


def _on_screen(frames: Iterable[Any], stream: Any, spacing: Fraction) -> Iterator[Any]:  # noqa: ANN401 - of PyAV
    """The frame on screen at each multiple of ``spacing`` seconds whose time is whole; the first one if there is none.

    A frame is known to be it once a later one has come, so that one is held.
    """
    usual = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
    count, before, chosen, beginning = 0, None, None, None
    for number, frame in enumerate(frames):
        time = number * usual if frame.pts is None else frame.pts * frame.time_base
        beginning = time if beginning is None else beginning
        time -= beginning
        length = frame.duration * frame.time_base if frame.duration else usual
        # Some formats count in milliseconds: frames at a constant rate are where the rate says.
        time = number * usual if abs(time - number * usual) <= ROUNDING else time
        length = usual if abs(length - usual) <= ROUNDING else length
        if chosen is None and time > count * spacing:
            chosen = before
        while time + length >= (count + 1) * spacing:
            yield frame if chosen is None else chosen
            count += 1
            chosen = before if time > count * spacing else None
        before = frame
    if count == 0 and before is not None:
        yield before if chosen is None else chosen


def load_av() -> Any:  # noqa: ANN401 - a module
    """PyAV; raises ConfigError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ConfigError("videos need another package: pip install 'owl2[video]'") from error
    return av


def score_video(
    scorer: Scorer,
    frames: Iterable[Sequence[PreparedImage]],
    video: str,
    *,
    per_second: float = PER_SECOND,
    window: int = WINDOW,
) -> list[VideoScore]:
    """Scores of a video on each scale, in memory for as many frames as fit the context.

    Args:
        scorer: with ``video=True``.
        frames: prepared, in order; at least one.
        video: path, for the result.
        per_second: frames.
        window: frames of a window, at most.

    Raises:
        ContextOverflowError: a window does not fit the context.
    """
    check_video_settings(per_second=per_second, window=window)
    room = scorer.frames_that_fit
    kept: list[PreparedImage] = []
    rows: dict[str, Floats] = {}
    windows: list[tuple[Score, ...]] = []
    count = 0
    waiting = (image for frame in frames for image in frame)
    while pending := list(islice(waiting, window)):
        count += len(pending)
        seen = scorer.rows(pending)
        windows += scorer.score([pending], [video], rows=seen)
        if count <= room:
            kept += pending
            rows |= seen
        else:
            kept, rows = [], {}
    whole = scorer.score([kept], [video], rows=rows)[0] if kept else None
    starts = tuple(index * window / per_second for index in range(len(windows)))
    return [
        VideoScore(None if whole is None else whole[place], of_scale, starts, count, video)
        for place, of_scale in enumerate(zip(*windows))
    ]


def scores_of(found: Sequence[Score | VideoScore]) -> list[Score]:
    """One score for each scale, of images and of videos."""
    return [one.score if isinstance(one, VideoScore) else one for one in found]
