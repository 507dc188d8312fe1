"""What is asked, and what the words of the answer are worth."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from owl2.runtime.config import IMAGE_TOKEN, require
from owl2.runtime.errors import ConfigError
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer
from owl2.runtime.foreign import ForeignError, read_json, reading, shorten
from owl2.runtime.preprocess import MODES, check_mode

FOLDER = Path(__file__).parent / "presets"
USUAL = "q-align"
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
"""Names of the presets that come with this package."""
PRESET_BYTES = 1 << 20
MOST_LEVELS, MOST_CHARACTERS, LARGEST_WEIGHT = 64, 100, 1e6
"""Of a scale, of a word or the name of a task: they are repeated in every row and every answer of a server."""


@dataclass(frozen=True)
class Level:
    """One answer.

    Attributes:
        words: for it; where there are several, their logits are averaged.
        weight: what it is worth.
    """

    words: tuple[str, ...]
    weight: float

    @property
    def name(self) -> str:
        """Its first word."""
        return self.words[0]


@dataclass(frozen=True)
class Scale:
    """What an image is asked, and how the answer becomes a number.

    Attributes:
        task: what is scored.
        prompt: raw, with one ``<|image|>`` per image; a video's frames all take the place of the only one.
        levels: the best first.
        preprocess: mode of preprocessing.
        video: whether the images of an item are the frames of a video.
        temperature: that the levels' logits are divided by.
    """

    task: str
    prompt: str
    levels: tuple[Level, ...]
    preprocess: str
    video: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_mode(self.preprocess)
        require(
            isinstance(self.task, str) and 0 < len(self.task) <= MOST_CHARACTERS,
            f"a task must be a name of at most {MOST_CHARACTERS} characters, got {shorten(self.task)}",
        )
        require(len(self.levels) >= 2, f"a scale needs two levels at least, got {len(self.levels)}")
        require(len(self.levels) <= MOST_LEVELS, f"a scale has {MOST_LEVELS} levels at most, got {len(self.levels)}")
        count = self.prompt.count(IMAGE_TOKEN)
        require(count > 0, f"the prompt {shorten(self.prompt)} has no {IMAGE_TOKEN}")
        require(not self.video or count == 1, f"a prompt for videos has one {IMAGE_TOKEN} for all frames, not {count}")
        require(
            len({level.weight for level in self.levels}) > 1, "all weights are the same; give the levels different ones"
        )


@dataclass(frozen=True)
class Preset:
    """How one kind of model is asked.

    Attributes:
        name: of it.
        preprocess: mode of preprocessing.
        levels: the best first.
        image: prompt by task.
        video: the same for the frames of a video.
        temperature: see :class:`Scale`.
    """

    name: str
    preprocess: str
    levels: tuple[Level, ...]
    image: Mapping[str, str]
    video: Mapping[str, str]
    temperature: float = 1.0


class ScaleSettings(TypedDict, total=False):
    """Keywords of :meth:`Owl2.scorer` and of what stands on it."""

    preset: str | os.PathLike[str] | None
    levels: Sequence[str] | None
    weights: Sequence[float] | None
    prompt: str | None
    preprocess: str | None


def load_preset(name: str | os.PathLike[str] = USUAL) -> Preset:
    """A preset by its name, or from a JSON file of your own.

    Raises:
        ConfigError: there is none, or its file makes no sense.
    """
    if name in PRESETS:
        path = FOLDER / f"{name}.json"
    else:
        path = Path(name)
        require(
            path.suffix == ".json",
            f"preset {shorten(str(name))} is not known; use {', '.join(PRESETS)} or a .json file",
        )
    with reading(path, ConfigError, "docs/scoring.md describes presets"):
        return _preset(path.stem, read_json(path, PRESET_BYTES))


def preset_for(asked: str | os.PathLike[str] | None, named: str) -> Preset:
    """The preset that was asked for; else the one that a bundle names, or the usual one. Raises as load_preset."""
    return load_preset((named or USUAL) if asked is None else asked)


def make_scale(
    preset: Preset,
    task: str,
    *,
    video: bool = False,
    levels: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    prompt: str | None = None,
    preprocess: str | None = None,
) -> Scale:
    """The scale of a task, or one with words, weights or a prompt of your own.

    Raises:
        ConfigError: the preset does not know the task and there is no prompt, or something makes no sense.
    """
    known = preset.video if video else preset.image
    if prompt is None:
        kind = "videos" if video else "images"
        require(
            isinstance(task, str) and task in known,
            f"preset {preset.name} does not score {shorten(task)} of {kind}; it knows {', '.join(known) or 'nothing'}; "
            "or give a prompt",
        )
        prompt = known[task]
    names = [level.words for level in preset.levels]
    if levels is not None:
        words = isinstance(levels, Sequence) and not isinstance(levels, str) and all(map(_is_word, levels))
        require(words, f"levels must be words of at most {MOST_CHARACTERS} characters, got {shorten(levels)}")
        names = [(word,) for word in levels]
    values: Sequence[float] = [level.weight for level in preset.levels]
    if weights is not None:
        numbers = isinstance(weights, Sequence | np.ndarray) and all(map(_is_weight, weights))
        require(numbers, f"weights must be numbers from -1e6 to 1e6, got {shorten(weights)}")
        values = [float(weight) for weight in weights]
    require(
        len(names) == len(values),
        f"{len(names)} levels need as many weights, got {len(values)}; give them from the best to the worst",
    )
    made = tuple(Level(words, weight) for words, weight in zip(names, values))
    return Scale(task, prompt, made, preprocess or preset.preprocess, video, preset.temperature)


def level_ids(scale: Scale, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each level's words: the first one of each word, as in the original.

    Raises:
        ConfigError: a word has none, or two levels share one.
    """
    owners: dict[int, Level] = {}
    result = []
    for level in scale.levels:
        encoded = [tokenizer.encode(word) for word in level.words]
        require(all(encoded), f"a word of the level {shorten(level.name)} has no token")
        ids = [tokens[0] for tokens in encoded]
        for token in ids:
            other = owners.setdefault(token, level)
            require(
                other is level,
                f"the levels {shorten(other.name)} and {shorten(level.name)} begin with the same token; choose other "
                "words",
            )
        result.append(ids)
    return result


def _is_word(word: object) -> bool:
    return isinstance(word, str) and bool(word.strip()) and len(word) <= MOST_CHARACTERS


def _is_weight(weight: object) -> bool:
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.integer | np.floating):
        return False
    return bool(-LARGEST_WEIGHT <= weight <= LARGEST_WEIGHT)


def _preset(name: str, data: Any) -> Preset:  # noqa: ANN401 - JSON
    match data:
        case {"preprocess": str(mode), "levels": list(levels), "image": dict(image), "video": dict(video)} if (
            mode in MODES and all(isinstance(text, str) for text in (*image.values(), *video.values()))
        ):
            temperature = data.get("temperature", 1)
            if not _is_weight(temperature) or temperature <= 0:
                raise ForeignError(f"temperature is {shorten(temperature)}, expected a number above 0")
            return Preset(name, mode, tuple(map(_level, levels)), image, video, float(temperature))
    raise ForeignError(
        f"it is no preset: expected preprocess ({', '.join(MODES)}), levels, and prompts by task in image and video"
    )


def _level(data: Any) -> Level:  # noqa: ANN401 - JSON
    match data:
        case {"words": [_, *_] as words, "weight": weight} if all(map(_is_word, words)) and _is_weight(weight):
            return Level(tuple(words), float(weight))
    raise ForeignError(f"a level is {shorten(data)}, expected words and a weight")
