"""Calibration data: which prompts and images the quantizer looks at.

Three sources: a folder of images (optionally each with a text beside it), a JSONL file of conversations in
the fine-tuning format of mPLUG-Owl2, or the built-in set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl2.quant.calibration import builtin
from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import CalibrationError, ConfigError, ImageError
from owl2.runtime.families.mplug_owl2.template import Message, Role, check_placeholders, render, with_images
from owl2.runtime.preprocess import ImageInput, load_image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp")
ROLES: dict[str, Role] = {"human": "USER", "user": "USER", "gpt": "ASSISTANT", "assistant": "ASSISTANT"}
LISTED_PROBLEMS = 10
BUILT_IN = "built-in"


@dataclass(frozen=True, slots=True)
class Sample:
    """One calibration prompt.

    Attributes:
        prompt: rendered text with one ``<|image|>`` per image.
        images: paths or PIL images.
    """

    prompt: str
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Samples and where they came from.

    Attributes:
        source: ``built-in``, or the name of the folder or file.
        samples: in a fixed order.
        notes: what a reader of the report should know, a sentence each.
    """

    source: str
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def images(self) -> int:
        """How many images the samples hold."""
        return sum(len(sample.images) for sample in self.samples)


def load_calibration(path: Path | None, limit: int, *, need_images: bool = True) -> CalibrationSet:
    """Read at most ``limit`` samples, spread evenly over the source; None gives the built-in set.

    Only the images of the chosen samples are opened.

    Raises:
        CalibrationError: the path is missing, empty or unreadable, lines are malformed or images unusable (all of
            them are named), or no sample has an image though ``need_images``.
        ConfigError: the limit is not positive.
    """
    if limit < 1:
        raise ConfigError(f"{limit} calibration samples were asked for; at least 1 is needed")
    if path is None:
        whole = builtin_set()
    elif path.is_dir():
        whole = _from_folder(path)
    elif path.is_file():
        whole = _from_jsonl(path)
    else:
        raise CalibrationError(
            f"{path} does not exist; give a folder of images or a JSONL file of conversations, or leave the "
            "option out for the built-in set"
        )
    if need_images and whole.images == 0:
        raise CalibrationError(
            f"{whole.source}: none of its {len(whole.samples)} samples has an image. This model has keys, values and "
            "norms of their own for image rows; without images these would be rounded blindly. Add conversations "
            "with images, or use a folder of images"
        )
    result = CalibrationSet(whole.source, _evenly(whole.samples, limit), whole.notes)
    if path is not None:
        _check_images(path, [image for sample in result.samples for image in sample.images])
    return result


def builtin_set() -> CalibrationSet:
    """Drawn images and short conversations that ship with the project."""
    rng = random.Random("built-in calibration")
    samples = [
        Sample(builtin.image_conversation(drawing, rng), (drawing.image,))
        for drawing in builtin.drawings(builtin.IMAGES, 0)
    ]
    samples += [Sample(text) for text in builtin.text_conversations()]
    rng.shuffle(samples)
    note = (
        "the built-in calibration set was used: drawn images and short texts, no photographs; "
        "data of your own domain usually gives a better model (--calibration)"
    )
    return CalibrationSet(BUILT_IN, tuple(samples), (note,))


def probe_samples() -> tuple[Sample, ...]:
    """Prompts on which every exported graph is compared with torch: no image, one, several, in the middle."""
    one, two, three = (drawing.image for drawing in builtin.drawings(3, 1))
    return (
        Sample("USER: What is the capital of France? ASSISTANT: The capital of France is Paris.</s>"),
        Sample(
            f"USER: {IMAGE_TOKEN}What is in the picture? ASSISTANT: A drawing.</s>USER: And why? ASSISTANT:", (one,)
        ),
        Sample(f"USER: Compare {IMAGE_TOKEN} and {IMAGE_TOKEN}, please. ASSISTANT: They differ.</s>", (two, three)),
    )


def _evenly(samples: Sequence[Sample], limit: int) -> tuple[Sample, ...]:
    """At most ``limit`` samples from the whole length; one with an image among them if there is any."""
    if len(samples) <= limit:
        return tuple(samples)
    chosen = [samples[i * len(samples) // limit] for i in range(limit)]
    imaged = next((sample for sample in samples if sample.images), None)
    if imaged is not None and not any(sample.images for sample in chosen):
        chosen[0] = imaged
    return tuple(chosen)


def _from_folder(folder: Path) -> CalibrationSet:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise CalibrationError(
            f"{folder} holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}, "
            "each optionally with a text of the same name ending in .txt"
        )
    samples, without = [], 0
    for index, path in enumerate(paths):
        question = Message("USER", IMAGE_TOKEN + builtin.QUESTIONS[index % len(builtin.QUESTIONS)])
        text = path.with_suffix(".txt")
        answer = text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""
        without += not answer
        samples.append(Sample(render([question, Message("ASSISTANT", answer or None)]), (path,)))
    if not without:
        return CalibrationSet(folder.name, tuple(samples))
    # Images alone leave the text branch with a handful of questions.
    texts = [Sample(text) for text in builtin.text_conversations()]
    note = f"{without} of {len(paths)} images have no text beside them; {len(texts)} built-in conversations were added"
    return CalibrationSet(folder.name, tuple(samples + texts), (note,))


def _check_images(source: Path, images: Sequence[ImageInput]) -> None:
    problems = []
    for image in images:
        try:
            load_image(image)
        except ImageError as error:
            problems.append(str(error))
    _raise_problems(source, problems)


def _raise_problems(source: Path, problems: Sequence[str]) -> None:
    if problems:
        shown = list(problems[:LISTED_PROBLEMS])
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more")
        raise CalibrationError(f"{source}: {len(problems)} problems:\n  " + "\n  ".join(shown))


def _from_jsonl(path: Path) -> CalibrationSet:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path} cannot be read: {error}; expected UTF-8 text, one JSON object per line"
        ) from error
    if text.lstrip().startswith("["):
        raise CalibrationError(f"{path} is one JSON array; expected one JSON object per line")
    samples, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            samples.append(_sample(json.loads(line), path.parent))
        except ValueError as error:  # PromptError too
            problems.append(f"line {number}: {error}")
    _raise_problems(path, problems)
    if not samples:
        raise CalibrationError(f"{path} holds no conversations; expected one JSON object per line")
    return CalibrationSet(path.name, tuple(samples))


def _sample(record: Any, folder: Path) -> Sample:  # noqa: ANN401 - any JSON value
    """One line: ``{"image": "a.png" or [...], "conversations": [{"from": "human", "value": "..."}, ...]}``."""
    if not isinstance(record, Mapping) or not isinstance(record.get("conversations"), list):
        raise ValueError('expected an object with "conversations" and, where there are images, "image"')
    named = record.get("image") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"image" must be a file name or a list of them, got {named!r}')
    messages = [_message(entry) for entry in record["conversations"]]
    if not messages:
        raise ValueError('"conversations" is empty')
    if not any(IMAGE_TOKEN in (message.text or "") for message in messages):
        messages[0] = Message(messages[0].role, with_images(messages[0].text or "", len(names)))
    prompt = render(messages)
    check_placeholders(prompt, len(names))
    return Sample(prompt, tuple(folder / name for name in names))


def _message(entry: Any) -> Message:  # noqa: ANN401 - any JSON value
    given: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    role, text = ROLES.get(str(given.get("from"))), given.get("value")
    if role is None or not isinstance(text, str):
        raise ValueError(f'a turn must be {{"from": "human" or "gpt", "value": text}}, got {entry!r}')
    return Message(role, text)
