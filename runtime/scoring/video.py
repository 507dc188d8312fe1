"""Videos: frames by time, one score of the whole where it fits the context, and a curve of windows for any length."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from PIL import Image

from owl2.runtime.config import require
from owl2.runtime.engine import Floats
from owl2.runtime.errors import ConfigError, ImageError
from owl2.runtime.foreign import cut, reason
from owl2.runtime.harmless import harmless
from owl2.runtime.images import PreparedImage
from owl2.runtime.scoring.score import Score
from owl2.runtime.scoring.scorer import Scorer

PER_SECOND = 1.0
WINDOW = 8
SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv")
)
"""Of the names of videos in folders."""
MOST_FRAMES = 3600
"""An hour at one a second: streams need not end."""


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


def read_frames(
    path: str | os.PathLike[str], per_second: float = PER_SECOND, most: int = MOST_FRAMES
) -> Iterator[Image.Image]:
    """Frames at a steady rate, RGB, decoded one after the other.

    As in Q-Align: the frames with the numbers int(rate · i), of whole seconds only; the first one of a video that is
    shorter.

    Args:
        path: of the video.
        per_second: frames.
        most: frames, after which a video is refused.

    Raises:
        ConfigError: PyAV is not installed, or a rate that makes no sense.
        ImageError: the video cannot be read, has no picture, or does not end.
    """
    require(per_second > 0, f"per_second must be positive, got {per_second}")
    try:
        import av
    except ImportError as error:
        raise ConfigError("videos need another package: pip install 'owl2[video]'") from error
    name = cut(harmless(str(path)))
    count, held = 0, None
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise ImageError(f"{name} has no picture; give a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            step = float(stream.average_rate or stream.guessed_rate or 25) / per_second
            for number, frame in enumerate(container.decode(stream)):
                held = held or _image(frame, number >= int(step * count))
                while held is not None and number + 1 >= step * (count + 1):
                    count += 1
                    if count > most:
                        raise ImageError(f"{name} has more than {most} frames to score; ask for fewer a second")
                    yield held
                    held = _image(frame, number >= int(step * count))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot read {name}: {reason(error)}; give a video that plays") from error
    if count == 0:
        if held is None:
            raise ImageError(f"{name} has no frames; give a video that plays")
        yield held


def _image(frame: Any, wanted: bool) -> Image.Image | None:  # noqa: ANN401 - of PyAV
    return frame.to_image() if wanted else None


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
    require(window > 0, f"window must be positive, got {window}")
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
